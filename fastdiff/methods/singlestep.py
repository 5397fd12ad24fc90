"""DPM-Solver++(2S) and (3S), on the process's own steps (Lu et al. 2022, arXiv:2211.01095)."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from fastdiff.methods.legs import Leg, ancestral
from fastdiff.methods.levels import Level, Source
from fastdiff.methods.registry import method
from fastdiff.methods.rows import Row, log_snr_step, phi


@method("dpmsolver++2s")
def dpmsolver_2s(source: Source, *, eta: float = 0.0) -> list[Row]:
    """DPM-Solver++(2S) (algorithm 1), a step of second order for every two of the process's steps.

    K steps are K network calls: the middle of each is the process's step there, whatever its r. The
    last call, to the data, is of first order, and so is the one before where K is even.

    Args:
        source: the process's levels and what the network predicts.
        eta: the share of noise that is added where a step ends: 0 deterministic, 1 the DDPM
            variance.

    Raises:
        InputError: an ``eta`` that is no share.
    """
    return _rows(source, 2, eta)


@method("dpmsolver++3s")
def dpmsolver_3s(source: Source, *, eta: float = 0.0) -> list[Row]:
    """DPM-Solver++(3S), a step of third order for every three of the process's steps.

    As arXiv:2206.00927's DPM-Solver-3 (algorithm 2) in x_0, on given steps; the second of the
    points within is reached by (2S)'s step, as in diffusers: the authors weigh by φ_2 there, which
    is the same to the order that is needed. Before the last call, to the data, what is left of K by
    three is of second or first order.

    Args:
        source: the process's levels and what the network predicts.
        eta: the share of noise that is added where a step ends: 0 deterministic, 1 the DDPM
            variance.

    Raises:
        InputError: an ``eta`` that is no share.
    """
    return _rows(source, 3, eta)


def _rows(source: Source, order: int, eta: float) -> list[Row]:
    path = source.path
    sizes = _sizes(len(source.steps), order, without_signal=path[0].signal == 0)
    ends = [0, *accumulate(sizes)]
    legs = ancestral([path[i] for i in ends], eta)
    rows: list[Row] = []
    for leg, (begin, end) in zip(legs, pairwise(ends), strict=True):
        points = path[begin + 1 : end]
        rows += leg.rows(points, _weights(leg, points))
    return rows


def _sizes(steps: int, order: int, *, without_signal: bool) -> list[int]:
    """How many network calls each step takes: ``order`` as long as there are so many, the rest
    together, and the last alone; also the first, where λ is −∞ and no part of the way r of it."""
    first = [1] if without_signal and steps > 1 else []
    whole, rest = divmod(steps - len(first) - 1, order)
    return [*first, *[order] * whole, *([rest] if rest else []), 1]


def _weights(leg: Leg, points: Sequence[Level]) -> list[list[float]]:
    """Of the answers at ``points``, for the way to each point and to the end.

    (2S): 1 / 2r, r = (λ_point − λ) / h with h = λ_to − λ. (3S): the second point as (2S) would
    reach it; at the end φ_2 / (r·φ_1) of the second point, nothing of the first.
    """
    h = [log_snr_step(leg.at, point) for point in (*points, leg.to)]
    if len(points) == 0:
        return []
    if len(points) == 1:
        return [[h[1] / (2 * h[0])]]
    last = h[2] / h[1] * phi(2, h[2]) / phi(1, h[2])
    return [[h[1] / (2 * h[0])], [0.0, last]]
