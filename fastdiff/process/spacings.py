"""Noise levels spread from a process's first step to its last by a rule of the levels themselves.

Most are of σ = noise / signal = e^−λ, so they name levels between the steps. Sources: Karras et al.
2022 (arXiv:2206.00364) eq. 5; Lee et al. 2024 (arXiv:2407.12173), of the timesteps; k-diffusion's
``get_sigmas_exponential`` and ``get_sigmas_polyexponential``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np

from fastdiff.checks import check_positive
from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array
from fastdiff.process.between import Grid

_CLOSEST = 1e-9  # in λ: levels closer than this are one
_LARGEST_SHAPE = 100.0  # of a beta distribution: all levels are close long before


@dataclass(frozen=True)
class Span:
    """The timesteps from ``first`` to ``last`` of a grid, and λ at these."""

    grid: Grid
    first: float
    last: float

    @property
    def log_snr(self) -> Float64Array:
        """λ at ``first`` and at ``last``, (2,)."""
        return self.grid.log_snr_at(np.array([self.first, self.last]))


# Each from places (K,) in 0 … 1, 0 the least noisy, to λ (K,), falling; keywords are its options.


def karras(places: Float64Array, span: Span, *, rho: float = 7.0) -> Float64Array:
    """σ^(1/rho) is linear: the larger rho, the more of the steps are at small noise."""
    check_positive("rho", rho)
    least, most = np.exp(-span.log_snr / rho)
    return -rho * np.log(least + places * (most - least))


def exponential(places: Float64Array, span: Span) -> Float64Array:
    """λ = −log σ is linear: DPM-Solver's ``skip_type="logSNR"``."""
    return polynomial(places, span, rho=1.0)


def polynomial(places: Float64Array, span: Span, *, rho: float = 1.0) -> Float64Array:
    """λ falls as place^rho: with rho above 1 close levels are at small noise, below 1 at large."""
    check_positive("rho", rho)
    least_noisy, noisiest = span.log_snr
    return least_noisy + places**rho * (noisiest - least_noisy)


def beta(
    places: Float64Array, span: Span, *, alpha: float = 0.6, beta: float = 0.6
) -> Float64Array:
    """Timesteps at the quantiles of Beta(alpha, beta): with both below 1, close at both ends."""
    check_positive("alpha", alpha)
    check_positive("beta", beta)
    if max(alpha, beta) > _LARGEST_SHAPE:
        raise InputError(
            f"alpha is {alpha} and beta {beta}; expected at most {_LARGEST_SHAPE:g} of each"
        )
    timesteps = span.first + beta_quantile(places, alpha, beta) * (span.last - span.first)
    return span.grid.log_snr_at(timesteps)


LEVEL_SPACINGS: dict[str, Callable[..., Float64Array]] = {
    spacing.__name__: spacing for spacing in (karras, exponential, polynomial, beta)
}


def spacing_options(spacing: str) -> tuple[str, ...]:
    """The names of ``respace``'s arguments that this spacing has."""
    return (*_options(spacing), "rounded") if spacing in LEVEL_SPACINGS else ()


def check_options(spacing: str, options: Mapping[str, Any]) -> None:
    """InputError for an option that ``spacing`` has not."""
    for name, value in options.items():
        owners = [known for known in LEVEL_SPACINGS if name in _options(known)]
        if spacing not in owners:
            whose = " or ".join(map(repr, owners)) or "none that there is"
            raise InputError(f"{name}={value!r} belongs to spacing {whose}, not to {spacing!r}")


def spread(span: Span, count: int, spacing: str, options: Mapping[str, Any]) -> Float64Array:
    """λ (``count``,), falling, of levels by one of LEVEL_SPACINGS; both ends of ``span`` are taken,
    of one level the noisiest.

    A last step without signal is taken, and the others are spread over the rest. Raises InputError
    for options that are none of the spacing's, and for levels that do not all differ.
    """
    check_options(spacing, options)
    noisiest = span.log_snr[1]
    if count == 1:  # sampling has to start from noise
        return np.array([noisiest])
    if np.isneginf(noisiest):
        known = span.grid.timesteps[np.isfinite(span.grid.log_snr)]
        before = Span(span.grid, span.first, known[-1])
        return np.append(spread(before, count - 1, spacing, options), noisiest)
    with np.errstate(all="ignore"):  # what comes of it is looked at
        levels = LEVEL_SPACINGS[spacing](np.linspace(0.0, 1.0, count), span, **options)
    if not (np.isfinite(levels).all() and (np.diff(levels) < -_CLOSEST).all()):
        given = "".join(f", {name}={value}" for name, value in options.items())
        raise InputError(
            f"{count} levels by spacing {spacing!r}{given} do not all differ; expected fewer steps"
            + (", or options nearer to its own" if options else "")
        )
    return levels


def _options(spacing: str) -> list[str]:
    return list(signature(LEVEL_SPACINGS[spacing]).parameters)[2:]


def beta_quantile(p: Float64Array, alpha: float, beta: float) -> Float64Array:
    """x (K,) with I_x(alpha, beta) = p, the distribution function of Beta(alpha, beta); p in 0 … 1.

    A rounding of what is exact for a p within 1e-13 of itself, or of 1 where x is above ½.
    """
    half = np.array([0.5])
    below, above = (beta_probability(half, *shape)[0] for shape in ((alpha, beta), (beta, alpha)))
    lower = _lower_quantile(np.minimum(p, below), alpha, beta)
    upper = _lower_quantile(np.minimum(1.0 - p, above), beta, alpha)
    return np.where(p <= below, lower, 1.0 - upper)


def beta_probability(x: Float64Array, alpha: float, beta: float) -> Float64Array:
    """I_x(alpha, beta) at x (K,) ≤ ½, where its series converges fast (DLMF 8.17.8):
    x^α·(1 − x)^β / (α·B(α, β)) · Σ_n (α + β)_n / (α + 1)_n · x^n, all of one sign."""
    term, total, n = np.ones_like(x), np.ones_like(x), 0
    while (term > np.finfo(np.float64).eps / 8 * total).any():
        term = term * x * (alpha + beta + n) / (alpha + 1 + n)
        total, n = total + term, n + 1
    return x**alpha * (1 - x) ** beta * total / (alpha * _beta_function(alpha, beta))


def _lower_quantile(p: Float64Array, alpha: float, beta: float) -> Float64Array:
    """x ≤ ½ by bisection in x^α, of which the distribution function is nearly linear: between what
    its slope at 0 and its mean slope up to ½ give."""
    most = 0.5**alpha
    slopes = (
        1 / (alpha * _beta_function(alpha, beta)),
        beta_probability(np.array([0.5]), alpha, beta)[0] / most,
    )
    low, high = np.minimum(p / max(slopes), most), np.minimum(p / min(slopes), most)
    for _ in range(60):
        middle = 0.5 * (low + high)
        too_low = beta_probability(middle ** (1 / alpha), alpha, beta) < p
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    return high ** (1 / alpha)


def _beta_function(alpha: float, beta: float) -> float:
    return math.exp(math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta))
