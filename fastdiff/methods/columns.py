"""What each sampling method writes into a StepTable: its columns over ascending t, in float64.

The equations, their notation and their sources stand in fastdiff/methods/table.py.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastdiff.checks import is_finite
from fastdiff.errors import InputError

Float64Array = npt.NDArray[np.float64]

MEAN_TYPES = ("epsilon", "x_start", "v", "previous_x")
VAR_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")


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


def ddpm_columns(levels: Levels, mean_type: str, var_type: str) -> dict[str, Float64Array]:
    zero, one = np.zeros_like(levels.signal), np.ones_like(levels.signal)
    if mean_type == "previous_x":  # the output is the posterior mean, and is not clipped
        columns = {"o": one}
    else:
        columns = {"c": levels.posterior_mean_coef1, "d": levels.posterior_mean_coef2}
    # posterior_variance[0] is 0; t = 1 lends it a logarithm (the step at t = 0 adds no noise).
    small = levels.posterior_variance.copy()
    small[0] = small[1] if len(small) > 1 else levels.transition_variance[0]
    large = levels.transition_variance
    if var_type == "fixed_small":
        columns["sigma"] = np.sqrt(levels.posterior_variance)
    elif var_type == "fixed_large":
        columns["sigma"] = np.sqrt(large)
    elif var_type == "learned":  # f·1 + (1 − f)·(−1) = v, the log variance itself
        columns |= {"sigma": one, "log_min": -one, "log_max": one}
    else:
        columns |= {"sigma": one, "log_min": np.log(small), "log_max": np.log(large)}
    columns["sigma"] = np.append(zero[:1], columns["sigma"][1:])
    return columns


def ddim_columns(
    levels: Levels, a: Float64Array, b: Float64Array, eta: float, clipped_eps: bool
) -> dict[str, Float64Array]:
    """x_prev = signal_prev·x_0 + √(noise_prev² − σ²)·ε + σ·z with ε = (x_t − signal·x_0)/noise."""
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
        columns["d"] = eps * _one_minus(levels.signal * a) / levels.noise
        columns["o"] = -eps * levels.signal * b / levels.noise
    return columns


def _one_minus(x: Float64Array) -> Float64Array:
    """1 − x, exactly zero where x = signal·(1/signal) is one up to rounding (ε-prediction)."""
    difference = 1 - x
    return np.where(np.abs(difference) < 4 * np.finfo(np.float64).eps, 0.0, difference)


def dpmsolver_columns(levels: Levels) -> dict[str, Float64Array]:
    """DPM-Solver++(2M), midpoint form: DDIM's step with an extrapolated x_0."""
    ratio = levels.noise_prev / levels.noise
    first_order = levels.signal_prev - levels.signal * ratio
    weight = _extrapolation(levels)
    return {"c": first_order * (1 + weight), "d": ratio, "e": -first_order * weight}


def sde_dpmsolver_columns(levels: Levels) -> dict[str, Float64Array]:
    """SDE-DPM-Solver++(2M), midpoint form: the posterior's step with an extrapolated x_0.

    With h = λ_prev − λ, e^−h = signal·noise_prev / (noise·signal_prev), so that the published
    signal_prev·(1 − e^−2h), (noise_prev/noise)·e^−h and noise_prev·√(1 − e^−2h) are the two
    coefficients of the posterior's mean and its standard deviation: to first order the method is
    DDPM with the small variance.
    """
    weight = _extrapolation(levels)
    return {
        "c": levels.posterior_mean_coef1 * (1 + weight),
        "d": levels.posterior_mean_coef2,
        "e": -levels.posterior_mean_coef1 * weight,
        "sigma": np.sqrt(levels.posterior_variance),
    }


def _extrapolation(levels: Levels) -> Float64Array:
    """The w of x_0 + w·(x_0 − x_0_before), which stands for x_0 in a second-order row; (K,).

    With λ = log(signal/noise), h = λ_prev − λ_t and h_0 the h of the row before, w = h / 2h_0.
    First order (w = 0) are: the first row, the last (it arrives at noise 0, λ = ∞), and of itself
    the one after a first row without signal (h_0 = ∞).
    """
    with np.errstate(divide="ignore"):
        h = -np.diff(np.log(levels.signal) - np.log(levels.noise))  # (K − 1,); t's is h[t − 1]
    weight = np.zeros_like(levels.signal)
    weight[1:-1] = 0.5 * h[:-1] / h[1:]
    return weight
