"""Heun's method in σ = noise / signal, with churn or with restarts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.methods.legs import Leg, at_sigmas, check_not_negative, churned
from fastdiff.methods.levels import Level, Source
from fastdiff.methods.registry import method
from fastdiff.methods.rows import Row

Restart = tuple[float, float, int, int]  # (t_min, t_max, levels, times)
_RHO = 7.0  # of the levels of a restart


@method("heun")
def heun(
    source: Source,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> list[Row]:
    """Algorithm 2 of Karras et al. 2022 (arXiv:2206.00364): second order, two network calls a step.

    K steps are 2K − 1 calls: the last step is Euler's. So is a step from a level without signal.

    Args:
        source: the process's levels and what the network predicts.
        s_churn: how much noise is added and removed again, over all steps; 0 none. Its levels lie
            between the process's steps. The paper's best for ImageNet was 40 at 256 steps.
        s_tmin: churn only where σ is at least this (there 0.05).
        s_tmax: and at most this (there 50).
        s_noise: what the added noise is multiplied by (there 1.003).

    Raises:
        InputError: what is no number of at least 0; churn by a process without such levels.
    """
    return heun_rows(churned(source, s_churn, s_tmin, s_tmax, s_noise))


@method("restart")
def restart(
    source: Source,
    *,
    restarts: Sequence[Restart] = ((0.06, 0.3, 3, 2),),
    s_noise: float = 1.0,
) -> list[Row]:
    """Heun's method that goes back up by fresh noise and down again (Xu et al. 2023,
    arXiv:2306.14878, algorithm 1).

    Having come down to t_min, noise takes x to t_max, from where ``levels`` levels, both ends
    counted and even in σ^(1/7), lead down again; this is done ``times`` times: 2·(levels − 1)·times
    network calls more than "heun".

    Args:
        source: the process's levels and what the network predicts.
        restarts: (t_min, t_max, levels, times) of each, in σ. t_min is moved to the nearest of the
            process's steps below t_max, as published. Those that have no part in the path are left
            out: x never was as noisy as t_max (as after a late start), or is not led below it. The
            default is the published one for CIFAR-10 at 18 steps.
        s_noise: what the added noise is multiplied by.

    Raises:
        InputError: what is no such tuple, a negative ``s_noise``; a process without levels between
            its steps.
    """
    check_not_negative("s_noise", s_noise)
    if not isinstance(restarts, Iterable):
        raise InputError(
            f"restarts is {restarts!r}; expected a list of (t_min, t_max, levels, times)"
        )
    legs = [Leg(at, to, to) for at, to in pairwise(source.path)]
    for t_min, t_max, levels, times in map(_checked, restarts):
        reached = [level for level in source.steps[1:] if level.sigma < t_max]
        if not reached or t_max > source.steps[0].sigma:
            continue
        low = min(reached, key=lambda level: abs(level.sigma - t_min))
        last = max(i for i, leg in enumerate(legs) if leg.to == low)
        again = _downward(source, low, t_max, levels)
        for _ in range(times):
            legs[last] = replace(legs[last], next=again[0].at, s_noise=s_noise)
            legs[last + 1 : last + 1] = again
            last += len(again)
    return heun_rows(legs)


def heun_rows(legs: Sequence[Leg]) -> list[Row]:
    """x' = x + (σ' − σ)·½·(dx/dσ there + dx/dσ where Euler's step leads), x being x / signal: of
    the two x_0 the second weighs σ / 2σ'."""
    rows: list[Row] = []
    for leg in legs:
        if leg.is_first_order:
            rows += leg.rows()
        else:
            rows += leg.rows([leg.to], [[leg.at.sigma / (2 * leg.to.sigma)]])
    return rows


def _downward(source: Source, low: Level, t_max: float, levels: int) -> list[Leg]:
    """The legs from t_max to ``low``, levels even in σ^(1/ρ) (arXiv:2206.00364, eq. 5)."""
    ends = t_max ** (1 / _RHO), low.sigma ** (1 / _RHO)
    *sigmas, _ = np.linspace(*ends, levels) ** _RHO
    path = [*at_sigmas(source, [float(t_max), *map(float, sigmas[1:])]), low]
    return [Leg(at, to, to) for at, to in pairwise(path)]


def _checked(given: Restart) -> Restart:
    try:
        t_min, t_max, levels, times = given
        fits = is_finite(t_min) and is_finite(t_max) and 0 < t_min < t_max
        fits = fits and levels == int(levels) >= 2 and times == int(times) >= 1
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(
            f"a restart is {given!r}; expected (t_min, t_max, levels, times) with "
            "0 < t_min < t_max, 2 levels or more and times of 1 or more"
        )
    return t_min, t_max, int(levels), int(times)
