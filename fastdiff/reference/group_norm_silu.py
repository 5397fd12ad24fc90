"""GroupNorm, FiLM and SiLU as the papers write them, in plain PyTorch.

    h = weight · (x − mean_g) / sqrt(var_g + eps) + bias        Wu & He 2018, equation 1
    h = h · (1 + scale) + shift                                 Nichol & Dhariwal 2021, section 3 (FiLM)
    y = h · sigmoid(h)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """See ``fastdiff.ops.group_norm_silu``; the statistics are float32 whatever the dtype of ``x``."""
    h = _group_norm(x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        # scale, shift (N, C) -> (N, C, 1, ...)
        broadcast = scale.shape + (1,) * (x.dim() - 2)
        scale, shift = scale.to(h.dtype).view(broadcast), shift.to(h.dtype).view(broadcast)
        h = torch.addcmul(shift, h, 1 + scale)
    if activation == "silu":
        # In place only where no gradient wants the value before the activation.
        h = F.silu(h, inplace=not h.requires_grad)
    return h.to(x.dtype)


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """GroupNorm with float32 statistics and, as a rule, the dtype of ``x``."""
    mixed = weight is not None and weight.dtype != x.dtype
    # PyTorch's CPU kernel takes a half-precision x beside float32 parameters; elsewhere x is widened.
    # In channels_last it leaves the vector unit idle when a group is narrower than a vector of
    # halves: there float32 is 1.5 to 4 times faster, casts included.
    if x.device.type != "cpu":
        widen = mixed
    else:
        widen = (mixed and weight.dtype != torch.float32) or _is_narrow_channels_last(x, num_groups)
    if not widen:
        return F.group_norm(x, num_groups, weight, bias, eps)
    weight = None if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    return F.group_norm(x.float(), num_groups, weight, bias, eps).to(x.dtype)


def _is_narrow_channels_last(x: Tensor, num_groups: int) -> bool:
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.dim() == 4
        and x.shape[1] // num_groups < 16
        and x.shape[2] * x.shape[3] < 1024
        and x.stride(1) == 1
        and x.shape[1] > 1
    )
