"""PLMS, the linear multistep part of PNDM (Liu et al. 2022, arXiv:2202.09778, eq. 11–13)."""

from itertools import pairwise

from fastdiff.methods.levels import Source
from fastdiff.methods.multistep import checked_order, eps_row
from fastdiff.methods.registry import method
from fastdiff.methods.rows import History, Row

# Adams–Bashforth over equal steps in t, of ε from the newest to the oldest, by order.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@method("pndm")
def pndm(source: Source, *, order: int = 4) -> list[Row]:
    """DDIM's step with Adams–Bashforth's mean of the last ``order`` ε (4: PLMS; 2: S-PNDM).

    The weights are those of equal steps in t, whatever the levels. The first step is an improved
    Euler's: a second row takes the mean of the ε at both of its ends; so it costs two calls, and
    replaces the Runge–Kutta start of the paper, as in CompVis's PLMS (diffusers'
    ``skip_prk_steps``). It is DDIM's where it leads from no signal, or to the data.
    InputError for an ``order`` that is not 1 … 4.
    """
    history = History(checked_order(order, 4) - 1)
    rows: list[Row] = []
    for i, (at, to) in enumerate(pairwise(source.path)):
        step = to.sigma - at.sigma
        mean = ADAMS_BASHFORTH[len(history.recent) + 1][1:]
        rows.append(eps_row(i, at, to, [weight * step for weight in mean], history))
        if i == 0 and order > 1 and at.signal and to.noise:
            half = to.signal * step / 2  # x ← x + half·(ε_to − ε_at)
            rows.append(
                Row(
                    to,
                    c=-half * to.signal / to.noise,
                    d=1 + half / to.noise,
                    e=history.factors([-half]),
                    begins=False,
                )
            )
    return rows
