"""The reverse process p(x_{t-1} | x_t): what a network's output means, and single sampling steps.

Equations: DDPM, Ho et al. 2020; learned variances, Nichol & Dhariwal 2021 eq. 15; DDIM, Song et al.
2020 (arXiv:2010.02502) eq. 12; v-prediction, Salimans & Ho 2022 (arXiv:2202.00512) appendix D.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.checks import check_like, is_finite
from fastdiff.errors import InputError
from fastdiff.ops.normal.op import draw_like
from fastdiff.ops.posterior_step.reference import log_variance
from fastdiff.process.forward import ForwardProcess, posterior_mean
from fastdiff.process.tables import FloatArray, TablesAt, arithmetic_dtype, to_device

MEAN_TYPES = ("epsilon", "x_start", "v", "previous_x")
VAR_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")

Model = Callable[..., Tensor]
DenoisedFn = Callable[[Tensor], Tensor]
CondFn = Callable[..., Tensor]


class ReverseProcess(ForwardProcess):
    """p(x_{t-1} | x_t) from a network's output, and steps that draw from it.

    Arguments the methods share:

    ``model``: called ``model(x, timesteps, **model_kwargs)`` with x (N, C, ...) and float32 (N,)
    timesteps; answers (N, C, ...), or (N, 2C, ...) where the variance is learned. Any callable.
    ``x``, ``t``: (N, C, ...) float and (N,) integer, the index into this process's K steps.
    ``denoised_fn``: applied to the predicted x_0, before clipping; ``clip_denoised`` clips it to
    [-1, 1].
    ``cond_fn``: guidance by a classifier, cond_fn(x, timesteps, **model_kwargs) = ∇ log p(y | x_t)
    like x (Dhariwal & Nichol 2021, arXiv:2105.05233): ``p_sample`` moves the mean by variance times
    that (algorithm 1), the DDIM methods ε by −√(1 − ᾱ_t) times that (algorithm 2).
    ``noise``: the N(0, 1) draw of x's shape; ``generator``: where it is drawn from when None. The
    draw is made even where it is not used (t = 0, DDIM with eta = 0), as published, so that equal
    seeds give equal samples.

    The arithmetic is float32 (float64 for float64 x); samples come back in x's dtype. Whatever does
    not fit raises InputError in one line; outside the CPU a t out of range gives NaN instead.
    """

    def __init__(
        self,
        betas: npt.ArrayLike,
        *,
        mean_type: str,
        var_type: str,
        rescale_timesteps: bool = False,
        timestep_map: Sequence[int] | npt.NDArray[np.int64] | None = None,
        original_num_steps: int | None = None,
    ):
        super().__init__(
            betas,
            rescale_timesteps=rescale_timesteps,
            timestep_map=timestep_map,
            original_num_steps=original_num_steps,
        )
        self.mean_type = check_choice("mean_type", mean_type, MEAN_TYPES)
        self.var_type = check_choice("var_type", var_type, VAR_TYPES)
        self.learns_variance = var_type in ("learned", "learned_range")
        if mean_type == "epsilon" and self.sqrt_recip_alphas_cumprod[-1] > _FLOAT32_MAX:
            raise InputError(
                "epsilon prediction cannot recover x_0 at the last step of this schedule, where no "
                "signal is left (zero terminal SNR): use mean_type 'v' or 'x_start'"
            )
        self._ddim_tables: dict[tuple[float, torch.device, torch.dtype], dict[str, Tensor]] = {}

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t) as {"mean", "variance", "log_variance", "pred_xstart"}, each like x.

        Float32, or float64 for float64 x. Arguments and errors: :class:`ReverseProcess`.
        """
        at = self._at(t, x)
        output = self._call_model(model, x, at, model_kwargs)
        return self._interpret(output, x, at, clip_denoised, denoised_fn)

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        *,
        noise: Tensor | None = None,
        cond_fn: CondFn | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Draw x_{t-1} ~ p(x_{t-1} | x_t), DDPM algorithm 2: {"sample", "pred_xstart"}, like x.

        No noise enters where t = 0. Arguments and errors: :class:`ReverseProcess`.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            gradient = self._classifier_gradient(cond_fn, x, t, model_kwargs)
            out["mean"] = out["mean"] + out["variance"] * gradient
        noise = _step_noise(x, noise, generator)
        noisy = (t != 0).view((-1,) + (1,) * (x.dim() - 1))
        sample = out["mean"] + noisy * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample.to(x.dtype), "pred_xstart": out["pred_xstart"].to(x.dtype)}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
        *,
        noise: Tensor | None = None,
        cond_fn: CondFn | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Draw x_{t-1} with DDIM (eq. 12): {"sample", "pred_xstart"}, like x.

        ``eta`` = 0 is deterministic, 1 has DDPM's posterior variance; one that is negative or so
        large that no room is left for ε raises InputError. ε is taken from the x_0 that clipping
        and ``denoised_fn`` leave. Arguments: :class:`ReverseProcess`.
        """
        ddim_tables = self._ddim_tables_for(eta, x)
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        at = TablesAt(self._tables(x) | ddim_tables, t, x)
        eps, pred_xstart = self._guided_eps(out["pred_xstart"], x, t, at, cond_fn, model_kwargs)
        noise = _step_noise(x, noise, generator)
        mean = at["sqrt_alphas_cumprod_prev"] * pred_xstart + at["ddim_direction"] * eps
        sample = mean + at["ddim_sigma"] * noise  # sigma is 0 where t = 0
        return {"sample": sample.to(x.dtype), "pred_xstart": pred_xstart.to(x.dtype)}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
        *,
        cond_fn: CondFn | None = None,
    ) -> dict[str, Tensor]:
        """x_{t+1} along the deterministic DDIM path, to encode x_0: {"sample", "pred_xstart"}.

        Only eta = 0 has a reverse (InputError otherwise). Arguments: :class:`ReverseProcess`.
        """
        if eta != 0.0:
            raise InputError(f"reverse DDIM is deterministic: eta must be 0, got {eta}")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        at = TablesAt(self._tables(x), t, x)
        eps, pred_xstart = self._guided_eps(out["pred_xstart"], x, t, at, cond_fn, model_kwargs)
        sample = (
            at["sqrt_alphas_cumprod_next"] * pred_xstart
            + at["sqrt_one_minus_alphas_cumprod_next"] * eps
        )
        return {"sample": sample.to(x.dtype), "pred_xstart": pred_xstart.to(x.dtype)}

    def _guided_eps(
        self,
        pred_xstart: Tensor,
        x: Tensor,
        t: Tensor,
        at: TablesAt,
        cond_fn: CondFn | None,
        model_kwargs: dict[str, Any] | None,
    ) -> tuple[Tensor, Tensor]:
        """The ε that a predicted x_0 stands for, moved by a classifier, and the x_0 it takes to."""
        x_t = x.to(at.dtype)
        eps = eps_from_xstart(at, x_t, pred_xstart)
        if cond_fn is None:
            return eps, pred_xstart
        gradient = self._classifier_gradient(cond_fn, x, t, model_kwargs)
        eps = eps - at["sqrt_one_minus_alphas_cumprod"] * gradient
        return eps, xstart_from_eps(at, x_t, eps)

    def _classifier_gradient(
        self, cond_fn: CondFn, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None
    ) -> Tensor:
        timesteps = self._tables(x)["model_timesteps"][t.long()].float()
        gradient = cond_fn(x, timesteps, **(model_kwargs or {}))
        check_like(gradient, "what cond_fn returned", x, "x")
        return gradient.to(arithmetic_dtype(x))

    def _call_model(
        self, model: Model, x: Tensor, at: TablesAt, model_kwargs: dict[str, Any] | None
    ) -> Tensor:
        """The network's output in the dtype of the arithmetic, its shape checked."""
        timesteps = self._tables(x)["model_timesteps"][at.rows].float()
        needs, shape = f"mean_type {self.mean_type!r} with var_type {self.var_type!r}", x.shape
        if self.learns_variance:
            if x.dim() < 2:
                raise InputError(
                    f"var_type {self.var_type!r} needs x of shape (N, C, ...) to split channels, "
                    f"got {tuple(x.shape)}"
                )
            needs += " (mean, then variance channels)"
            shape = torch.Size((x.shape[0], 2 * x.shape[1], *x.shape[2:]))
        return network_output(model, x, timesteps, model_kwargs, shape, needs).to(at.dtype)

    def _interpret(
        self,
        output: Tensor,
        x: Tensor,
        at: TablesAt,
        clip_denoised: bool,
        denoised_fn: DenoisedFn | None = None,
    ) -> dict[str, Tensor]:
        """What the network's whole output says about x_{t-1} and x_0."""
        x = x.to(at.dtype)
        if self.learns_variance:
            output, values = output.chunk(2, dim=1)
            log_variance = self._learned_log_variance(values, at)
            variance = torch.exp(log_variance)
        else:
            log_variance = at["model_log_variance"].expand(x.shape)
            variance = at["model_variance"].expand(x.shape)

        pred_xstart = self._predict_xstart(output, x, at)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
            check_like(pred_xstart, "what denoised_fn returned", x, "x")
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        # A network that predicts the mean itself is taken at its word, clipped x_0 or not.
        mean = output if self.mean_type == "previous_x" else posterior_mean(at, pred_xstart, x)
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
        }

    def _learned_log_variance(self, values: Tensor, at: TablesAt) -> Tensor:
        if self.var_type == "learned":
            return values
        # log β̃ … log β of this (respaced) process.
        return log_variance(values, at["posterior_log_variance_clipped"], at["log_betas"])

    def _predict_xstart(self, output: Tensor, x_t: Tensor, at: TablesAt) -> Tensor:
        """x_0 from the network's output. No form but ε's divides by √ᾱ, which may be 0."""
        if self.mean_type == "epsilon":
            return xstart_from_eps(at, x_t, output)
        if self.mean_type == "v":
            return at["sqrt_alphas_cumprod"] * x_t - at["sqrt_one_minus_alphas_cumprod"] * output
        if self.mean_type == "previous_x":
            return at["xprev_coef_output"] * output - at["xprev_coef_x_t"] * x_t
        return output

    def _named_tables(self) -> dict[str, FloatArray]:
        if self.var_type == "fixed_large":
            variance, log_variance = self.fixed_large_variance, np.log(self.fixed_large_variance)
        else:
            variance, log_variance = self.posterior_variance, self.posterior_log_variance_clipped
        # The published ε divides x_t by √ᾱ first, and recorded results hold its float32 rounding.
        # Where 1/√ᾱ overflows (zero SNR) the form without that division takes over.
        published = self.sqrt_recip_alphas_cumprod < _FLOAT32_MAX
        return super()._named_tables() | {
            "eps_coef_x_t": np.where(published, self.sqrt_recip_alphas_cumprod, 1.0),
            "eps_coef_x_start": np.where(published, 1.0, self.sqrt_alphas_cumprod),
            "eps_divisor": np.where(
                published, self.sqrt_recipm1_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
            ),
            "model_timesteps": self.model_timesteps.astype(np.float64),
            "model_variance": variance,
            "model_log_variance": log_variance,
            "log_betas": np.log(self.betas),
            "sqrt_recip_alphas_cumprod": self.sqrt_recip_alphas_cumprod,
            "sqrt_recipm1_alphas_cumprod": self.sqrt_recipm1_alphas_cumprod,
            "xprev_coef_output": 1.0 / self.posterior_mean_coef1,
            "xprev_coef_x_t": self.posterior_mean_coef2 / self.posterior_mean_coef1,
            "sqrt_alphas_cumprod_prev": np.sqrt(self.alphas_cumprod_prev),
            "sqrt_alphas_cumprod_next": np.sqrt(self.alphas_cumprod_next),
            "sqrt_one_minus_alphas_cumprod_next": np.sqrt(1.0 - self.alphas_cumprod_next),
        }

    def _ddim_tables_for(self, eta: float, x: Tensor) -> dict[str, Tensor]:
        """σ_t and √(1 − ᾱ_{t-1} − σ_t²) of eq. 12 and 16 on x's device, made once per eta."""
        key = (eta, x.device, arithmetic_dtype(x))
        if key not in self._ddim_tables:
            if not (is_finite(eta) and eta >= 0):
                raise InputError(f"eta must be a number from 0 up, got {eta!r}")
            # Eq. 16 at eta = 1 is the posterior variance.
            room = 1.0 - self.alphas_cumprod_prev - eta**2 * self.posterior_variance
            if (room < -1e-12).any():
                ratio = (1.0 - self.alphas_cumprod_prev[1:]) / self.posterior_variance[1:]
                raise InputError(
                    f"eta {eta} draws more noise than a step of this process holds: "
                    f"use at most {math.floor(1000 * math.sqrt(ratio.min())) / 1000}"
                )
            tables = {
                "ddim_sigma": eta * np.sqrt(self.posterior_variance),
                "ddim_direction": np.sqrt(room.clip(min=0.0)),
            }
            self._ddim_tables[key] = to_device(tables, *key[1:])
        return self._ddim_tables[key]

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_ddim_tables": {}}


_FLOAT32_MAX = float(np.finfo(np.float32).max)


def eps_from_xstart(at: TablesAt, x_t: Tensor, x_start: Tensor) -> Tensor:
    """The ε that takes x_start to x_t: (x_t − √ᾱ x_0) / √(1−ᾱ), scaled as the tables say."""
    scaled = at["eps_coef_x_t"] * x_t - at["eps_coef_x_start"] * x_start
    return scaled / at["eps_divisor"]


def xstart_from_eps(at: TablesAt, x_t: Tensor, eps: Tensor) -> Tensor:
    """The x_0 that ε takes to x_t."""
    return at["sqrt_recip_alphas_cumprod"] * x_t - at["sqrt_recipm1_alphas_cumprod"] * eps


def network_output(
    model: Model,
    x: Tensor,
    timesteps: Tensor,
    model_kwargs: dict[str, Any] | None,
    shape: torch.Size,
    needs: str,
) -> Tensor:
    """``model(x, timesteps, **model_kwargs)``, or InputError for other than ``shape``, in floats.

    ``needs`` says what asks for that shape.
    """
    output = model(x, timesteps, **(model_kwargs or {}))
    if not isinstance(output, Tensor) or not output.is_floating_point():
        came = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"the model must answer a floating-point tensor, got {came}: wrap it so that "
            "model(x, t) returns the prediction itself"
        )
    if output.shape != shape:
        raise InputError(
            f"the model answered shape {tuple(output.shape)} for x of shape {tuple(x.shape)}: "
            f"{needs} needs {tuple(shape)}"
        )
    return output


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """``value``, or InputError with the choices."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _step_noise(x: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if noise is None:
        return draw_like(x, generator)
    check_like(noise, "noise", x, "x")
    return noise
