"""What linear multistep methods share: weights by moments, and a row that reads kept ε.

Such a method integrates a polynomial through what the network said at the last few levels. Written
as its difference from the newest value, that is DDIM's step and a sum over the older ones.
"""

from collections.abc import Sequence

from fastdiff.errors import InputError
from fastdiff.methods.levels import Level, Source
from fastdiff.methods.rows import History, Row, ddim_step, solve


def checked_order(order: int | None, source: Source, *, usual: int, highest: int) -> int:
    """``order``, or where none was asked for the ``usual`` one, of which short paths take less.

    InputError for what is no order from 1 to ``highest``, and for one that the process has too few
    steps for.
    """
    if order is None:
        return usual
    if not isinstance(order, int) or isinstance(order, bool) or not 1 <= order <= highest:
        raise InputError(f"order is {order!r}; expected an integer from 1 to {highest}")
    if order > source.total:
        raise InputError(
            f"order is {order}, which takes as many steps; {source.total} are taken: leave it out, "
            "or take more steps"
        )
    return order


def weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """w with Σ_j w_j·s_j^k = moments_k, k = 1 … n, for n nodes s, none of them 0.

    With the moments ∫ s^k of an integral, Σ_j w_j·(f(s_j) − f(0)) is that of p − f(0), where p is
    the polynomial through f(0) and every f(s_j).
    """
    powers = range(1, len(nodes) + 1)
    return solve([[node**k for node in nodes] for k in powers], list(moments)) if nodes else []


def eps_row(number: int, at: Level, to: Level, older: Sequence[float], history: History) -> Row:
    """x' = DDIM's + signal'·Σ_j w_j·(ε_j − ε) with ε = (x − signal·x_0) / noise, which is kept.

    Args:
        number: of the row, by which ``history`` knows it.
        at, to: the levels that it leads from and to.
        older: w_j of the kept ε_j, from the newest to the oldest.
        history: what is kept. A level without signal leaves nothing there.
    """
    c, d = ddim_step(at, to)
    share = to.signal * sum(older) / at.noise
    return Row(
        at,
        c=c + share * at.signal,
        d=d - share,
        e=history.factors([to.signal * weight for weight in older]),
        slot=history.keep(number) if at.signal else None,
        k=-at.signal / at.noise,
        q=1 / at.noise,
    )
