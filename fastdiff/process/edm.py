"""The EDM formulation: x_t = x_0 + sigma·ε, the network preconditioned at every sigma.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models"
(arXiv:2206.00364), equations 5 to 8 and table 1. The denoiser that its network F makes is

    D(x; sigma) = c_skip·x + c_out·F(c_in·x, c_noise)

    c_skip = sigma_data²/r²         c_in    = 1/r           with r = √(sigma² + sigma_data²)
    c_out  = sigma·sigma_data/r     c_noise = ln(sigma)/4

It is trained at any sigma, and sampled at K of them: Sampler reads these through a StepTable, in
which c_skip and c_out are a and b.
"""

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.checks import check_float, check_positive, is_finite
from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array
from fastdiff.ops.counters import Counters
from fastdiff.process.between import Grid
from fastdiff.process.config import built
from fastdiff.process.forward import mean_flat, noised
from fastdiff.process.respacing import Respaced
from fastdiff.process.reverse import Model, check_choice, network_output
from fastdiff.process.score import Scored
from fastdiff.process.tables import TimestepMap, arithmetic_dtype, check_timestep_map
from fastdiff.process.variance_exploding import VAR_TYPES, check_sigma_range

PROCESS = "edm"
# Standard deviations of ln sigma beyond which no noise level is trained. 1 − Φ(5.5) is 2e-8: of the
# float32 t between 0 and 1 only those below 2e-8 feel it, and t = 0 and t = 1 are finite.
_TAIL = 5.5
_NO_SEED = Counters()
_LARGEST_LOG = 40.0  # e^±40, squared, is within float32


def karras_sigmas(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float64Array:
    """``num_steps`` noise levels, even in sigma^(1/rho), smallest first; float64 (num_steps,).

    Karras et al. 2022, eq. 5, whose sigma_0 is the last here. Raises InputError unless
    0 < sigma_min < sigma_max, rho > 0, num_steps ≥ 2, and the levels rise in float64.
    """
    check_sigma_range(num_steps, sigma_min, sigma_max)
    check_positive("rho", rho)
    with np.errstate(all="ignore"):  # what comes of it is looked at
        least, most = np.float64(sigma_min) ** (1 / rho), np.float64(sigma_max) ** (1 / rho)
        sigmas = (least + np.linspace(0, 1, num_steps) * (most - least)) ** rho
    if not (np.isfinite(sigmas).all() and sigmas[0] > 0 and (np.diff(sigmas) > 0).all()):
        raise InputError(
            f"{num_steps} levels from {sigma_min} to {sigma_max} with rho {rho} do not all differ "
            "in float64; expected a rho nearer to 7, or fewer steps"
        )
    return sigmas


@dataclass(frozen=True)
class KarrasGrid(Grid):
    """Eq. 5's levels with its own curve between the steps: sigma^(1/rho) is linear in t."""

    rho: float

    def sigmas_at(self, timesteps: Float64Array) -> Float64Array:
        """The noise levels, (K,), at ``timesteps`` within the first and the last."""
        least, most = self._roots()
        return (least + timesteps / self.timesteps[-1] * (most - least)) ** self.rho

    def timesteps_at(self, log_snr: Float64Array) -> Float64Array:
        least, most = self._roots()
        place = (np.exp(-log_snr / self.rho) - least) / (most - least)
        return place.clip(0.0, 1.0) * self.timesteps[-1]

    def log_snr_at(self, timesteps: Float64Array) -> Float64Array:
        return -np.log(self.sigmas_at(timesteps))

    def _roots(self) -> Float64Array:
        """sigma_min^(1/rho) and sigma_max^(1/rho)."""
        return np.exp(-self.log_snr[[0, -1]] / self.rho)


class EDM(Scored, Respaced):
    """q(x_sigma | x_0) = N(x_0, sigma²·I), EDM's loss at any sigma, and K levels to sample at.

    Args:
        steps: of the levels to sample at, eq. 5's, from ``sigma_min`` to ``sigma_max`` with
            exponent ``rho``. The strided process of N of 1,000 steps has nearly the N levels that
            ``steps=N`` has exactly.
        sigma_data: the standard deviation of the data.
        P_mean: ln sigma is trained at N(P_mean, P_std²).
        P_std: see ``P_mean``.
        var_type: the reverse variance of DDPM's steps, as VarianceExploding's: "fixed_small" or
            "fixed_large".
        timestep_map: of a strided process, the steps of the unstrided one: :meth:`respace` sets it.

    The network is called ``model(c_in·x, c_noise)`` and answers F, whose target has unit variance
    at every level: its ``mean_type`` is "edm".

    Attributes: ``sigmas``, ``signal_scale`` (ones), ``noise_scale`` (sigmas), ``input_scale``
    (c_in), float64 (K,); ``x_start_coefficients``, (c_skip, c_out), float64 (K,) each;
    ``model_timesteps`` (c_noise), float32 (K,); ``timestep_map``, int64 (K,); ``num_timesteps`` K;
    ``original_num_steps``; ``prior_std``, the standard deviation x_T is drawn with;
    ``continuous``: True, t of :meth:`training_losses` is a quantile and no step.

    Raises InputError for levels that do not rise, an unknown type, and a spread of sigma beyond
    float32.
    """

    continuous = True
    mean_type = PROCESS
    last_variance = 0.0

    def __init__(
        self,
        steps: int = 1000,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        var_type: str = "fixed_small",
        timestep_map: TimestepMap | None = None,
    ):
        levels = karras_sigmas(steps, sigma_min, sigma_max, rho)
        check_positive("sigma_data", sigma_data)
        _check_training_levels(P_mean, P_std)
        self.var_type = check_choice("var_type", var_type, VAR_TYPES)
        self.sigma_min, self.sigma_max, self.rho = float(sigma_min), float(sigma_max), float(rho)
        self.sigma_data, self.P_mean, self.P_std = float(sigma_data), float(P_mean), float(P_std)

        count = len(timestep_map) if isinstance(timestep_map, Sized) else len(levels)
        maps = check_timestep_map(timestep_map, len(levels), count)
        self.timestep_map, self.original_num_steps = maps
        self.num_timesteps = len(self.timestep_map)
        between = self.timestep_map.dtype == np.float64
        at = self.timestep_map
        self.sigmas = self.grid().sigmas_at(at) if between else levels[at]

        total_std = np.hypot(self.sigmas, sigma_data)
        self.signal_scale = np.ones_like(self.sigmas)
        self.noise_scale = self.sigmas
        self.input_scale = 1 / total_std
        c_skip, c_out = (sigma_data / total_std) ** 2, self.sigmas * sigma_data / total_std
        self.x_start_coefficients = c_skip, c_out
        self.model_timesteps = (np.log(self.sigmas) / 4).astype(np.float32)
        self.prior_std = float(self.sigmas[-1])

    def sigma_of(self, t: Tensor) -> Tensor:
        """The noise level at each quantile: exp(P_mean + P_std·Φ⁻¹(t)), float64, of t's shape.

        ``t`` float in [0, 1]. Φ⁻¹ ends at ±5.5, so that the ends are finite; a t drawn uniformly
        has ln sigma ~ N(P_mean, P_std²). Raises InputError for another dtype and, on the CPU, for a
        t out of range; elsewhere that gives NaN.
        """
        if not isinstance(t, Tensor) or not t.is_floating_point():
            came = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise InputError(
                f"t must be a float tensor of quantiles in [0, 1], got {came}: an EDM process is "
                "trained at levels between its steps, so draw t with torch.rand(N)"
            )
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = t[~((t >= 0) & (t <= 1))]  # NaN too
            if outside.numel():
                raise InputError(f"t must lie in [0, 1], got {outside[0].item():g}")
        deviations = torch.special.ndtri(t.double()).clamp(-_TAIL, _TAIL)
        return torch.exp(self.P_mean + self.P_std * deviations)

    def x_start_coefficients_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) with D = a·(c_in·x_t) + b·F at each quantile: c_skip/c_in and c_out, float64, of
        t's shape. ``t`` and errors: :meth:`sigma_of`."""
        sigma = self.sigma_of(t)
        total_std = torch.hypot(sigma, torch.full_like(sigma, self.sigma_data))
        return self.sigma_data**2 / total_std, sigma * self.sigma_data / total_std

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t ~ N(x_start, sigma_of(t)²·I): like x_start.

        ``x_start`` (N, ...) float, ``t`` (N,) float quantiles in [0, 1], ``noise`` N(0, I) like
        x_start, drawn when None. Raises InputError for what does not fit, and as :meth:`sigma_of`.
        """
        return _noised(x_start, self._sigmas_at(t, x_start), noise)[0]

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        step: int | Tensor = 0,
        first_sample: int | Tensor = 0,
    ) -> dict[str, Tensor]:
        """{"loss", "mse"}, each (N,) float and both the same: eq. 8's λ(sigma)·‖D − x_start‖².

        The norm is a mean over the sample. With λ = (sigma² + sigma_data²)/(sigma·sigma_data)² it
        is the squared error of F itself, λ·c_out² being 1, and that is how it is computed.
        ``model`` is called ``model(x, c_noise, **model_kwargs)`` with x = c_in·x_t and float32 (N,)
        c_noise, and answers x's shape. Arguments and errors: :meth:`q_sample`; noise is drawn as
        :meth:`GaussianDiffusion.training_losses` does.
        """
        sigma = self._sigmas_at(t, x_start)
        counters = Counters(step, seed, first_sample)
        x_t, noise = _noised(x_start, sigma, noise, generator, counters)
        per_sample = sigma.to(arithmetic_dtype(x_start)).view(-1, *[1] * (x_start.dim() - 1))
        c_in = torch.rsqrt(per_sample**2 + self.sigma_data**2)
        network_input = (c_in * x_t).to(x_start.dtype)
        c_noise = (sigma.log() / 4).float()
        output = network_output(
            model, network_input, c_noise, model_kwargs, x_start.shape, f"an {PROCESS} process"
        )
        # (x_start − c_skip·x_t)/c_out, multiplied out: at small sigma that is all cancellation.
        target = (per_sample / self.sigma_data * x_start - self.sigma_data * noise) * c_in
        mse = mean_flat((target - output.to(target.dtype)) ** 2)
        return {"loss": mse, "mse": mse}

    def at_log_snr(self, values: npt.ArrayLike) -> "EDM":
        """The process over the levels sigma = e^−λ with these λ = log(1 / sigma), in any order.

        Raises InputError for levels beyond ``sigma_min`` and ``sigma_max``, and equal ones.
        """
        grid = self.grid()
        steps = grid.timesteps_at(grid.falling(values))
        return EDM.from_config(self.to_config() | {"timestep_map": steps})

    def to_config(self) -> dict[str, Any]:
        """A JSON dictionary from which :meth:`from_config` makes an equal process."""
        names = "sigma_min sigma_max rho sigma_data P_mean P_std var_type"
        return {
            **{"process": PROCESS, "steps": self.original_num_steps},
            **{name: getattr(self, name) for name in names.split()},
            "timestep_map": self.timestep_map.tolist(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EDM":
        """The process :meth:`to_config` described. Raises InputError for any other dictionary."""
        return built(cls, PROCESS, config)

    def _at_steps(self, steps: list[int], sections: Any) -> "EDM":
        return EDM.from_config(self.to_config() | {"timestep_map": self.timestep_map[steps]})

    def grid(self) -> "KarrasGrid":
        """λ at the unstrided process's steps and between them."""
        steps = np.arange(self.original_num_steps, dtype=np.float64)
        levels = karras_sigmas(self.original_num_steps, self.sigma_min, self.sigma_max, self.rho)
        return KarrasGrid(steps, -np.log(levels), self.rho)

    def _sigmas_at(self, t: Tensor, x_start: Tensor) -> Tensor:
        """float64 (N,): the level of each sample, its t checked."""
        check_float(x_start, "x_start")
        if isinstance(t, Tensor) and t.device != x_start.device:
            raise InputError(f"t is on {t.device} but x_start is on {x_start.device}: move one")
        sigma = self.sigma_of(t)
        if t.shape != x_start.shape[:1] or x_start.dim() == 0:
            raise InputError(
                f"t must hold one quantile per sample of x_start, whose shape is "
                f"{tuple(x_start.shape)}, got {tuple(t.shape)}"
            )
        return sigma


def _noised(
    x_start: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    generator: torch.Generator | None = None,
    counters: Counters = _NO_SEED,
) -> tuple[Tensor, Tensor]:
    """x_start + sigma·noise by the fused operation, each sample's level a row of its tables, and
    the noise."""
    # A row more than there are samples, beside the last: a batch may be empty, a table may not.
    rows = torch.nn.functional.pad(sigma, (0, 2), value=1.0).to(arithmetic_dtype(x_start))
    t = torch.arange(len(sigma), device=sigma.device)
    return noised(x_start, t, (torch.ones_like(rows), rows), noise, generator, counters)


def _check_training_levels(P_mean: float, P_std: float) -> None:
    """InputError unless every sigma that may be trained, and its square, is a float32."""
    check_positive("P_std", P_std)
    if not is_finite(P_mean):
        raise InputError(f"P_mean must be a finite number, got {P_mean!r}")
    if abs(P_mean) + _TAIL * P_std > _LARGEST_LOG:
        raise InputError(
            f"P_mean is {P_mean} and P_std {P_std}; expected natural logarithms of sigma, with "
            f"|P_mean| + {_TAIL}·P_std ≤ {_LARGEST_LOG:g} (EDM's own are −1.2 and 1.2)"
        )
