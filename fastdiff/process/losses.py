"""The training losses of a GaussianDiffusion and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.process.forward import mean_flat, posterior_mean
from fastdiff.process.likelihood import bound_term
from fastdiff.process.protocol import FloatArray
from fastdiff.process.reverse import interpret
from fastdiff.process.tables import TablesAt

if TYPE_CHECKING:
    from fastdiff.process.gaussian import GaussianDiffusion

LOSS_TYPES = ("mse", "rescaled_mse", "kl", "rescaled_kl")


def losses_of(
    process: GaussianDiffusion,
    output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    at: TablesAt,
) -> dict[str, Tensor]:
    """{"loss"} and its parts, (N,) each, of what the network answered to x_t."""
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


def _target(mean_type: str, x_start: Tensor, x_t: Tensor, noise: Tensor, at: TablesAt) -> Tensor:
    """What the network is to predict."""
    if mean_type == "epsilon":
        return noise
    if mean_type == "x_start":
        return x_start
    if mean_type == "previous_x":
        return posterior_mean(at, x_start, x_t)
    return at["sqrt_alphas_cumprod"] * noise - at["sqrt_one_minus_alphas_cumprod"] * x_start


def min_snr_weight(forward: Mapping[str, FloatArray], mean_type: str, gamma: float) -> FloatArray:
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
    if not (is_finite(min_snr_gamma) and min_snr_gamma > 0):
        raise InputError(f"min_snr_gamma must be a positive number, got {min_snr_gamma!r}")
