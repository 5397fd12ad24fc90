"""What the references share: the dtype they compute in, and the memory layout of their results."""

import torch
from torch import Tensor


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What tensors stored in ``dtype`` are computed in, as the kernels do: float32 up to the
    result's one rounding; float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    """``y`` with its dimensions in the order in which ``x`` (of its shape) has them in memory.

    Plain views and copies, so that autograd and torch.func go through.
    """
    if x.is_contiguous():
        return y.contiguous()
    order: list[int] = []
    for dim in range(x.dim()):  # torch.compile does not sort by strides it does not know
        place = len(order)
        while place and x.stride(order[place - 1]) < x.stride(dim):
            place -= 1
        order.insert(place, dim)
    back = [order.index(dim) for dim in range(x.dim())]
    return y.permute(order).contiguous().permute(back)
