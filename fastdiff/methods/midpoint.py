"""Methods that ask the network in the middle, in λ = −log σ, of every step: two calls a step.

K steps are 2K − 1 calls, as Heun's. Every middle lies between two of the process's steps; of an
ancestral step with eta 1 it is the next of them, as σ_at·σ_down is σ_next² there. Names are those
of crowsonkb/k-diffusion.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from fastdiff.methods.legs import Leg, ancestral, at_sigmas, churned
from fastdiff.methods.levels import Level, Source
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
    """DPM-Solver-2 in σ: the whole step by the ε of its middle, x' = x + (σ' − σ)·dx/dσ there, x
    being x / signal (Lu et al. 2022, arXiv:2206.00927, algorithm 1).

    Args:
        source: the process's levels and what the network predicts.
        s_churn: how much noise is added and removed again, over all steps; 0 none.
        s_tmin: churn only where σ is at least this.
        s_tmax: and at most this.
        s_noise: what the added noise is multiplied by.

    Raises:
        InputError: what is no number of at least 0; a process without levels between its steps.
    """
    return _rows(source, churned(source, s_churn, s_tmin, s_tmax, s_noise), _by_eps)


@method("dpm_2_ancestral")
def dpm_2_ancestral(source: Source, *, eta: float = 1.0, s_noise: float = 1.0) -> list[Row]:
    """The same step to σ_down, then noise up to the next level.

    Args:
        source: the process's levels and what the network predicts.
        eta: the share of noise: 0 deterministic, 1 the DDPM variance.
        s_noise: what the added noise is multiplied by.

    Raises:
        InputError: an ``eta`` that is no share, a negative ``s_noise``, and a process without
            levels between its steps.
    """
    return _rows(source, ancestral(source.path, eta, s_noise), _by_eps)


@method("dpmsolver++2s_ancestral")
def dpmsolver_2s_ancestral(source: Source, *, eta: float = 1.0, s_noise: float = 1.0) -> list[Row]:
    """DPM-Solver++(2S) with r = ½, the whole step by the x_0 of its middle, to σ_down, then noise
    up to the next level (Lu et al. 2022, arXiv:2211.01095, algorithm 1).

    Args:
        source: the process's levels and what the network predicts.
        eta: the share of noise: 0 deterministic, 1 the DDPM variance.
        s_noise: what the added noise is multiplied by.

    Raises:
        InputError: an ``eta`` that is no share, a negative ``s_noise``, and a process without
            levels between its steps.
    """
    return _rows(source, ancestral(source.path, eta, s_noise), _by_x_start)


@method("sde-dpmsolver++2s")
def sde_dpmsolver_2s(source: Source, *, eta: float = 1.0, s_noise: float = 1.0) -> list[Row]:
    """The same step whose middle is reached with noise too: k-diffusion's ``dpmpp_sde``, r = ½.

    One Brownian motion W over σ adds both noises, so the share ρ of the second is the first's.

    Args:
        source: the process's levels and what the network predicts.
        eta: the share of noise: 0 deterministic, 1 the DDPM variance.
        s_noise: what the added noise is multiplied by.

    Raises:
        InputError: an ``eta`` that is no share, a negative ``s_noise``, and a process without
            levels between its steps.
    """
    legs = ancestral(source.path, eta, s_noise)
    whole = [leg for leg in legs if not leg.is_first_order]
    middles = at_sigmas(source, [math.sqrt(leg.at.sigma * leg.next.sigma) for leg in whole])
    halves = dict(zip(whole, middles, strict=True))
    rows: list[Row] = []
    for leg in legs:
        rows += _with_noisy_middle(leg, halves[leg], eta) if leg in halves else leg.rows()
    return rows


def _with_noisy_middle(leg: Leg, middle: Level, eta: float) -> list[Row]:
    """x_m = c_m·x_0 + d_m·x + s_m·z and x' = c·x_0' + d·x + s·(ρ·z + √(1 − ρ²)·z').

    z is what x_m tells of it, (x_m − c_m·x_0 − d_m·x) / s_m, so that what the first row keeps is
    d·x − (ρ·s / s_m)·(c_m·x_0 + d_m·x). ρ² = (σ − σ_m) / (σ − σ').
    """
    (half,) = ancestral([leg.at, middle], eta, leg.s_noise)
    (first,), (second,) = half.rows(), leg.rows()
    sigma = leg.at.sigma
    shared = math.sqrt((sigma - middle.sigma) / (sigma - leg.next.sigma))
    gain = shared * second.sigma / first.sigma if first.sigma else 0.0
    return [
        replace(first, slot=0, k=-gain * first.c, q=second.d - gain * first.d),
        Row(
            middle,
            c=second.c,
            d=gain,
            e=(1.0, 0.0, 0.0),
            sigma=second.sigma * math.sqrt(1 - shared**2),
            begins=False,
        ),
    ]


def _by_eps(leg: Leg, middle: Level) -> float:
    """What the x_0 of the middle weighs where ε stands for the whole step."""
    return leg.at.sigma / middle.sigma


def _by_x_start(leg: Leg, middle: Level) -> float:
    return 1.0


def _rows(source: Source, legs: list[Leg], weight: Callable[[Leg, Level], float]) -> list[Row]:
    """``weight``: of the x_0 that is found at the middle; one less it is that of the first x_0."""
    halved = [leg for leg in legs if not leg.is_first_order]
    middles = iter(at_sigmas(source, [math.sqrt(leg.at.sigma * leg.to.sigma) for leg in halved]))
    rows: list[Row] = []
    for leg in legs:
        if leg.is_first_order:
            rows += leg.rows()
        else:
            middle = next(middles)
            rows += leg.rows([middle], [[weight(leg, middle)]])
    return rows
