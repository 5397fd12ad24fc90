"""Euler's method in σ = noise / signal, and its ancestral form (Karras et al. 2022,
arXiv:2206.00364; crowsonkb/k-diffusion)."""

import math

from fastdiff.methods.legs import Leg, ancestral, churned
from fastdiff.methods.levels import Source
from fastdiff.methods.registry import method
from fastdiff.methods.rows import Row


@method("euler")
def euler(
    source: Source,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> list[Row]:
    """Algorithm 2 of arXiv:2206.00364 without its correction: DDIM's step, one network call a step.

    Args:
        source: the process's levels and what the network predicts.
        s_churn: how much noise is added and removed again, over all steps; 0 none. Its levels lie
            between the process's steps.
        s_tmin: churn only where σ is at least this.
        s_tmax: and at most this.
        s_noise: what the added noise is multiplied by.

    Raises:
        InputError: what is no number of at least 0; churn by a process without such levels.
    """
    return euler_rows(churned(source, s_churn, s_tmin, s_tmax, s_noise))


@method("euler_ancestral")
def euler_ancestral(source: Source, *, eta: float = 1.0, s_noise: float = 1.0) -> list[Row]:
    """Euler's step to σ_down, then noise up to the next level: k-diffusion's ``euler_ancestral``.

    Args:
        source: the process's levels and what the network predicts.
        eta: the share of noise: 0 deterministic, 1 the DDPM variance.
        s_noise: what the added noise is multiplied by.

    Raises:
        InputError: an ``eta`` that is no share, a negative ``s_noise``.
    """
    return euler_rows(ancestral(source.path, eta, s_noise))


def euler_rows(legs: list[Leg]) -> list[Row]:
    """x' = x + (σ' − σ)·dx/dσ, x being x / signal."""
    return [row for leg in legs for row in leg.rows()]
