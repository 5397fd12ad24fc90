"""GroupNorm, FiLM and SiLU as the papers write them, in plain PyTorch.

- h = weight · (x − mean_g) / sqrt(var_g + eps) + bias: Wu & He 2018, equation 1
- h = h · (1 + scale) + shift: FiLM, Nichol & Dhariwal 2021, section 3
- y = h · sigmoid(h): SiLU
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.arithmetic import arithmetic, laid_out_like


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """See ``fastdiff.ops.group_norm_silu``. Float32 for any dtype of ``x`` but float64."""
    dtype = arithmetic(x.dtype)
    weight, bias, scale, shift, add = (
        None if value is None else value.to(dtype) for value in (weight, bias, scale, shift, add)
    )
    h = x.to(dtype)
    if add is not None:
        h = h + _per_channel(add, x)
    h = _group_norm(h, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        h = torch.addcmul(_per_channel(shift, x), h, 1 + _per_channel(scale, x))
    if activation == "silu":
        # In place only where no gradient wants the value before the activation.
        h = F.silu(h, inplace=not h.requires_grad)
    return laid_out_like(h.to(x.dtype), x)


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    """(N, C) so that it broadcasts over x's positions; what has x's shape as it is."""
    return value if value.shape == x.shape else value.view(value.shape + (1,) * (x.dim() - 2))


def _group_norm(
    h: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """GroupNorm of (N, C, *spatial), everything in one dtype."""
    if h.numel() == 0:  # no statistics, and PyTorch's gradients of weight and bias would be NaN
        if weight is None or bias is None:
            return h
        return torch.addcmul(_per_channel(bias[None], h), h, _per_channel(weight[None], h))
    # Contiguous: PyTorch's sums over channels_last cancel where the mean is far from zero.
    # Not F.group_norm, which refuses one sample with groups of one element.
    return torch.group_norm(h.contiguous(), num_groups, weight, bias, eps)
