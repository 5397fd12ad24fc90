"""What the steps of a program call: operations by position, so that a step binds them once."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.models.resampling import upsample_nearest
from fastdiff.ops.attention.op import attention
from fastdiff.ops.convolution.op import convolution
from fastdiff.ops.convolution.packed import Packed
from fastdiff.ops.convolution.reference import CONVOLUTIONS
from fastdiff.ops.group_norm_silu.op import group_norm_silu
from fastdiff.ops.norm_coefficients.op import norm_coefficients

MEMORY_FORMATS = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}


def convert(x: Tensor, *, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return x.to(dtype, memory_format=layout).contiguous(memory_format=layout)


def convolve(
    x: Tensor,
    weight: Packed,
    bias: Tensor,
    second: Tensor | None,
    coefficients: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    **options: Any,
) -> Any:
    """y, and where ``moments`` are asked for, (y, moments)."""
    y = convolution(
        x,
        weight,
        bias,
        second=second,
        coefficients=coefficients,
        add=add,
        residual=residual,
        **options,
    )
    return y if options.get("moments") else y[0]


def coefficients(
    moments: Tensor,
    weight: Tensor,
    bias: Tensor,
    second: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    groups: int,
    eps: float,
) -> Tensor:
    return norm_coefficients(
        moments, groups, weight, bias, eps, second=second, scale=scale, shift=shift
    )


def attend(qkv: Tensor, *, num_heads: int, order: str, split: bool) -> Tensor:
    """(N, C, *spatial), tokens before channels, of (N, 3C, *spatial). ``split`` is for steps that
    are bound to the library's kernel."""
    return attention(qkv.flatten(2), num_heads, order=order).unflatten(2, qkv.shape[2:])


def plain_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    residual: Tensor | None,
    *,
    stride: Any,
    padding: Any,
    after: int,
) -> Tensor:
    dims = x.dim() - 2
    if after:
        x = F.pad(x, (0, after) * min(dims, 2))
    y = CONVOLUTIONS[dims](x, weight, bias, stride, padding)
    if add is not None:
        y += add.reshape(*add.shape, *(1,) * dims)
    if residual is not None:
        y += residual
    return y


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None = None,
    *,
    groups: int,
    eps: float,
    activation: str | None,
) -> Tensor:
    """``add``: (N, C) or (C,), added to x before the norm."""
    if add is not None and add.dim() == 1:
        add = add.expand(x.shape[0], -1)
    return group_norm_silu(
        x, groups, weight, bias, eps, scale=scale, shift=shift, add=add, activation=activation
    )


def concat(x: Tensor, second: Tensor) -> Tensor:
    return torch.cat([x, second], dim=1)


def upsample(x: Tensor, *, size: Sequence[int]) -> Tensor:
    return upsample_nearest(x, size)
