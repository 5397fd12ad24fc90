"""Power-function averages of weights, and any other of them made of snapshots of a few.

The average of exponent gamma weighs the weights of time tau, up to its own time t, by

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    beta_t = (1 - 1/t)^(gamma + 1).

Its memory is a share of the run: the profile's standard deviation is sigma_rel·t. beta_1 is 0, so
nothing of the untrained weights is ever in it.

Source: Karras et al. 2024, arXiv:2312.02696, section 3.1 and appendix C. The equations are written
anew from the paper.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdiff.errors import InputError

WIDEST = 12**-0.5  # gamma = 0: the plain mean of all steps


def exponent(sigma_rel: float) -> float:
    """gamma of a profile whose standard deviation is ``sigma_rel`` of the time so far.

    sigma_rel² = (gamma + 1) / ((gamma + 2)² (gamma + 3)), solved for its root above 0.

    Raises:
        InputError: not strictly between 0 and 0.288 (12^-½), where gamma is 0.
    """
    if not 0 < sigma_rel < WIDEST:
        raise InputError(f"sigma_rel is {sigma_rel!r}, expected a number between 0 and 0.288")
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


def relative_width(gamma: float) -> float:
    """sigma_rel of a power function; the inverse of ``exponent``."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def share_of_newest(gamma: float, step: int) -> float:
    """1 − beta: what the weights of ``step``, the first is 1, have in its average."""
    if step == 1:
        return 1.0
    return -math.expm1((gamma + 1) * math.log1p(-1 / step))  # 1 − beta without its rounding


def coefficients(
    snapshots: Sequence[tuple[float, float]], step: float, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """The sum of snapshots whose profile is nearest to a power function's (least squares).

    Args:
        snapshots: (step, sigma_rel) of each, no two alike.
        step: of the average that is wanted.
        sigma_rel: of the average that is wanted.

    Returns:
        The factor of each snapshot, float64 (n,), with a sum of 1; and how far the profile is off,
        as a share of its norm.

    Raises:
        InputError: a sigma_rel out of range.

    Source: appendix C.3; factors are scaled to a sum of 1, as the authors' code does.
    """
    times = np.array([time for time, _ in snapshots], dtype=np.float64)
    gammas = np.array([exponent(width) for _, width in snapshots])
    gamma = exponent(sigma_rel)
    norms = np.sqrt(_product(times, gammas, times, gammas))
    norm = math.sqrt(_product(step, gamma, step, gamma))
    # Of profiles scaled to norm 1: those of late snapshots are small, and count as much.
    among = _product(times[:, None], gammas[:, None], times, gammas) / (norms[:, None] * norms)
    wanted = _product(times, gammas, float(step), gamma) / (norms * norm)
    factors = np.linalg.lstsq(among, wanted, rcond=None)[0] / norms
    factors /= factors.sum()
    scaled = factors * norms / norm
    squared = 1 - 2 * scaled @ wanted + scaled @ among @ scaled
    return factors, math.sqrt(max(0.0, squared))


def _product(time: Any, gamma: Any, other_time: Any, other_gamma: Any) -> Any:
    """The integral of two profiles' product: (g+1)(h+1) / (g+h+1) / max(t, u) · (min/max)^…,
    the exponent that of the later profile."""
    ratio = time / other_time
    power = ratio ** np.where(ratio < 1, other_gamma, -np.asarray(gamma))
    return (
        (gamma + 1)
        * (other_gamma + 1)
        * power
        / ((gamma + other_gamma + 1) * np.maximum(time, other_time))
    )
