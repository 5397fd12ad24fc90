"""Timesteps at which a method's few steps come nearest to many: searched for one network.

The idea is that of "Align Your Steps" (Sabour et al. 2024, arXiv:2404.14507), which bounds the
error of stochastic solvers; here it is measured. From fixed x_T, samples of K levels are compared
with a fine solution of the same ODE, and the levels moved for as long as they get nearer.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import check_shape
from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array
from fastdiff.methods.protocol import check_process
from fastdiff.process.between import log_snr
from fastdiff.process.respacing import Respaced, distinct_steps
from fastdiff.sampling.network.network import Model
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.timesteps_file import MeasuredTimesteps

# From where the search begins: the best of these.
STARTS = ("uniform", "trailing", "exponential", "karras", "beta")
# Of Sampler's arguments those that say how a step is taken, as the fine solution takes them.
_FINE = {"method": "dpmsolver++", "eta": None, "method_options": None}
_FINE |= {"reuse": None, "guidance_reuse": None}
_FIRST_MOVE, _LAST_MOVE = 0.2, 1e-3  # of the logarithms of distances between levels
_LEAST_GAP = 1e-3  # of the whole range of λ, where a search begins

Progress = Callable[[int, float], object]


def measured_timesteps(
    model: Model,
    process: Respaced,
    steps: int,
    *,
    shape: Sequence[int],
    budget: int,
    method: str = "dpmsolver++",
    fine_steps: int = 200,
    seed: int = 0,
    rounded: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **sampler_arguments: Any,
) -> MeasuredTimesteps:
    """``steps`` timesteps of ``process`` whose samples are nearest to the fine solution's.

    The distance is the root mean square over all elements of N samples. Of the levels the noisiest
    stays the process's last step, from which x_T is drawn; all others are searched. With K gaps
    h_j between them in λ = log(signal / noise), from the best of ``STARTS``: Σ_m z_m·cos(π·m·(j +
    ½)/K), added to log h_j, is moved in one z_m after the other, from the smooth to the uneven, by
    steps that grow where they help and shrink where they do not.

    Args:
        model: as :class:`Sampler` takes it.
        process: a GaussianDiffusion, a VarianceExploding or an EDM.
        steps: how many, two or more.
        shape: (N, C, ...) of the samples whose errors are measured.
        budget: the most network calls, each of a batch of N: ``fine_steps`` for the solution, and
            the method's own for each trial. It is used up, unless no move helps any more.
        method: one without noise, as Sampler's.
        fine_steps: of the solution, by DPM-Solver++(2M), even in λ.
        seed: of x_T. The same seed finds the same timesteps.
        rounded: take whole steps only, for a network that is given integers.
        model_kwargs: as :meth:`Sampler.sample` takes it.
        uncond_kwargs: as :meth:`Sampler.sample` takes it.
        progress: called after each trial with the network calls so far and the least error.
        sampler_arguments: Sampler's others: method_options, guidance_scale, clip_denoised, …

    Raises InputError for arguments that do not fit, and a method that draws noise.
    """
    check_process(process, "respace", "prior_std", "grid")
    shape = check_shape(shape)
    if not isinstance(steps, int) or steps < 2:
        raise InputError(f"steps is {steps!r}; expected an integer, 2 or more, to have a choice")
    ends = sorted({0, len(process.timestep_map) - 1})
    sampler = Sampler(model, process, method=method, timesteps=ends, **sampler_arguments)
    if sampler.table.is_noisy:
        raise InputError(
            f"method {method!r} draws noise, so that its samples have no solution to be near to; "
            "expected one without, as 'ddim' or 'dpmsolver++'"
        )
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * process.prior_std
    kwargs = {"model_kwargs": model_kwargs, "uncond_kwargs": uncond_kwargs}
    trials = _Trials(sampler, noise, kwargs, budget, progress or (lambda calls, error: None))
    by_spacing: dict[str, float] = {}
    try:
        fine = process.respace(fine_steps, spacing="exponential", rounded=rounded)
        trials.solve(_own_timesteps(process, fine.timestep_map))
        starts = dict(_starts(process, steps, rounded))
        for spacing, timesteps in starts.items():
            by_spacing[spacing] = trials.error(timesteps)
        levels = _Levels.of(process, rounded)
        best = min(by_spacing, key=lambda spacing: by_spacing[spacing])
        _descend(levels, levels.gaps_of(starts[best]), trials.error)
    except _BudgetSpent:
        if not trials.errors:
            raise InputError(
                f"the budget is {budget} network calls; the fine solution takes {fine_steps} and "
                f"a trial {steps} or more: expected at least {fine_steps + steps}"
            ) from None
    timesteps, error = trials.best()
    return MeasuredTimesteps.of(
        process, timesteps, method=method, error=error, by_spacing=by_spacing, calls=trials.calls
    )


class _BudgetSpent(Exception):
    """The next trial would take more network calls than there are."""


@dataclass
class _Trials:
    """The errors of the timesteps that were tried, and the network calls that they took."""

    sampler: Sampler
    noise: Tensor
    kwargs: dict[str, Any]
    budget: int
    progress: Progress
    calls: int = 0
    errors: dict[tuple[float, ...], float] = field(default_factory=dict)
    solution: Tensor | None = None

    def solve(self, timesteps: list[float]) -> None:
        """Make that the solution which the fine method and the whole network have of them."""
        own = {name: getattr(self.sampler.settings, name) for name in _FINE}
        self.sampler.configure(**_FINE)
        self.solution = self._samples(timesteps)
        self.sampler.configure(**own)

    def error(self, timesteps: list[float]) -> float:
        """Of timesteps that were tried before without another network call."""
        key = tuple(timesteps)
        if key not in self.errors:
            assert self.solution is not None
            difference = self._samples(timesteps).double() - self.solution.double()
            self.errors[key] = difference.square().mean().sqrt().item()
            self.progress(self.calls, min(self.errors.values()))
        return self.errors[key]

    def best(self) -> tuple[list[float], float]:
        timesteps = min(self.errors, key=lambda key: self.errors[key])
        return list(timesteps), self.errors[timesteps]

    def _samples(self, timesteps: list[float]) -> Tensor:
        self.sampler.configure(timesteps=timesteps)
        calls = self.calls + len(self.sampler.table)
        if calls > self.budget:
            raise _BudgetSpent
        self.calls = calls
        return self.sampler.sample(self.noise.shape, noise=self.noise, **self.kwargs)


@dataclass(frozen=True)
class _Levels:
    """Timesteps as the gaps between their λ, (K − 1,), counted from the noisiest finite level.

    ``least`` and ``most``: the range of λ. ``without_signal``: the process's last step has λ = −∞;
    it is taken, and the first gap leads from ``least`` to the level after it.
    """

    process: Respaced
    least: float
    most: float
    without_signal: bool
    rounded: bool

    @classmethod
    def of(cls, process: Respaced, rounded: bool) -> "_Levels":
        levels = log_snr(process)
        finite = levels[np.isfinite(levels)]
        return cls(process, finite[-1], finite[0], bool(np.isneginf(levels[-1])), rounded)

    def gaps_of(self, timesteps: list[float]) -> Float64Array:
        noisiest_first = log_snr(self.process.respace(timesteps=timesteps))[::-1]
        gaps = np.diff(noisiest_first[1:], prepend=self.least)
        return np.maximum(gaps, _LEAST_GAP * (self.most - self.least))

    def timesteps_of(self, gaps: Float64Array) -> list[float]:
        """Gaps that lead beyond the last level are shortened alike."""
        shortened = gaps * min(1.0, (self.most - self.least) / gaps.sum())
        first = -math.inf if self.without_signal else self.least
        levels = np.append(first, self.least + np.cumsum(shortened))
        there = self.process.at_log_snr(levels.clip(max=self.most)).timestep_map
        timesteps = _own_timesteps(self.process, there)
        if not self.rounded:
            return timesteps
        nearest = np.round(timesteps).astype(np.int64)
        return distinct_steps(nearest, len(self.process.timestep_map)).tolist()


def _descend(levels: _Levels, gaps: Float64Array, error: Callable[[list[float]], float]) -> None:
    """Move the gaps' logarithms along one cosine after the other until no move helps."""

    def error_of(z: Float64Array) -> float:
        return math.log(max(error(levels.timesteps_of(gaps * np.exp(waves @ z))), 1e-300))

    count = len(gaps)
    j, m = np.arange(count)[:, None] + 0.5, np.arange(count)
    waves = np.cos(np.pi * m * j / count)
    place, moves = np.zeros(count), np.full(count, _FIRST_MOVE)
    least = error_of(place)
    while np.abs(moves).max() > _LAST_MOVE:
        for wave, direction in enumerate(np.eye(count)):
            ahead = error_of(place + moves[wave] * direction)
            behind = math.inf if ahead < least else error_of(place - moves[wave] * direction)
            if min(ahead, behind) < least:
                moves[wave] *= 1.0 if ahead < least else -1.0
                place, least = place + moves[wave] * direction, min(ahead, behind)
                moves[wave] *= 1.5
                continue
            # The least of the parabola through the three.
            curvature = ahead + behind - 2 * least
            if curvature > 0:
                between = place + 0.5 * (behind - ahead) / curvature * moves[wave] * direction
                found = error_of(between)
                if found < least:
                    place, least = between, found
            moves[wave] *= 0.5


def _starts(process: Respaced, steps: int, rounded: bool) -> Iterator[tuple[str, list[float]]]:
    """Timesteps by spacing, all of which take the process's last step. InputError for more whole
    steps than there are."""
    for spacing in STARTS:
        of_steps = spacing in ("uniform", "trailing")
        if steps <= len(process.timestep_map) or not of_steps:
            strided = process.respace(steps, spacing=spacing, rounded=rounded)
            yield spacing, _own_timesteps(process, strided.timestep_map)


def _own_timesteps(process: Respaced, timestep_map: np.ndarray) -> list[float]:
    """Timesteps of the whole process as fractions of the steps of this one, to nine decimals: what
    rounding leaves of a whole step is that step."""
    own = np.arange(len(process.timestep_map), dtype=np.float64)
    return np.round(np.interp(timestep_map, process.timestep_map, own), 9).tolist()
