"""q(x_t | x_0) as Ho et al. 2020 eq. 4 writes it."""

import torch
from torch import Tensor

from fastdiff.ops.arithmetic import arithmetic


def q_sample(
    x_start: Tensor,  # (N, ...)
    t: Tensor,  # (N,) int64
    sqrt_alphas_cumprod: Tensor,  # (K,)
    sqrt_one_minus_alphas_cumprod: Tensor,  # (K,)
    noise: Tensor,  # like x_start
) -> Tensor:
    """x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · noise in float32 (float64 for float64), in x_start's dtype.

    A sample whose t lies outside 0 … K-1 comes out as NaN: nothing is read out of bounds and no
    device has to be asked.
    """
    dtype = arithmetic(x_start.dtype)
    row = t.clamp(0, len(sqrt_alphas_cumprod) - 1)
    shape = (-1,) + (1,) * (x_start.dim() - 1)
    signal, sigma = (
        torch.where(t == row, table[row].to(dtype), torch.nan).view(shape)
        for table in (sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod)
    )
    return (signal * x_start.to(dtype) + sigma * noise.to(dtype)).to(x_start.dtype)
