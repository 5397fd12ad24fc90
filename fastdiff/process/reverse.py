"""The reverse process p(x_{t-1} | x_t): what a network's output means, and steps that draw from it.

Equations: DDPM, Ho et al. 2020; learned variances, Nichol & Dhariwal 2021 eq. 15; DDIM, Song et al.
2020 (arXiv:2010.02502) eq. 12; v-prediction, Salimans & Ho 2022 (arXiv:2202.00512) appendix D.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import check_float, check_like, check_timesteps
from fastdiff.errors import InputError
from fastdiff.methods.inversion import upward
from fastdiff.methods.levels import Float64Array, is_learned
from fastdiff.methods.protocol import Process
from fastdiff.methods.table import Index, StepTable
from fastdiff.ops.normal import draw_like
from fastdiff.ops.posterior_step.reference import log_variance
from fastdiff.process.forward import posterior_mean
from fastdiff.process.protocol import Gaussian
from fastdiff.process.tables import TablesAt, arithmetic_dtype
from fastdiff.process.update import (
    ClassifierGuidance,
    CondFn,
    DenoisedFn,
    Update,
    XStart,
    at_row,
    classifier_gain,
    mean_is_output,
)

MEAN_TYPES = ("epsilon", "x_start", "v", "previous_x")
VAR_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")

Model = Callable[..., Tensor]
_FLOAT32_MAX = float(np.finfo(np.float32).max)


# --- What a network's output means ------------------------------------------------------------


def reverse_tables(
    forward: Mapping[str, Float64Array], mean_type: str, var_type: str
) -> dict[str, Float64Array]:
    """What ``interpret`` and ``eps_from_xstart`` read beside the forward process's tables."""
    recip = forward["sqrt_recip_alphas_cumprod"]
    if mean_type == "epsilon" and recip[-1] > _FLOAT32_MAX:
        raise InputError(
            "epsilon prediction cannot recover x_0 at the last step of this schedule, where no "
            "signal is left (zero terminal SNR): use mean_type 'v' or 'x_start'"
        )
    variance = forward["posterior_variance"]
    log_of_variance = forward["posterior_log_variance_clipped"]
    if var_type == "fixed_large":
        variance = forward["fixed_large_variance"]
        log_of_variance = np.log(variance)
    # The published ε divides x_t by √ᾱ first, and recorded results hold its float32 rounding.
    # Where 1/√ᾱ overflows (zero SNR) the form without that division takes over.
    published = recip < _FLOAT32_MAX
    sqrt_one_minus = forward["sqrt_one_minus_alphas_cumprod"]
    return {
        "eps_coef_x_t": np.where(published, recip, 1.0),
        "eps_coef_x_start": np.where(published, 1.0, forward["sqrt_alphas_cumprod"]),
        "eps_divisor": np.where(published, forward["sqrt_recipm1_alphas_cumprod"], sqrt_one_minus),
        "model_variance": variance,
        "model_log_variance": log_of_variance,
        "log_betas": np.log(forward["betas"]),
        "xprev_coef_output": 1.0 / forward["posterior_mean_coef1"],
        "xprev_coef_x_t": forward["posterior_mean_coef2"] / forward["posterior_mean_coef1"],
    }


def interpret(
    process: Gaussian,
    output: Tensor,
    x: Tensor,
    at: TablesAt,
    clip_denoised: bool,
    denoised_fn: DenoisedFn | None = None,
) -> dict[str, Tensor]:
    """What the network's whole output says about x_{t-1} and x_0."""
    output, x = output.to(at.dtype), x.to(at.dtype)
    if process.learns_variance:
        output, values = output.chunk(2, dim=1)
        logarithm = values
        if process.var_type == "learned_range":  # log β̃ … log β of this (respaced) process
            low, high = at["posterior_log_variance_clipped"], at["log_betas"]
            logarithm = log_variance(values, low, high)
        variance = torch.exp(logarithm)
    else:
        logarithm = at["model_log_variance"].expand(x.shape)
        variance = at["model_variance"].expand(x.shape)

    x_start = predict_xstart(process.mean_type, output, x, at)
    if denoised_fn is not None:
        x_start = denoised_fn(x_start)
        check_like(x_start, "what denoised_fn returned", x, "x")
    if clip_denoised:
        x_start = x_start.clamp(-1, 1)
    # A network that predicts the mean itself is taken at its word, clipped x_0 or not.
    mean = output if process.mean_type == "previous_x" else posterior_mean(at, x_start, x)
    return {"mean": mean, "variance": variance, "log_variance": logarithm, "pred_xstart": x_start}


def predict_xstart(mean_type: str, output: Tensor, x_t: Tensor, at: TablesAt) -> Tensor:
    """x_0 from the network's output. No form but ε's divides by √ᾱ, which may be 0."""
    if mean_type == "epsilon":
        return at["sqrt_recip_alphas_cumprod"] * x_t - at["sqrt_recipm1_alphas_cumprod"] * output
    if mean_type == "v":
        return at["sqrt_alphas_cumprod"] * x_t - at["sqrt_one_minus_alphas_cumprod"] * output
    if mean_type == "previous_x":
        return at["xprev_coef_output"] * output - at["xprev_coef_x_t"] * x_t
    return output


def eps_from_xstart(at: TablesAt, x_t: Tensor, x_start: Tensor) -> Tensor:
    """The ε that takes x_start to x_t: (x_t − √ᾱ x_0) / √(1−ᾱ), scaled as the tables say."""
    scaled = at["eps_coef_x_t"] * x_t - at["eps_coef_x_start"] * x_start
    return scaled / at["eps_divisor"]


def call_model(
    process: Process,
    model: Model,
    x: Tensor,
    timesteps: Tensor,
    model_kwargs: Mapping[str, Any] | None,
) -> Tensor:
    """The network's output, its shape checked; ``timesteps`` (N,)."""
    needs, shape = f"mean_type {process.mean_type!r} with var_type {process.var_type!r}", x.shape
    if is_learned(process.var_type):
        if x.dim() < 2:
            raise InputError(
                f"var_type {process.var_type!r} needs x of shape (N, C, ...) to split channels, "
                f"got {tuple(x.shape)}"
            )
        needs += " (mean, then variance channels)"
        shape = torch.Size((x.shape[0], 2 * x.shape[1], *x.shape[2:]))
    return network_output(model, x, timesteps.float(), model_kwargs, shape, needs)


def network_output(
    model: Model,
    x: Tensor,
    timesteps: Tensor,
    model_kwargs: Mapping[str, Any] | None,
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


def flagged_choice(what: str, name: str | None, flags: dict[str, bool], default: str) -> str:
    """The explicit name; else that of the first flag that is set; else the default."""
    flagged = next((choice for choice, chosen in flags.items() if chosen), None)
    if name is None:
        return flagged or default
    if flagged not in (None, name):
        raise InputError(f"{what}={name!r} contradicts the flag that chooses {flagged!r}: give one")
    return name


# --- One step ---------------------------------------------------------------------------------


@dataclass
class StepArguments:
    """What one step of a published method is given.

    ``model``: called ``model(x, timesteps, **model_kwargs)`` with x (N, C, ...) and float32 (N,)
    timesteps; answers (N, C, ...), or (N, 2C, ...) where the variance is learned. Any callable.
    ``x``, ``t``: (N, C, ...) float and (N,) integer, the index into the process's K steps.
    ``denoised_fn``: applied to the predicted x_0, before clipping; ``clip_denoised`` clips it to
    [-1, 1].
    ``cond_fn``: guidance by a classifier, cond_fn(x, timesteps, **model_kwargs) = ∇ log p(y | x_t)
    like x (Dhariwal & Nichol 2021, arXiv:2105.05233): ``p_sample`` moves the mean by variance times
    that (algorithm 1), the DDIM methods ε by −√(1 − ᾱ_t) times that (algorithm 2).
    ``noise``: the N(0, 1) draw of x's shape; ``generator``: where it is drawn from when None. The
    draw is made even where it is not used (t = 0, DDIM with eta = 0), as published, so that equal
    seeds give equal samples.
    """

    model: Model
    x: Tensor
    t: Tensor
    clip_denoised: bool = True
    denoised_fn: DenoisedFn | None = None
    model_kwargs: dict[str, Any] | None = None
    _: KW_ONLY
    noise: Tensor | None = None
    cond_fn: CondFn | None = None
    generator: torch.Generator | None = None


@dataclass
class DDIMStepArguments(StepArguments):
    """:class:`StepArguments`, and DDIM's ``eta``."""

    eta: float = 0.0


def step_at(
    process: Gaussian, method: str, given: StepArguments, eta: float = 0.0
) -> dict[str, Tensor]:
    """One step from ``given.t``, each sample's own: {"sample", "pred_xstart"}, like x."""
    step = ReverseStep(process, method, given.x, given, eta)
    return step(given.x, rows_of(given.t, given.x, process.num_timesteps), given.noise)


class ReverseStep:
    """One step of a published method, by the rows of its step table: "ddpm", "ddim", or
    "ddim_reverse", which is DDIM's the other way. A loop makes it once.

    ``given``: StepArguments, or a loop's, which has the same.
    """

    def __init__(
        self,
        process: Gaussian,
        method: str,
        x: Tensor,
        given: Any,
        eta: float = 0.0,
    ):
        check_float(x, "x")
        dtype, clip_denoised = arithmetic_dtype(x), bool(given.clip_denoised)
        key = (method, eta, clip_denoised, x.device, dtype)
        if key not in process._step_tables:
            with torch.inference_mode(False):  # others may want gradients through what is made
                options: dict[str, Any] = {"eta": eta, "clip_denoised": clip_denoised}
                name = method.removesuffix("_reverse")
                table = StepTable.from_process(process, method=name, dtype=dtype, **options)
                if name != method:
                    table = _upward(process, table)
                table = table.to(x.device)
                process._step_tables[key] = table, classifier_gain(process, table)
        self.table, gain = process._step_tables[key]
        self.process, self.method, self.given = process, method, given
        is_output = mean_is_output(process, self.table)
        self.update = Update(self.table, XStart(given.denoised_fn), is_output)
        self.classifier = None
        if given.cond_fn is not None:
            self.classifier = ClassifierGuidance(given.cond_fn, self.table, gain)

    def __call__(self, x: Tensor, i: Index, noise: Tensor | None) -> dict[str, Tensor]:
        """{"sample", "pred_xstart"}, like x; without ``noise`` it is drawn, after the network."""
        model, kwargs = self.given.model, self.given.model_kwargs or {}
        timesteps = at_row(self.table.timesteps, i, x).float().flatten().expand(len(x))
        output = call_model(self.process, model, x, timesteps, kwargs)
        output = output.to(self.table.packed.dtype)
        if noise is not None:
            check_like(noise, "noise", x, "x")
        elif self.method != "ddim_reverse":
            noise = draw_like(x, self.given.generator)
        x_prev, x_start = self.update(x, output, i, noise=noise)
        if self.classifier is not None:
            given = (x, timesteps, kwargs, output, i)
            x_prev, x_start = self.classifier.apply(*given, x_prev, x_start)
        return {"sample": x_prev, "pred_xstart": x_start}


def rows_of(t: Tensor, x: Tensor, num_timesteps: int) -> Index:
    """The rows of a step table at ``t`` (N,), checked: one number where all samples are at the same
    step and it costs no wait to see that."""
    t = check_timesteps(t, x, num_timesteps)
    if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
        first = int(t[0])
        if bool((t == first).all()):
            return num_timesteps - 1 - first
    return num_timesteps - 1 - t


def _upward(process: Gaussian, ddim: StepTable) -> StepTable:
    """The deterministic DDIM table's steps the other way, to x_{t+1}; the last to noise alone."""
    following = process.alphas_cumprod_next
    return upward(ddim, process, np.sqrt(following), np.sqrt(1.0 - following))
