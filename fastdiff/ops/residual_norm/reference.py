"""A residual block's sum and the norm that reads it, in plain PyTorch.

- total = x + residual + add, rounded once: what the block answers (He et al. 2016, equation 1)
- y = silu(group_norm([total, second])): Wu & He 2018, equation 1; the channels of a U-Net's skip
  beside it, Ronneberger et al. 2015
"""

import torch
from torch import Tensor

from fastdiff.ops.arithmetic import arithmetic, laid_out_like
from fastdiff.ops.group_norm_silu.reference import group_norm_silu


def residual_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    add: Tensor | None = None,
    second: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """See ``fastdiff.ops.residual_norm``."""
    total = x
    if residual is not None or add is not None:
        total = x.to(arithmetic(x.dtype))
        if residual is not None:
            total = total + residual
        if add is not None:
            total = total + add.to(total.dtype).view(-1, *(1,) * (x.dim() - 2))
        total = laid_out_like(total.to(x.dtype), x)
    both = total if second is None else torch.cat([total, second], dim=1)
    y = group_norm_silu(both, num_groups, weight, bias, eps, activation=activation)
    return total, y
