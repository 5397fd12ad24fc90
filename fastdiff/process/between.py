"""Noise levels between the steps of a process: t and λ = log(signal / noise), each by the other.

From a step to the next λ is linear in t, as in diffusers' and k-diffusion's ``sigma_to_t``, so that
the network's timestep at a level is the t with that λ, to the bit at the steps themselves.
DPM-Solver's NoiseScheduleVP takes log(signal) as linear instead, which says nothing where the
signal is constant (variance-exploding processes); of 1,000 linear steps the two are at most 0.1
of a step apart, between steps 0 and 1, and 0.01 beyond step 20.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array
from fastdiff.methods.protocol import Process, noise_levels

# In λ: how far beyond either end a level may be that a method has rounded, and that is the end.
_ROUNDING = 1e-6


def log_snr(process: Process) -> Float64Array:
    """λ = log(signal / noise), (K,) falling; −∞ where no signal is left."""
    return log_ratio(*noise_levels(process))


def log_ratio(signal: Float64Array, noise: Float64Array) -> Float64Array:
    """log(signal / noise); −∞ where there is no signal."""
    with np.errstate(divide="ignore"):
        return np.log(signal) - np.log(noise)


class Strided(Process, Protocol):
    """A process that says which steps of a whole one it has."""

    timestep_map: npt.NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """The whole process that a strided one was taken from: its ``timesteps``, (T,) ascending, and
    λ at them, ``log_snr`` (T,), falling, perhaps to −∞ at the last."""

    timesteps: Float64Array
    log_snr: Float64Array

    @classmethod
    def of(cls, process: "Strided", original: Float64Array | None) -> "Grid":
        """``original``: λ of the whole process; None where only the steps of this one are known."""
        if original is None:
            return cls(process.timestep_map.astype(np.float64), log_snr(process))
        return cls(np.arange(len(original), dtype=np.float64), original)

    def falling(self, values: npt.ArrayLike) -> Float64Array:
        """The λ in ``values``, in any order, from the least noisy to the noisiest, (K,) float64.

        Raises InputError for none, for what is no number, equal ones, and levels that the process
        has not.
        """
        try:
            asked = np.sort(np.array(values, dtype=np.float64))[::-1]
        except (TypeError, ValueError):
            raise InputError(f"log_snr must be a list of numbers, got {values!r}") from None
        if asked.ndim != 1 or asked.size == 0 or np.isnan(asked).any():
            raise InputError(f"log_snr must be one or more numbers, none of them NaN, got {asked}")
        finite = self.log_snr[np.isfinite(self.log_snr)]
        least, most = finite[-1], finite[0]
        there = (asked >= least - _ROUNDING) & (asked <= most + _ROUNDING)
        without_signal = np.isneginf(asked) & np.isneginf(self.log_snr[-1])
        if not (there | without_signal).all():
            stray = asked[~(there | without_signal)][0]
            levels = f"{least:.6g} … {most:.6g}"
            levels += ", −inf" if np.isneginf(self.log_snr[-1]) else ""
            raise InputError(f"log_snr is {stray:.6g}; the levels of this process are {levels}")
        inside = np.where(without_signal, asked, asked.clip(least, most))
        if (inside[1:] >= inside[:-1]).any():
            twice = inside[1:][inside[1:] >= inside[:-1]][0]
            raise InputError(f"log_snr {twice:.6g} is there twice; expected levels that all differ")
        return inside

    def timesteps_at(self, log_snr: Float64Array) -> Float64Array:
        """The t, (K,), at λ that ``falling`` has checked."""
        known = np.isfinite(self.log_snr)
        between = np.interp(-log_snr, -self.log_snr[known], self.timesteps[known])
        return np.where(np.isneginf(log_snr), self.timesteps[-1], between)

    def log_snr_at(self, timesteps: Float64Array) -> Float64Array:
        """λ, (K,), at ``timesteps`` within the first and the last.

        Raises InputError for one between the last two of a process that ends without signal.
        """
        known = np.isfinite(self.log_snr)
        last, before = self.timesteps[-1], self.timesteps[known][-1]
        between = (timesteps > before) & (timesteps < last)
        if between.any():
            raise InputError(
                f"timestep {timesteps[between][0]:g} lies between {before:g} and {last:g}, where "
                f"the signal ends (zero terminal SNR); expected {before:g} or {last:g}"
            )
        found = np.interp(timesteps, self.timesteps[known], self.log_snr[known])
        return np.where(timesteps > before, self.log_snr[-1], found)


def betas_of_log_snr(log_snr: Float64Array) -> Float64Array:
    """The betas (K,) whose ᾱ = signal² = 1 / (1 + e^−2λ) are those of falling λ."""
    log_alphas_cumprod = -np.logaddexp(0.0, -2.0 * log_snr)
    return -np.expm1(np.diff(log_alphas_cumprod, prepend=0.0))


def log_snr_of_betas(betas: Float64Array) -> Float64Array:
    """λ, (K,), of a variance-preserving process."""
    alphas_cumprod = np.cumprod(1.0 - betas)
    return log_ratio(np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod))


def check_original(
    name: str,
    values: npt.ArrayLike | None,
    original_num_steps: int | None,
    check: Callable[[npt.ArrayLike], Float64Array],
) -> tuple[Float64Array | None, int | None]:
    """What ``check`` makes of the whole process's ``values``, one a step, and the number of steps.

    Raises InputError where another number is given.
    """
    if values is None:
        return None, original_num_steps
    checked = check(values)
    if original_num_steps not in (None, len(checked)):
        raise InputError(
            f"{name} holds {len(checked)} values and original_num_steps is {original_num_steps}; "
            "expected one value a step"
        )
    return checked, len(checked)


def is_whole(timestep_map: npt.NDArray[Any], original_num_steps: int) -> bool:
    """Whether these are all the steps of the process they were taken from."""
    return np.array_equal(timestep_map, np.arange(original_num_steps))
