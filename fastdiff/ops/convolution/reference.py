"""A normalised, activated, concatenated input's convolution and what is added to it, in plain
PyTorch.

- h = silu(coefficients₀·[x, second] + coefficients₁): the norm (and FiLM) of Wu & He 2018,
  equation 1, as a scale and a shift per sample and channel
- y = conv(h) + bias + add + residual: Ho et al. 2020, appendix B (their residual block)
- moments: the mean and the biased variance of y per sample and channel, of which
  ``norm_coefficients`` makes the next norm's coefficients
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.arithmetic import arithmetic

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    second: Tensor | None = None,
    coefficients: Tensor | None = None,
    activation: str | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: tuple[int, int] = (0, 0),
    upsample: bool = False,
    moments: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See ``fastdiff.ops.convolution.op.convolution``. Float32 for any dtype of ``x`` but float64;
    the products are of inputs rounded to the dtype of ``weight``."""
    dtype, spatial = arithmetic(x.dtype), x.dim() - 2
    ones = (1,) * spatial
    h = x if second is None else torch.cat([x, second], dim=1)
    h = h.to(dtype)
    if coefficients is not None:
        scale, shift = coefficients.to(dtype).unbind(1)
        h = h * scale.reshape(*scale.shape, *ones) + shift.reshape(*shift.shape, *ones)
    if activation == "silu":
        h = F.silu(h)
    if upsample:
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
    h = F.pad(h.to(weight.dtype), padding * spatial)
    y = CONVOLUTIONS[spatial](h.to(dtype), weight.to(dtype), None, stride)
    for row in (bias, add):
        if row is not None:
            y = y + row.to(dtype).reshape(-1, y.shape[1], *ones)
    if residual is not None:
        y = y + residual.to(dtype)
    layout = torch.channels_last if spatial == 2 else torch.contiguous_format
    found = moments_of(y) if moments else None
    return y.to(x.dtype).contiguous(memory_format=layout), found


def moments_of(x: Tensor) -> Tensor:
    """The mean and the biased variance of each sample's channels, (N, 2, C)."""
    positions = x.flatten(2).to(arithmetic(x.dtype))
    return torch.stack([positions.mean(2), positions.var(2, unbiased=False)], dim=1)
