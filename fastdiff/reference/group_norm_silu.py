"""GroupNorm, FiLM and SiLU as the papers write them, in plain PyTorch.

- h = weight · (x − mean_g) / sqrt(var_g + eps) + bias: Wu & He 2018, equation 1
- h = h · (1 + scale) + shift: FiLM, Nichol & Dhariwal 2021, section 3
- y = h · sigmoid(h): SiLU
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


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
    """See ``fastdiff.ops.group_norm_silu``. The statistics are float32 for any dtype of ``x``."""
    h = x if add is None else x + _per_channel(add.to(x.dtype), x)
    h = _group_norm(h, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        scale, shift = _per_channel(scale.to(h.dtype), x), _per_channel(shift.to(h.dtype), x)
        h = torch.addcmul(shift, h, 1 + scale)
    if activation == "silu":
        # In place only where no gradient wants the value before the activation.
        h = F.silu(h, inplace=not h.requires_grad)
    return h.to(x.dtype)


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    """(N, C) so that it broadcasts over x's positions; what has x's shape as it is."""
    return value if value.shape == x.shape else value.view(value.shape + (1,) * (x.dim() - 2))


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """GroupNorm with float32 statistics (float64 for a float64 ``x``), in the dtype of ``x``."""
    if _fits_as_is(x, weight, bias):
        # Not F.group_norm, which refuses one sample with groups of one element.
        return torch.group_norm(x, num_groups, weight, bias, eps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return torch.group_norm(x.to(dtype), num_groups, weight, bias, eps).to(x.dtype)


def _fits_as_is(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """One dtype throughout, or what only PyTorch's CPU kernel takes: half x, float32 parameters."""
    if weight is None or bias is None or weight.dtype == bias.dtype == x.dtype:
        return True
    if weight.dtype != bias.dtype:
        return False
    return x.device.type == "cpu" and x.dtype in HALF and weight.dtype == torch.float32
