"""What a sampling method derives its rows from: a process's noise levels and what its network says.

The equation of a row, its notation and the sources stand in fastdiff/methods/table.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import InputError

Float64Array = npt.NDArray[np.float64]
Columns = dict[str, Float64Array]  # names of COLUMNS (table.py) to (K,), t ascending

MEAN_TYPES = ("epsilon", "x_start", "v", "previous_x")
VAR_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")


@dataclass(frozen=True)
class Level:
    """x = signal·x_0 + noise·ε, and what a network answers there: x_0 = a·x + b·output, given
    ``timestep`` and x times ``input_scale``."""

    signal: float
    noise: float
    a: float = 1.0
    b: float = 0.0
    timestep: float = 0.0
    input_scale: float = 1.0

    @cached_property
    def log_snr(self) -> float:
        """λ = log(signal / noise), ∞ for the data and −∞ where there is no signal."""
        if self.signal == 0:
            return -math.inf
        return math.log(self.signal) - math.log(self.noise) if self.noise else math.inf

    @property
    def sigma(self) -> float:
        """noise / signal: EDM's σ, ∞ where there is no signal."""
        return self.noise / self.signal if self.signal else math.inf


DATA = Level(1.0, 0.0)  # where the last row arrives


@dataclass(frozen=True)
class Levels:
    """q(x_t | x_0), transition q(x_t | x_prev) and posterior q(x_prev | x_t, x_0); t ascending.

    Before t = 0 stands the data itself: signal 1, noise 0.
    """

    signal: Float64Array
    noise: Float64Array
    signal_prev: Float64Array
    noise_prev: Float64Array
    transition_variance: Float64Array
    posterior_variance: Float64Array
    posterior_mean_coef1: Float64Array
    posterior_mean_coef2: Float64Array

    @classmethod
    def of(cls, signal_scale: npt.ArrayLike, noise_scale: npt.ArrayLike) -> "Levels":
        signal = np.asarray(signal_scale, dtype=np.float64)
        noise = np.asarray(noise_scale, dtype=np.float64)
        _check_levels(signal, noise)
        signal_prev = np.append(1.0, signal[:-1])
        noise_prev = np.append(0.0, noise[:-1])
        shrink = signal / signal_prev  # mean of x_t given x_prev
        # noise² − (shrink·noise_prev)², factored so that close levels do not cancel.
        transition = (noise - shrink * noise_prev) * (noise + shrink * noise_prev)
        return cls(
            signal=signal,
            noise=noise,
            signal_prev=signal_prev,
            noise_prev=noise_prev,
            transition_variance=transition,
            posterior_variance=transition * (noise_prev / noise) ** 2,
            posterior_mean_coef1=signal_prev * transition / noise**2,
            posterior_mean_coef2=shrink * (noise_prev / noise) ** 2,
        )

    def first(self, count: int) -> "Levels":
        """The ``count`` least noisy of them."""
        return Levels(*(getattr(self, name)[:count] for name in self.__dataclass_fields__))


def _check_levels(signal: Float64Array, noise: Float64Array) -> None:
    if signal.ndim != 1 or signal.shape != noise.shape or signal.size == 0:
        raise InputError(
            "signal_scale and noise_scale must be 1-D, of one length and not empty; "
            f"they have shapes {signal.shape} and {noise.shape}"
        )
    if not (np.isfinite(signal).all() and np.isfinite(noise).all()):
        raise InputError("signal_scale and noise_scale must be finite")
    if (noise <= 0).any() or (signal < 0).any() or (signal[:-1] == 0).any():
        raise InputError(
            "noise_scale must be positive at every step, and signal_scale too "
            "(it may be zero at the last step only)"
        )
    # signal/noise falls strictly  ⇔  signal_t·noise_{t−1} < signal_{t−1}·noise_t
    if (signal[1:] * noise[:-1] >= signal[:-1] * noise[1:]).any():
        t = int(np.argmax(signal[1:] * noise[:-1] >= signal[:-1] * noise[1:])) + 1
        raise InputError(
            f"the signal-to-noise ratio must fall from step to step; it does not at step {t}"
        )


def is_learned(var_type: str) -> bool:
    if var_type not in VAR_TYPES:
        raise InputError(f"var_type is {var_type!r}; expected one of {', '.join(VAR_TYPES)}")
    return var_type in ("learned", "learned_range")


def x_start_coefficients(levels: Levels, mean_type: str) -> tuple[Float64Array, Float64Array]:
    """(a, b) with x_0 = a·x_t + b·output before clipping."""
    signal, noise = levels.signal, levels.noise
    if mean_type == "epsilon":
        with np.errstate(divide="ignore", over="ignore"):
            unusable = not np.isfinite(np.float32(noise[-1] / signal[-1]))
        if unusable:
            raise InputError(
                "mean_type 'epsilon' cannot recover x_0 at the last timestep, where no signal is "
                "left (zero terminal SNR): train with mean_type 'v' or 'x_start'"
            )
        return 1 / signal, -noise / signal
    if mean_type == "x_start":
        return np.zeros_like(signal), np.ones_like(signal)
    if mean_type == "v":
        # v = cos φ·ε − sin φ·x_0 with (cos φ, sin φ) = (signal, noise)/r. For VP r = 1; for VE this
        # is EDM's skip and output scaling with unit data variance (Karras et al. 2022, table 1),
        # sign apart.
        r = np.hypot(signal, noise)
        return signal / r**2, -noise / r
    if mean_type == "previous_x":
        coef1, coef2 = levels.posterior_mean_coef1, levels.posterior_mean_coef2
        return -coef2 / coef1, 1 / coef1
    raise InputError(f"mean_type is {mean_type!r}; expected one of {', '.join(MEAN_TYPES)}")


@dataclass(frozen=True)
class Source:
    """What the rows of every method follow from, (K,) each, t ascending.

    x_0 = a·x_t + b·output before clipping; ``mean_type`` and ``var_type`` say what the network
    predicts. A ``mean_type`` that is none of MEAN_TYPES has its (a, b) from the process.
    ``timesteps`` and ``input_scale`` are what the network is given and what x_t is multiplied by.
    ``total``: the steps of the process, of which ``last`` leaves some. ``between``: the levels at
    other λ = log(signal / noise), in the order asked for, for methods that take the network there;
    InputError where process or network cannot. ``upward``: the way of a sample is from the least
    noisy level to the noisiest (``inversion.py``).
    """

    levels: Levels
    a: Float64Array
    b: Float64Array
    mean_type: str
    var_type: str
    timesteps: Float64Array
    input_scale: Float64Array
    total: int
    between: Callable[[list[float]], "list[Level]"]
    upward: bool = False

    @classmethod
    def of(cls, levels: Levels, process: Any) -> "Source":
        """``levels``: of the ``process`` (methods/protocol.py), whose own (a, b) count if it gives
        any (``x_start_coefficients``).

        InputError for an unknown type, for ε-prediction from a step without signal, and for arrays
        of another length.
        """
        mean_type, var_type = process.mean_type, process.var_type
        is_learned(var_type)
        own = getattr(process, "x_start_coefficients", None)
        a, b = x_start_coefficients(levels, mean_type) if own is None else own
        arrays = {
            "a": a,
            "b": b,
            "timesteps": process.model_timesteps,
            "input_scale": process.input_scale,
        }
        for name, values in arrays.items():
            if np.shape(values) != levels.signal.shape:
                raise InputError(
                    f"{name} has shape {np.shape(values)}; expected {levels.signal.shape}, "
                    "one value a step"
                )
        arrays = {name: np.asarray(values, dtype=np.float64) for name, values in arrays.items()}

        def between(log_snr: list[float]) -> list[Level]:
            if not log_snr:
                return []
            if mean_type == "previous_x":
                raise InputError(
                    "a network with mean_type 'previous_x' predicts the x of its own steps, and "
                    "knows no noise levels between them; take a method that stays on the steps"
                )
            if not hasattr(process, "at_log_snr"):
                raise InputError(
                    f"a {type(process).__name__} has no at_log_snr, by which a method takes its "
                    "network to noise levels between its steps; take a method that stays on the "
                    "steps, without churn and restarts"
                )
            rising = sorted(set(log_snr))
            there = process.at_log_snr(rising)
            steps = cls.of(Levels.of(there.signal_scale, there.noise_scale), there).steps
            found = dict(zip(rising, steps, strict=True))
            return [found[value] for value in log_snr]

        total = len(levels.signal)
        types = {"mean_type": mean_type, "var_type": var_type}
        return cls(levels=levels, total=total, between=between, **types, **arrays)

    def last(self, count: int) -> "Source":
        """That of the ``count`` last steps alone, the least noisy ones."""
        names = ("a", "b", "timesteps", "input_scale")
        arrays = {name: getattr(self, name)[:count] for name in names}
        return replace(self, levels=self.levels.first(count), **arrays)

    @cached_property
    def path(self) -> tuple[Level, ...]:
        """Row i leads from path[i] to path[i + 1]: the K levels, the noisiest first, and the data
        at their end; upward the K levels alone."""
        levels = self.levels
        arrays = (levels.signal, levels.noise, self.a, self.b, self.timesteps, self.input_scale)
        rising = tuple(Level(*values) for values in np.stack(arrays, 1).tolist())
        return rising if self.upward else (*rising[::-1], DATA)

    @cached_property
    def steps(self) -> tuple[Level, ...]:
        """The levels that a step leads from: all of ``path`` but its end."""
        return self.path[:-1]

    def left(self, row: int) -> int:
        """How many steps there are from that one to the end of ``path``, where that is the data or
        has no signal: λ is infinite there, the last step DDIM's, and methods of higher order come
        down to it. Elsewhere as many as there are in all, of which none has to be lower."""
        every = len(self.steps)
        return every - row if math.isinf(self.path[-1].log_snr) else every
