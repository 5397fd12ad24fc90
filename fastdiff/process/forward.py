"""The forward process q and its posterior in float64: all that is known without a network.

Equation numbers: Ho et al. 2020.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array
from fastdiff.ops.counters import Counters
from fastdiff.ops.normal import draw_like
from fastdiff.ops.q_sample.op import q_sample
from fastdiff.process.schedules import check_betas
from fastdiff.process.tables import TablesAt


def forward_tables(betas: npt.ArrayLike) -> dict[str, Float64Array]:
    """(K,) arrays by name, from the variances of the K steps.

    Raises InputError for betas out of range, a first one that adds no noise, and a signal that ends
    before the last step.
    """
    betas = check_betas(betas)
    if 1.0 - betas[0] == 1.0:
        raise InputError(f"the first beta, {betas[0]}, is too small to add noise in float64")
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas, dtype=np.float64)
    if not (alphas_cumprod[:-1] > 0).all():
        step = int(np.argmin(alphas_cumprod > 0))
        raise InputError(
            f"no signal is left at step {step} of {len(betas)} (alphas_cumprod is 0): "
            "only the last step may reach zero, use fewer steps or smaller betas"
        )
    prev = np.append(1.0, alphas_cumprod[:-1])
    one_minus = 1.0 - alphas_cumprod
    with np.errstate(divide="ignore"):  # infinite where a schedule ends at zero SNR
        sqrt_recip_alphas_cumprod = np.sqrt(1.0 / alphas_cumprod)
        sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / alphas_cumprod - 1.0)

    # The posterior q(x_{t-1} | x_t, x_0), eq. 6-7.
    posterior_variance = betas * (1.0 - prev) / one_minus
    # The first posterior variance is 0: step 1 lends its own, for the sake of the logarithm (the
    # published choice). A process of a single step has no step 1: its beta stands in.
    first = posterior_variance[1] if len(betas) > 1 else betas[0]
    return {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": prev,
        "alphas_cumprod_next": np.append(alphas_cumprod[1:], 0.0),
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "one_minus_alphas_cumprod": one_minus,
        "sqrt_one_minus_alphas_cumprod": np.sqrt(one_minus),
        "log_one_minus_alphas_cumprod": np.log(one_minus),
        "sqrt_recip_alphas_cumprod": sqrt_recip_alphas_cumprod,
        "sqrt_recipm1_alphas_cumprod": sqrt_recipm1_alphas_cumprod,
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": np.log(np.append(first, posterior_variance[1:])),
        "posterior_mean_coef1": betas * np.sqrt(prev) / one_minus,
        "posterior_mean_coef2": (1.0 - prev) * np.sqrt(alphas) / one_minus,
        "fixed_large_variance": np.append(first, betas[1:]),
    }


def noised(
    x_start: Tensor,
    t: Tensor,
    levels: tuple[Tensor, Tensor],
    noise: Tensor | None,
    generator: torch.Generator | None,
    counters: Counters,
) -> tuple[Tensor, Tensor]:
    """(x_t, its noise), both like x_start: noise that is given, or that of ``counters``, drawn in
    the same pass, or torch's. ``levels``: of signal and noise, whose last row is no timestep's.

    Checks t. InputError for noise and a seed.
    """
    if noise is None and counters.seed is None:
        noise = draw_like(x_start, generator)
    signal, sigma = levels[0][:-1], levels[1][:-1]
    step, seed, first = counters
    x_t, drawn = q_sample(
        x_start, t, signal, sigma, noise=noise, seed=seed, step=step, first_sample=first
    )
    assert drawn is not None
    return x_t, drawn


def posterior_mean(at: TablesAt, x_start: Tensor, x_t: Tensor) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x_0), eq. 7."""
    return at["posterior_mean_coef1"] * x_start + at["posterior_mean_coef2"] * x_t


def mean_flat(x: Tensor) -> Tensor:
    """The mean of each sample: (N, ...) to (N,)."""
    return x.mean(dim=tuple(range(1, x.dim()))) if x.dim() > 1 else x
