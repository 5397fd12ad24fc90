"""UniPC (Zhao et al. 2023, arXiv:2302.04867), on predictions of x_0, multistep."""

import math
from itertools import pairwise, zip_longest

from fastdiff.errors import InputError
from fastdiff.methods.levels import Level, Source
from fastdiff.methods.multistep import checked_order, weights
from fastdiff.methods.registry import method
from fastdiff.methods.rows import History, Row, ddim_step, log_snr_step, phi

VARIANTS = ("bh1", "bh2")  # B(h) = h, e^h − 1 (for x_0: −h and e^−h − 1)


@method("unipc")
def unipc(
    source: Source, *, order: int | None = None, variant: str = "bh2", corrector: bool = True
) -> list[Row]:
    """UniP-``order``, each x corrected by UniC once its x_0 is known, at no further network call.

    The corrected x of a row is its x and a sum over x_0 and what is kept, so it stands in the row's
    own factors. The first rows are of the orders that there are x_0 for, the last ones of the
    orders … 3, 2, 1, the last to the data being DDIM's; a step is corrected by the order that it
    was predicted by. A step from a level without signal is of first order, is not corrected, and
    leaves nothing to later rows.

    Args:
        source: the process's levels and what the network predicts.
        order: 1 … 3, of the predictor; the corrector has one more. 3 where None.
        variant: "bh1" or "bh2", which counts in the predictor of order 2 and the corrector of
            order 1 alone: elsewhere B(h) cancels.
        corrector: False: the predictor alone.

    Raises:
        InputError: another ``order``, one of more than the steps, or another ``variant``.
    """
    if variant not in VARIANTS:
        raise InputError(f"variant is {variant!r}; expected {' or '.join(VARIANTS)}")
    order = checked_order(order, source, usual=3, highest=3)
    history = History(order - (not corrector))
    rows: list[Row] = []
    path, correction = source.path, [0.0]
    for i, (at, to) in enumerate(pairwise(path)):
        before = [path[row] for row in history.recent]
        step_order = min(order, len(before) + 1, source.left(i))
        c, d = ddim_step(at, to)
        older = _predictor(at, to, before[: step_order - 1], variant)
        of_x_start = [c - sum(older), *older]  # of x_0, and of those kept from the newest on
        corrected = [d * factor for factor in correction]
        now, *kept = map(sum, zip_longest(of_x_start, corrected, fillvalue=0.0))
        e = history.factors(kept)
        slot = history.keep(i) if at.signal else None
        rows.append(Row(at, c=now, d=d, e=e, slot=slot, k=1.0))
        if corrector and at.signal and to.noise:
            correction = _correction(at, to, before[: step_order - 1], older, variant)
    return rows


def _predictor(at: Level, to: Level, before: list[Level], variant: str) -> list[float]:
    """w of x' = DDIM's + Σ_j w_j·(x_0 at before_j − x_0) (UniP)."""
    h = log_snr_step(at, to)
    nodes = [log_snr_step(at, level) / h for level in before]
    if len(nodes) == 1:  # the authors' simpler half in the place of φ_2 / B
        return [to.signal * _scale(h, variant) / 2 / nodes[0]]
    return weights(nodes, _moments(to, h, len(nodes)))


def _correction(
    at: Level, to: Level, before: list[Level], predicted: list[float], variant: str
) -> list[float]:
    """What the x at ``to`` is corrected by (UniC): factors of x_0 there, at ``at``, at ``before``.

    ``predicted``: the weights of ``before`` in what it was predicted by.
    """
    h = log_snr_step(at, to)
    nodes = [1.0, *(log_snr_step(at, level) / h for level in before)]
    if len(nodes) == 1:
        new, *older = [to.signal * _scale(h, variant) / 2]
    else:
        new, *older = weights(nodes, _moments(to, h, len(nodes)))
    change = [w - p for w, p in zip(older, predicted, strict=True)]
    return [new, -new - sum(change), *change]


def _moments(to: Level, h: float, count: int) -> list[float]:
    """signal_to·∫ e^(λ − λ_to)·τ^k dλ with λ = λ_at + τ·h, for k = 1 … count."""
    return [to.signal * h * math.factorial(k) * phi(k + 1, h) for k in range(1, count + 1)]


def _scale(h: float, variant: str) -> float:
    """−B(h) for x_0, of the first moment's size."""
    return h if variant == "bh1" else -math.expm1(-h)
