"""A group norm as a scale and a shift, in plain PyTorch: Wu & He 2018, equation 1, with the mean
and the variance of a group from those of its channels; FiLM, Nichol & Dhariwal 2021, section 3."""

import torch
from torch import Tensor


def norm_coefficients(
    moments: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    second: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """See ``fastdiff.ops.norm_coefficients.op.norm_coefficients``."""
    moments = moments if second is None else torch.cat([moments, second], dim=2)
    n, _, channels = moments.shape
    mean, variance = moments.reshape(n, 2, groups, channels // groups).unbind(1)
    # Every channel has as many positions: a group's variance is what its channels have and what
    # their means have.
    variance = variance.mean(2) + (mean - mean.mean(2, keepdim=True)).square().mean(2)
    rstd = torch.rsqrt(variance + eps).repeat_interleave(channels // groups, dim=1)
    mean = mean.mean(2).repeat_interleave(channels // groups, dim=1)
    gain = rstd * weight.to(mean.dtype)
    offset = bias.to(mean.dtype) - mean * gain
    if scale is not None and shift is not None:
        scale, shift = (t.to(mean.dtype).reshape(n, channels) for t in (scale, shift))
        gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
    return torch.stack([gain, offset], dim=1)
