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
    """GroupNorm in the dtype PyTorch is fast in: its CPU kernel takes a bfloat16 ``x`` beside float32
    parameters and sums in float32; elsewhere a mixed call is not allowed, so ``x`` is widened."""
    if weight is not None and weight.dtype != x.dtype:
        if x.device.type != "cpu" or weight.dtype != torch.float32:
            return F.group_norm(
                x.float(), num_groups, weight.float(), None if bias is None else bias.float(), eps
            )
    return F.group_norm(x, num_groups, weight, bias, eps)
