"""Every sampler step as one row of float32 coefficients, derived in float64.

For a Gaussian process q(x_t | x_0) = N(signal_t·x_0, noise_t²·I), each first-order sampler step is

    x_0    = clip(a·x_t + b·output)
    x_prev = c·x_0 + d·x_t + o·output + e·x_0_before + std·z,     z ~ N(0, I)
    std    = sigma·exp(½·(f·log_max + (1 − f)·log_min)),          f = (v + 1) / 2

where v is the second half of the output's channels if the network learns the variance, and
x_0_before is the x_0 of the row before. A zero c, d, o, e or sigma contributes nothing,
whatever it multiplies. Variance-preserving (signal² + noise² = 1) and variance-exploding
(signal = 1) processes share the derivation. Sources: DDPM (Ho et al. 2020, eq. 6–7), Improved
DDPM (Nichol & Dhariwal 2021, eq. 15), DDIM (Song et al. 2020, eq. 12 and 16), DPM-Solver++ (Lu et
al. 2022, algorithm 2), v-prediction (Salimans & Ho 2022, appendix D).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, overload

import numpy as np
import numpy.typing as npt
import torch

from fastdiff._checks import is_finite
from fastdiff.errors import InputError

Float64Array = npt.NDArray[np.float64]

METHODS = ("ddpm", "ddim", "dpmsolver++")
MEAN_TYPES = ("epsilon", "x_start", "v", "previous_x")
VAR_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")

# The order of the packed tensor's columns: kernels read a row by these positions (48 bytes a row).
COLUMNS = (
    *("a", "b", "c", "d", "o", "e", "sigma", "log_min", "log_max", "clip"),
    *("timesteps", "input_scale"),
)


class Process(Protocol):
    """A Gaussian process a table can be made from: GaussianDiffusion, VarianceExploding.

    ``model_timesteps`` is (K,), t ascending, like the scales that ``noise_levels`` finds. A process
    may also have ``input_scale`` (K,): what x_t is multiplied by before the network sees it.
    """

    mean_type: str
    var_type: str
    model_timesteps: npt.NDArray[np.float32]


def noise_levels(process: Process) -> tuple[Float64Array, Float64Array]:
    """(signal, noise), float64 (K,) each: x_t = signal_t·x_0 + noise_t·ε.

    Read from ``signal_scale`` and ``noise_scale``, else from the variance-preserving process's
    ``sqrt_alphas_cumprod`` and ``sqrt_one_minus_alphas_cumprod``. InputError if it has neither.
    """
    pairs = [
        ("signal_scale", "noise_scale"),
        ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    ]
    for signal, noise in pairs:
        if hasattr(process, signal) and hasattr(process, noise):
            return getattr(process, signal), getattr(process, noise)
    raise InputError(
        f"a {type(process).__name__} has no noise levels; expected a GaussianDiffusion or a "
        "VarianceExploding process"
    )


class _Column:
    """An attribute of StepTable that is the packed column of the same name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.index = COLUMNS.index(name)

    @overload
    def __get__(self, table: None, owner: type) -> "_Column": ...
    @overload
    def __get__(self, table: "StepTable", owner: type) -> torch.Tensor: ...
    def __get__(self, table: "StepTable | None", owner: type) -> "_Column | torch.Tensor":
        return self if table is None else table.packed[:, self.index]


@dataclass(frozen=True)
class StepTable:
    """K sampler steps in sampling order: row 0 is the noisiest, the last row arrives at x_0.

    ``packed`` is a float32 (K, 12) tensor whose columns are named in ``COLUMNS``; each is also an
    attribute, a (K,) view. ``clip`` is inf where x_0 is not clipped. ``timesteps`` is what the
    network is given and ``input_scale`` what x_t is multiplied by before the network sees it.

    What a program must know without reading the device: ``doubled_output``, the network returns 2C
    channels; ``learned_variance``, the second C of them set the standard deviation;
    ``scales_input``, some ``input_scale`` is not one; ``noisy_rows``, which rows draw noise;
    ``multistep_rows``, which rows read the x_0 of the row before.
    """

    packed: torch.Tensor
    method: str
    doubled_output: bool
    learned_variance: bool
    scales_input: bool
    noisy_rows: tuple[bool, ...]
    multistep_rows: tuple[bool, ...]

    a = _Column()
    b = _Column()
    c = _Column()
    d = _Column()
    o = _Column()
    e = _Column()
    sigma = _Column()
    log_min = _Column()
    log_max = _Column()
    clip = _Column()
    timesteps = _Column()
    input_scale = _Column()

    @classmethod
    def from_process(
        cls,
        process: Process,
        *,
        method: str = "ddpm",
        eta: float = 0.0,
        clip_denoised: bool = True,
        clipped_eps: bool = True,
    ) -> "StepTable":
        """The table by which ``method`` samples a GaussianDiffusion or a VarianceExploding process.

        ``eta`` is DDIM's (0 deterministic, 1 the DDPM posterior's variance). ``clip_denoised``
        clips x_0 to [−1, 1]. ``clipped_eps=True`` re-derives DDIM's ε from the clipped x_0, as the
        published code does; False leaves it as the network said, as diffusers does by default.
        Raises InputError for an unknown method or type, an ``eta`` the process does not allow,
        noise levels that do not rise, and ε-prediction from a step without signal.
        """
        if method not in METHODS:
            raise InputError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
        if eta != 0.0 and method != "ddim":
            raise InputError(f"eta={eta} belongs to method 'ddim', not to {method!r}")
        levels = _Levels.of(*noise_levels(process))
        learned = _is_learned(process.var_type)
        a, b = _x_start_coefficients(levels, process.mean_type)
        columns: dict[str, np.ndarray] = dict.fromkeys(COLUMNS, np.zeros(len(levels.signal)))
        columns |= {"a": a, "b": b, "timesteps": process.model_timesteps}
        columns["clip"] = np.full_like(a, 1.0 if clip_denoised else np.inf)
        input_scale = getattr(process, "input_scale", None)
        columns["input_scale"] = np.ones_like(a) if input_scale is None else input_scale
        if method == "ddpm":
            columns |= _ddpm_columns(levels, process.mean_type, process.var_type)
        elif method == "ddim":
            columns |= _ddim_columns(levels, a, b, eta, clipped_eps)
        else:
            columns |= _dpmsolver_columns(levels)
        packed = _pack(columns)
        return cls(
            packed=packed,
            method=method,
            doubled_output=learned,
            learned_variance=learned and method == "ddpm",
            scales_input=bool((packed[:, COLUMNS.index("input_scale")] != 1).any()),
            noisy_rows=tuple((packed[:, COLUMNS.index("sigma")] != 0).tolist()),
            multistep_rows=tuple((packed[:, COLUMNS.index("e")] != 0).tolist()),
        )

    def __len__(self) -> int:
        return self.packed.shape[0]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @cached_property
    def is_noisy(self) -> bool:
        """Whether any row draws noise."""
        return any(self.noisy_rows)

    @cached_property
    def is_multistep(self) -> bool:
        """Whether any row reads the x_0 of the row before."""
        return any(self.multistep_rows)

    def to(self, device: torch.device | str) -> "StepTable":
        """The same table on ``device``."""
        return replace(self, packed=self.packed.to(device))


@dataclass(frozen=True)
class _Levels:
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
    def of(cls, signal_scale: npt.ArrayLike, noise_scale: npt.ArrayLike) -> "_Levels":
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


def _is_learned(var_type: str) -> bool:
    if var_type not in VAR_TYPES:
        raise InputError(f"var_type is {var_type!r}; expected one of {', '.join(VAR_TYPES)}")
    return var_type in ("learned", "learned_range")


def _x_start_coefficients(levels: _Levels, mean_type: str) -> tuple[Float64Array, Float64Array]:
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


def _ddpm_columns(levels: _Levels, mean_type: str, var_type: str) -> dict[str, Float64Array]:
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


def _ddim_columns(
    levels: _Levels, a: Float64Array, b: Float64Array, eta: float, clipped_eps: bool
) -> dict[str, Float64Array]:
    """x_prev = signal_prev·x_0 + √(noise_prev² − σ²)·ε + σ·z with ε = (x_t − signal·x_0)/noise."""
    if not (is_finite(eta) and eta >= 0):
        raise InputError(f"eta is {eta!r}; expected ≥ 0 (0 deterministic, 1 the DDPM variance)")
    # σ² = η²·posterior_variance, so noise_prev² − σ² = noise_prev²·(1 − η²·transition/noise²).
    share = levels.transition_variance[1:] / levels.noise[1:] ** 2
    if (eta**2 * share > 1).any():
        raise InputError(
            f"eta is {eta}; this process allows at most {1 / np.sqrt(share.max()):.4g} "
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


def _dpmsolver_columns(levels: _Levels) -> dict[str, Float64Array]:
    """The second-order multistep solver, midpoint form.

    With λ = log(signal/noise), h = λ_prev − λ_t and h_0 the h of the row before, x_0 is replaced by
    x_0 + (h / 2h_0)·(x_0 − x_0_before). First order are: the first row, the last (it arrives at
    noise 0, λ = ∞), and of itself the one after a first row without signal (h_0 = ∞).
    """
    ratio = levels.noise_prev / levels.noise
    first_order = levels.signal_prev - levels.signal * ratio
    with np.errstate(divide="ignore"):
        h = -np.diff(np.log(levels.signal) - np.log(levels.noise))  # (K − 1,); t's is h[t − 1]
    weight = np.zeros_like(ratio)
    weight[1:-1] = 0.5 * h[:-1] / h[1:]
    return {"c": first_order * (1 + weight), "d": ratio, "e": -first_order * weight}


def _pack(columns: dict[str, np.ndarray]) -> torch.Tensor:
    """Columns over ascending t → float32 (K, 12) in sampling order, on the CPU."""
    length = len(columns["a"])
    for name, values in columns.items():
        if np.shape(values) != (length,):
            raise InputError(
                f"{name} has shape {np.shape(values)}; expected ({length},), one value a step"
            )
    packed = np.stack([columns[name] for name in COLUMNS], axis=1)[::-1]
    return torch.from_numpy(packed.astype(np.float32, order="C"))
