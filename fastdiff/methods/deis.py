"""DEIS (Zhang & Chen 2022, arXiv:2204.13902), Adams–Bashforth with polynomials in log ρ."""

import math
from itertools import pairwise

from fastdiff.methods.levels import Source
from fastdiff.methods.multistep import checked_order, eps_row, weights
from fastdiff.methods.registry import method
from fastdiff.methods.rows import History, Row, log_snr_step, phi


@method("deis")
def deis(source: Source, *, order: int = 3) -> list[Row]:
    """x/signal moves by ∫ ε dρ, ρ = noise / signal, with ε a polynomial in log ρ = −λ through its
    last ``order`` values.

    The first rows are of the orders that there are ε for, the last is DDIM's, as log ρ = −∞ there;
    of fewer than 15 rows the last but one is of second order at most, as in diffusers.
    InputError for an ``order`` that is not 1 … 4 (the paper's ρ- and tAB0 … 3).
    """
    history = History(checked_order(order, 4) - 1)
    rows, path = [], source.path
    for i, (at, to) in enumerate(pairwise(path)):
        h, left = log_snr_step(at, to), len(source.steps) - i
        most = left if left == 1 or len(source.steps) < 15 else order
        nodes = [log_snr_step(at, path[row]) / h for row in history.recent[: most - 1]]
        # ∫ τ^k dρ with λ = λ_at + τ·h, so that dρ = −h·ρ_to·e^(h(1 − τ)) dτ
        moments = [
            -h * to.sigma * math.factorial(k) * phi(k + 1, -h) for k in range(1, len(nodes) + 1)
        ]
        rows.append(eps_row(i, at, to, weights(nodes, moments), history))
    return rows
