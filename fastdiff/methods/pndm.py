"""The linear multistep part of PNDM (Liu et al. 2022, arXiv:2202.09778): PLMS, iPNDM."""

from itertools import pairwise

from fastdiff.methods.levels import Source
from fastdiff.methods.multistep import checked_order, eps_row
from fastdiff.methods.registry import method
from fastdiff.methods.rows import History, Row

# Adams–Bashforth over equal steps in t: the weights of the kept ε, the newest first, by their count
ADAMS_BASHFORTH = (
    (),
    (-1 / 2,),
    (-16 / 12, 5 / 12),
    (-59 / 24, 37 / 24, -9 / 24),
)


@method("pndm")
def pndm(source: Source, *, order: int | None = None) -> list[Row]:
    """DDIM's step with Adams–Bashforth's mean of the last ``order`` ε (4: PLMS; 2: S-PNDM).

    The weights are those of equal steps in t, whatever the levels, so that it converges with order
    2. The first step is an improved Euler's: a second row takes the mean of the ε at both of its
    ends. It costs one call more, and is CompVis's start (diffusers' ``skip_prk_steps``) in the
    place of the paper's Runge–Kutta. It is DDIM's where it leads to the data, or from or to no
    signal. InputError for an ``order`` that is not 1 … 4, or more than the steps.
    """
    first, *others = ipndm(source, order=order)
    at, to = source.path[:2]
    if order == 1 or not (at.signal and to.signal and to.noise):
        return [first, *others]
    half = to.signal * (to.sigma - at.sigma) / 2  # x ← x + half·(ε_to − ε_at)
    second = Row(
        to,
        c=-half * to.signal / to.noise,
        d=1 + half / to.noise,
        e=(-half, 0.0, 0.0),
        begins=False,
    )
    return [first, second, *others]


@method("ipndm")
def ipndm(source: Source, *, order: int | None = None) -> list[Row]:
    """The same with a first step of DDIM's, then of orders 2, 3, …: a call a step (Zhang & Chen
    2022, arXiv:2204.13902, who name it so). InputError as of ``pndm``."""
    history = History(checked_order(order, source, usual=4, highest=4) - 1)
    rows = []
    for i, (at, to) in enumerate(pairwise(source.path)):
        step = to.sigma - at.sigma
        before = history.recent if to.signal else []
        older = [weight * step for weight in ADAMS_BASHFORTH[len(before)]]
        rows.append(eps_row(i, at, to, older, history))
    return rows
