"""DPM-Solver-2 in σ, a midpoint method (Lu et al. 2022, arXiv:2206.00927, algorithm 1;
crowsonkb/k-diffusion's ``dpm_2``)."""

import math

from fastdiff.methods.legs import Leg, ancestral, at_sigmas, churned
from fastdiff.methods.levels import Source
from fastdiff.methods.registry import method
from fastdiff.methods.rows import Row


@method("dpm_2")
def dpm_2(
    source: Source,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> list[Row]:
    """The whole step by the ε of its middle in λ = −log σ: second order, two network calls a step.

    K steps are 2K − 1 calls, as Heun's. Every middle lies between two of the process's steps.

    Args:
        source: the process's levels and what the network predicts.
        s_churn: how much noise is added and removed again, over all steps; 0 none.
        s_tmin: churn only where σ is at least this.
        s_tmax: and at most this.
        s_noise: what the added noise is multiplied by.

    Raises:
        InputError: a negative ``s_churn`` or ``s_noise``; a process without levels between its
            steps.
    """
    return _midpoint_rows(source, churned(source, s_churn, s_tmin, s_tmax, s_noise))


@method("dpm_2_ancestral")
def dpm_2_ancestral(source: Source, *, eta: float = 1.0, s_noise: float = 1.0) -> list[Row]:
    """The same step to σ_down, then noise up to the next level: k-diffusion's ``dpm_2_ancestral``.

    Args:
        source: the process's levels and what the network predicts.
        eta: the share of noise: 0 deterministic, 1 the DDPM variance.
        s_noise: what the added noise is multiplied by.

    Raises:
        InputError: an ``eta`` that is no share, a negative ``s_noise``, and a process without
            levels between its steps.
    """
    return _midpoint_rows(source, ancestral(source.path, eta, s_noise))


def _midpoint_rows(source: Source, legs: list[Leg]) -> list[Row]:
    """x' = x + (σ' − σ)·dx/dσ at σ_m = √(σ·σ'), x being x / signal: of the two x_0 that of the
    middle weighs σ / σ_m."""
    halved = [leg for leg in legs if not leg.is_first_order]
    middles = iter(at_sigmas(source, [math.sqrt(leg.at.sigma * leg.to.sigma) for leg in halved]))
    rows: list[Row] = []
    for leg in legs:
        if leg.is_first_order:
            rows += leg.rows()
        else:
            middle = next(middles)
            rows += leg.rows([middle], [[leg.at.sigma / middle.sigma]])
    return rows
