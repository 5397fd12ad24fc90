"""Linear multistep in σ = noise / signal (Karras et al. 2022's ODE, arXiv:2206.00364, eq. 1; the
method as k-diffusion has it)."""

from itertools import pairwise

from fastdiff.methods.levels import Source
from fastdiff.methods.multistep import checked_order, eps_row, weights
from fastdiff.methods.registry import method
from fastdiff.methods.rows import History, Row


@method("lms")
def lms(source: Source, *, order: int | None = None) -> list[Row]:
    """Adams–Bashforth on the levels' own grid: of x/signal, whose derivative by σ is ε, the
    polynomial through the last ``order`` ε (4) is integrated exactly, to σ = 0 in the last row.

    The first rows are of the orders that there are ε for; so are those after a level without
    signal, and one to it is DDIM's. InputError for an ``order`` that is not 1 … 4, or more than the
    steps.
    """
    order = checked_order(order, source, usual=4, highest=4)
    history = History(order - 1)
    rows, path = [], source.path
    for i, (at, to) in enumerate(pairwise(path)):
        step = to.sigma - at.sigma
        before = history.recent if to.signal else []
        nodes = [(path[row].sigma - at.sigma) / step for row in before]
        moments = [step / (k + 1) for k in range(1, len(nodes) + 1)]  # ∫ ((σ − σ_at)/step)^k dσ
        rows.append(eps_row(i, at, to, weights(nodes, moments), history))
    return rows
