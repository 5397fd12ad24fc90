"""DDIM (Song et al. 2020, eq. 12 and 16)."""

import numpy as np

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.methods.levels import Columns, Float64Array, Source
from fastdiff.methods.registry import method


@method("ddim")
def ddim(source: Source, *, eta: float = 0.0, clipped_eps: bool) -> Columns:
    """x_prev = signal_prev·x_0 + √(noise_prev² − σ²)·ε + σ·z with ε = (x_t − signal·x_0)/noise.

    Args:
        source: the process's levels and what the network predicts.
        eta: σ is eta times the posterior's standard deviation: 0 deterministic, 1 the DDPM
            variance.
        clipped_eps: ε from the clipped x_0, as published; False: from the network's own output.

    Raises:
        InputError: a negative ``eta``, or one that leaves no room for ε.
    """
    levels = source.levels
    if not (is_finite(eta) and eta >= 0):
        raise InputError(f"eta is {eta!r}; expected ≥ 0 (0 deterministic, 1 the DDPM variance)")
    # σ² = η²·posterior_variance, so noise_prev² − σ² = noise_prev²·(1 − η²·transition/noise²).
    share = levels.transition_variance[1:] / levels.noise[1:] ** 2
    if (eta**2 * share > 1).any():
        largest = np.floor(1000 / np.sqrt(share.max())) / 1000
        raise InputError(
            f"eta is {eta}; this process allows at most {largest:.3f} "
            "(beyond, a step would add more noise than the level it arrives at)"
        )
    eps = levels.noise_prev * np.append(0.0, np.sqrt(1 - eta**2 * share))
    columns = {"sigma": eta * np.sqrt(levels.posterior_variance)}
    if clipped_eps:
        columns["c"] = levels.signal_prev - levels.signal / levels.noise * eps
        columns["d"] = eps / levels.noise
    else:  # ε from the unclipped a·x_t + b·output
        columns["c"] = levels.signal_prev
        columns["d"] = eps * _one_minus(levels.signal * source.a) / levels.noise
        columns["o"] = -eps * levels.signal * source.b / levels.noise
    return columns


def _one_minus(x: Float64Array) -> Float64Array:
    """1 − x, exactly zero where x = signal·(1/signal) is one up to rounding (ε-prediction)."""
    difference = 1 - x
    return np.where(np.abs(difference) < 4 * np.finfo(np.float64).eps, 0.0, difference)
