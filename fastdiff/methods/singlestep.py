"""DPM-Solver++(2S) and (3S), on the process's own steps (Lu et al. 2022, arXiv:2211.01095)."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from fastdiff.errors import InputError
from fastdiff.methods.dpmsolver import SOLVER_TYPES
from fastdiff.methods.legs import Leg, ancestral
from fastdiff.methods.levels import Level, Source
from fastdiff.methods.registry import method
from fastdiff.methods.rows import Row, log_snr_step, phi


@method("dpmsolver++2s")
def dpmsolver_2s(source: Source, *, eta: float = 0.0, solver_type: str = "midpoint") -> list[Row]:
    """DPM-Solver++(2S) (algorithm 1), a step of second order for every two of the process's steps.

    Options as of ``_rows``.
    """
    return _rows(source, 2, eta, solver_type)


@method("dpmsolver++3s")
def dpmsolver_3s(source: Source, *, eta: float = 0.0, solver_type: str = "midpoint") -> list[Row]:
    """DPM-Solver++(3S), a step of third order for every three of the process's steps:
    arXiv:2206.00927's DPM-Solver-3 (algorithm 2) in x_0.

    That is the order where the steps are even in λ, as the authors choose them; elsewhere, and with
    ``eta``, which moves the end, it is the second. Options as of ``_rows``.
    """
    return _rows(source, 3, eta, solver_type)


def _rows(source: Source, order: int, eta: float, solver_type: str) -> list[Row]:
    """K steps are K network calls: what lies within a solver's step are the process's steps there,
    whatever part of the way they are. The last call, to the data, is of first order, so is one from
    or to a level without signal, and what is left of K between them makes one step of lower order.

    Args:
        source: the process's levels and what the network predicts.
        order: how many of the process's steps a solver's step takes.
        eta: the share of noise that is added where a solver's step ends: 0 deterministic, 1 the
            DDPM variance.
        solver_type: how x_0's change is weighed, in diffusers' words: "midpoint" or "heun".

    Raises:
        InputError: an ``eta`` that is no share, another ``solver_type``.
    """
    if solver_type not in SOLVER_TYPES:
        raise InputError(f"solver_type is {solver_type!r}; expected {' or '.join(SOLVER_TYPES)}")
    path = source.path
    sizes = _sizes(source, order)
    ends = [0, *accumulate(sizes)]
    legs = ancestral([path[i] for i in ends], eta)
    rows: list[Row] = []
    for leg, (begin, end) in zip(legs, pairwise(ends), strict=True):
        points = path[begin + 1 : end]
        rows += leg.rows(points, _weights(leg, points, solver_type))
    return rows


def _sizes(source: Source, order: int) -> list[int]:
    """How many network calls each step takes: ``order`` as long as there are so many, and the rest
    together; one alone at either end where λ is infinite, and no part of the way r of it."""
    calls = len(source.steps)
    last = [1] if math.isinf(source.path[-1].log_snr) else []
    first = [1] if math.isinf(source.path[0].log_snr) and calls > len(last) else []
    whole, rest = divmod(calls - len(first) - len(last), order)
    return [*first, *[order] * whole, *([rest] if rest else []), *last]


def _weights(leg: Leg, points: Sequence[Level], solver_type: str) -> list[list[float]]:
    """Of the answers at ``points``, for the way to each point and to the end."""
    h = [log_snr_step(leg.at, point) for point in (*points, leg.to)]
    if len(h) == 1:
        return []
    first = [_second_order(h[0], h[1], solver_type)]
    return [first] if len(h) == 2 else [first, _third_order(h[0], h[1], h[2], solver_type)]


def _second_order(h_1: float, h: float, solver_type: str) -> float:
    """What the x_0 found h_1 = r·h on the way weighs: 1 / 2r by "midpoint", by "heun" the exact
    integral of x_0 linear in λ, φ_2 / (φ_1·r)."""
    share = 0.5 if solver_type == "midpoint" else phi(2, h) / phi(1, h)
    return share * h / h_1


def _third_order(h_1: float, h_2: float, h: float, solver_type: str) -> list[float]:
    """Of the two found r_1·h and r_2·h on the way: by "midpoint" only the second, as if x_0 were
    linear in λ; by "heun" both, the exact integral of a parabola."""
    r_1, r_2 = h_1 / h, h_2 / h
    slope, bend = phi(2, h) / phi(1, h), phi(3, h) / phi(1, h)
    if solver_type == "midpoint":
        return [0.0, slope / r_2]
    return [
        (slope * r_2 - 2 * bend) / (r_1 * (r_2 - r_1)),
        (2 * bend - slope * r_1) / (r_2 * (r_2 - r_1)),
    ]
