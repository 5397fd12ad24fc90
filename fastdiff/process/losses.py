"""What a network is trained by: the published losses of a GaussianDiffusion, and their weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import check_float, check_positive
from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array
from fastdiff.ops.counters import Counters
from fastdiff.process.forward import mean_flat, noised, posterior_mean
from fastdiff.process.likelihood import bound_term
from fastdiff.process.protocol import Gaussian
from fastdiff.process.reverse import Model, call_model, interpret
from fastdiff.process.tables import TablesAt

LOSS_TYPES = ("mse", "rescaled_mse", "kl", "rescaled_kl")


def training_losses(
    process: Gaussian,
    model: Model,
    x_start: Tensor,
    t: Tensor,
    model_kwargs: dict[str, Any] | None,
    noise: Tensor | None,
    generator: torch.Generator | None,
    counters: Counters,
) -> dict[str, Tensor]:
    """``GaussianDiffusion.training_losses``."""
    x_t, noise, at = noisy(process, x_start, t, noise, generator, counters)
    output = call_model(process, model, x_t, at["model_timesteps"].flatten(), model_kwargs)
    # In the dtype of the arithmetic.
    output, x_start, x_t, noise = (value.to(at.dtype) for value in (output, x_start, x_t, noise))
    if process.loss_type in ("kl", "rescaled_kl"):
        out = interpret(process, output, x_t, at, clip_denoised=False)
        vb = bound_term(out, x_start, x_t, at)
        vb = vb * process.num_timesteps if process.loss_type == "rescaled_kl" else vb
        return {"loss": vb, "vb": vb}

    terms = {}
    prediction = output
    if process.learns_variance:
        prediction, values = output.chunk(2, dim=1)
        frozen = torch.cat([prediction.detach(), values], dim=1)
        out = interpret(process, frozen, x_t, at, clip_denoised=False)
        vb = bound_term(out, x_start, x_t, at)
        rescaled = process.loss_type == "rescaled_mse"
        terms["vb"] = vb * (process.num_timesteps / 1000.0) if rescaled else vb
    mse = mean_flat((_target(process.mean_type, x_start, x_t, noise, at) - prediction) ** 2)
    loss = mse
    if process.loss_weighting is not None:
        loss = mse * at["min_snr_weight"].flatten()
    if "vb" in terms:
        loss = loss + terms["vb"]
    return {"loss": loss, "mse": mse} | terms


def noisy(
    process: Gaussian,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor | None,
    generator: torch.Generator | None,
    counters: Counters,
) -> tuple[Tensor, Tensor, TablesAt]:
    """(x_t, its noise, the process's tables at t) of a training step, x_start and t checked."""
    check_float(x_start, "x_start")
    tables = process._tables.on(x_start)
    levels = tables["sqrt_alphas_cumprod"], tables["sqrt_one_minus_alphas_cumprod"]
    x_t, noise = noised(x_start, t, levels, noise, generator, counters)
    return x_t, noise, process._tables.at_checked(t, x_start)


def _target(mean_type: str, x_start: Tensor, x_t: Tensor, noise: Tensor, at: TablesAt) -> Tensor:
    """What the network is to predict."""
    if mean_type == "epsilon":
        return noise
    if mean_type == "x_start":
        return x_start
    if mean_type == "previous_x":
        return posterior_mean(at, x_start, x_t)
    return at["sqrt_alphas_cumprod"] * noise - at["sqrt_one_minus_alphas_cumprod"] * x_start


def min_snr_weight(
    forward: Mapping[str, Float64Array], mean_type: str, gamma: float
) -> Float64Array:
    """min(SNR, γ) on x_0's squared error, as a weight on that of what is predicted.

    Hang et al. 2023 section 3.4, multiplied out so that SNR = ᾱ / (1 − ᾱ) may be 0.
    """
    signal, noise = forward["alphas_cumprod"], forward["one_minus_alphas_cumprod"]
    if mean_type == "epsilon":  # min(SNR, γ) / SNR
        return np.minimum(1.0, gamma * noise / signal)
    if mean_type == "v":  # min(SNR, γ) / (SNR + 1)
        return np.minimum(signal, gamma * noise)
    weight = np.minimum(signal / noise, gamma)
    # x_0 enters the mean of x_{t-1} times coef1.
    return weight / forward["posterior_mean_coef1"] ** 2 if mean_type == "previous_x" else weight


def check_weighting(loss_type: str, loss_weighting: str | None, min_snr_gamma: float) -> None:
    """InputError for a weighting that is none, or that the loss does not take."""
    if loss_weighting not in (None, "min_snr"):
        raise InputError(f"loss_weighting must be None or 'min_snr', got {loss_weighting!r}")
    if loss_weighting is not None and loss_type in ("kl", "rescaled_kl"):
        raise InputError(f"loss_weighting applies to the mse losses, not to {loss_type!r}")
    check_positive("min_snr_gamma", min_snr_gamma)
