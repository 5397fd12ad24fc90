"""The likelihood: its terms in nats and bits, bits/dim and rate-distortion.

Images are uint8 values scaled to [-1, 1]: one grey level is 2/255, and an error of 1 there is 127.5
grey levels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.checks import check_float, check_like
from fastdiff.errors import InputError
from fastdiff.ops.counters import sampling_step
from fastdiff.ops.normal import draw_like, normal
from fastdiff.process.forward import mean_flat, posterior_mean
from fastdiff.process.protocol import Gaussian
from fastdiff.process.published_loops import StepNoise, countdown, noise_of_step
from fastdiff.process.reverse import Model, eps_from_xstart
from fastdiff.process.tables import TablesAt


def normal_kl(
    mean1: Tensor | float,
    logvar1: Tensor | float,
    mean2: Tensor | float,
    logvar2: Tensor | float,
) -> Tensor:
    """KL(N(mean1, exp logvar1) ‖ N(mean2, exp logvar2)) in nats, elementwise.

    Arguments broadcast; at least one must be a tensor (InputError otherwise).
    """
    given = (mean1, logvar1, mean2, logvar2)
    like = next((value for value in given if isinstance(value, Tensor)), None)
    if like is None:
        raise InputError("normal_kl needs at least one tensor among its arguments, got numbers")
    # A number becomes a 0-dim CPU tensor: it joins tensors of any device without a copy or a sync.
    logvar1, logvar2 = (
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=like.dtype)
        for value in (logvar1, logvar2)
    )
    squared_error = (mean1 - mean2) ** 2
    return 0.5 * (
        -1.0
        + logvar2
        - logvar1
        + torch.exp(logvar1 - logvar2)
        + squared_error * torch.exp(-logvar2)
    )


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """(1 + tanh(√(2/π)(x + 0.044715 x³))) / 2: the standard normal CDF to within 2e-4."""
    # Saturated long before ±100, where x³ is still far from overflow: an infinity would turn the
    # gradient of tanh (zero there) into NaN.
    x = x.clamp(-100.0, 100.0)
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability of uint8 images in [-1, 1] under a Gaussian cut into 256 bins: nats, like x.

    ``means`` and ``log_scales`` (log standard deviation) have x's shape (InputError otherwise).
    The bins are ±1/255 wide around each grey level and the two edge bins are open
    (Ho et al. 2020 eq. 13); probabilities are floored at 1e-12.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise InputError(
            "x, means and log_scales must have one shape, "
            f"got {tuple(x.shape)}, {tuple(means.shape)}, {tuple(log_scales.shape)}"
        )
    centered = x - means
    inv_std = torch.exp(-log_scales)
    cdf_plus = approx_standard_normal_cdf(inv_std * (centered + 1.0 / 255.0))
    cdf_minus = approx_standard_normal_cdf(inv_std * (centered - 1.0 / 255.0))
    # Every branch is finite before `where` chooses: the gradient of an unchosen NaN is NaN.
    log_cdf_plus = torch.log(cdf_plus.clamp(min=1e-12))
    log_one_minus_cdf_minus = torch.log((1.0 - cdf_minus).clamp(min=1e-12))
    log_cdf_delta = torch.log((cdf_plus - cdf_minus).clamp(min=1e-12))
    inner = torch.where(x > 0.999, log_one_minus_cdf_minus, log_cdf_delta)
    return torch.where(x < -0.999, log_cdf_plus, inner)


# --- The variational bound --------------------------------------------------------------------


def bound_term(out: dict[str, Tensor], x_start: Tensor, x_t: Tensor, at: TablesAt) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) ‖ p), at t = 0 the decoder's NLL; (N,) in bits/dim.

    ``out``: what ``p_mean_variance`` answers.
    """
    kl = normal_kl(
        posterior_mean(at, x_start, x_t),
        at["posterior_log_variance_clipped"],
        out["mean"],
        out["log_variance"],
    )
    nll = -discretized_gaussian_log_likelihood(
        x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
    )
    return torch.where(at.rows == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)


def prior_bpd(process: Gaussian, x_start: Tensor) -> Tensor:
    """``GaussianDiffusion.prior_bpd``."""
    check_float(x_start, "x_start")
    t = torch.full(x_start.shape[:1], process.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = process.q_mean_variance(x_start, t)
    return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)


def vb_terms_bpd(
    process: Gaussian,
    model: Model,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The bound's term at t, (N,) in bits/dim, and the predicted x_0, like x_t."""
    check_like(x_start, "x_start", x_t, "x_t")
    out = process.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
    at = process._tables.at_checked(t, x_t)
    return bound_term(out, x_start.to(at.dtype), x_t.to(at.dtype), at), out["pred_xstart"]


@torch.no_grad()
def bpd_loop(
    process: Gaussian,
    model: Model,
    x_start: Tensor,
    clip_denoised: bool,
    model_kwargs: dict[str, Any] | None,
    noise: StepNoise | None,
    generator: torch.Generator | None,
    progress: bool,
) -> dict[str, Tensor]:
    """``GaussianDiffusion.calc_bpd_loop``."""
    check_float(x_start, "x_start")
    columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
    for i in countdown(process.num_timesteps, progress):
        t = torch.full(x_start.shape[:1], i, dtype=torch.int64, device=x_start.device)
        eps = noise_of_step(noise, i)
        if eps is None:
            eps = draw_like(x_start, generator)
        x_t = process.q_sample(x_start, t, eps)
        vb, pred_xstart = vb_terms_bpd(process, model, x_start, x_t, t, clip_denoised, model_kwargs)
        at = process._tables.at_checked(t, x_start)
        pred_eps = eps_from_xstart(at, x_t.to(at.dtype), pred_xstart)
        columns["vb"].append(vb)
        columns["xstart_mse"].append(mean_flat((pred_xstart - x_start) ** 2))
        columns["mse"].append(mean_flat((pred_eps - eps) ** 2))
    terms = {name: torch.stack(column, dim=1) for name, column in columns.items()}
    prior = prior_bpd(process, x_start)
    return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior} | terms


# --- What is made of it -----------------------------------------------------------------------


@dataclass(frozen=True)
class BitsPerDim:
    """Dataset averages of the variational bound, in bits per dimension, with standard errors.

    ``total`` = ``prior`` + ``rate`` + ``decoder``: the KL of q(x_T | x_0) from the prior, the KL
    terms of the steps (t > 0), and the decoder's negative log-likelihood (t = 0). Each ``*_stderr``
    is the sample standard deviation over images / √count (NaN for a single image).
    ``vb``, ``xstart_mse`` and ``mse`` are per-step averages, float64 (K,), step t at index t.
    """

    count: int
    total: float
    total_stderr: float
    prior: float
    prior_stderr: float
    rate: float
    rate_stderr: float
    decoder: float
    decoder_stderr: float
    vb: npt.NDArray[np.float64]
    xstart_mse: npt.NDArray[np.float64]
    mse: npt.NDArray[np.float64]


BpdTerms = Mapping[str, Tensor]


def counter_noise(x: Tensor, seed: int, first_sample: int) -> Callable[[int], Tensor]:
    """The draws of ``calc_bpd_loop`` at every step t, of x's shape (N, ...), by the counter
    generator: sample i is number ``first_sample + i``, in any batch and on any rank."""
    return lambda t: normal(
        x.shape, seed=seed, step=sampling_step(t), first_sample=first_sample, device=x.device
    )


def summarize_bpd(batches: BpdTerms | Sequence[BpdTerms]) -> BitsPerDim:
    """Average what calc_bpd_loop returned for one batch or several.

    Raises InputError where there are no images, and for dictionaries that lack its terms.
    """
    terms = _collect(batches)
    total, prior, vb = terms["total_bpd"], terms["prior_bpd"], terms["vb"]
    return BitsPerDim(
        len(total),
        *_mean_and_stderr(total),
        *_mean_and_stderr(prior),
        *_mean_and_stderr(vb[:, :-1].sum(axis=1)),
        *_mean_and_stderr(vb[:, -1]),
        vb=vb.mean(axis=0)[::-1].copy(),
        xstart_mse=terms["xstart_mse"].mean(axis=0)[::-1].copy(),
        mse=terms["mse"].mean(axis=0)[::-1].copy(),
    )


@dataclass(frozen=True)
class RateDistortion:
    """Progressive coding, one row per moment of the transmission; arrays of length K + 1.

    Row i < K: the receiver holds x_t for ``timestep`` t = K-1-i, having received ``rate`` bits/dim
    in all, and its best guess of x_0 is off by ``distortion`` (root mean square on the 0…255
    scale). The last row (timestep -1) is the lossless end: the whole bound, no distortion.
    """

    timestep: npt.NDArray[np.int64]
    rate: npt.NDArray[np.float64]
    distortion: npt.NDArray[np.float64]


def rate_distortion(batches: BpdTerms | Sequence[BpdTerms]) -> RateDistortion:
    """The rate-distortion table of calc_bpd_loop's results (Ho et al. 2020 section 4.3, figure 5).

    Sending x_t costs the prior term and the KL terms of all later steps; the squared error of the
    predicted x_0 is averaged over the images before the root is taken.
    """
    terms = _collect(batches)
    vb = terms["vb"].mean(axis=0)  # (K,), noisiest step first, as calc_bpd_loop stacks them
    mse = terms["xstart_mse"].mean(axis=0)
    rate = terms["prior_bpd"].mean() + np.append(0.0, np.cumsum(vb))
    return RateDistortion(
        timestep=np.arange(len(vb) - 1, -2, -1, dtype=np.int64),
        rate=rate,
        distortion=np.append(127.5 * np.sqrt(mse), 0.0),
    )


def _collect(batches: BpdTerms | Sequence[BpdTerms]) -> dict[str, npt.NDArray[np.float64]]:
    if isinstance(batches, Mapping):
        batches = [batches]
    names = ("total_bpd", "prior_bpd", "vb", "xstart_mse", "mse")
    if missing := [name for batch in batches for name in names if name not in batch]:
        raise InputError(f"{missing[0]!r} is missing: expected what calc_bpd_loop returns")
    if not batches or not sum(len(batch["total_bpd"]) for batch in batches):
        raise InputError("there are no images to average the likelihood over")
    return {
        name: torch.cat([batch[name].detach().double().cpu() for batch in batches]).numpy()
        for name in names
    }


def _mean_and_stderr(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    count = len(values)
    stderr = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return float(values.mean()), stderr
