"""What the steps of a program call on a GPU alone, beside functions.py.

Images are (N, C, *spatial) with channels last, so that a product reads them as they lie: a row for
each position.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.residual_norm.op import residual_norm


def convolve(x: Tensor, weight: Tensor, *, stride: int, padding: int) -> Tensor:
    """Without its bias, which cuDNN leaves to a kernel of its own."""
    return F.conv2d(x, weight, None, stride, padding)


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution with a kernel of one, by the first columns of its weight."""
    columns = weight.flatten(1)[:, : x.shape[1]]
    y = F.linear(_positions(x), columns, bias)
    return y.view(x.shape[0], *x.shape[2:], len(weight)).movedim(-1, 1)


def accumulate(y: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Add to y the product of what stands beside its x, by the last columns."""
    columns = weight.flatten(1)[:, -second.shape[1] :]
    rows = _positions(second)
    y.movedim(1, -1).view(len(rows), y.shape[1]).addmm_(rows, columns.t())
    return y


def add(y: Tensor, more: Tensor) -> Tensor:
    """Add to y, where it stands, what is like it, (N, C) or (C,)."""
    return y.add_(more if more.dim() == y.dim() else more[..., None, None])


def narrow(y: Tensor, bias: Tensor) -> Tensor:
    """The first channels with their bias, in its dtype."""
    return y[:, : len(bias)] + bias[:, None, None]


def widen(x: Tensor, *, channels: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """x in that dtype and layout, with zeros behind its channels."""
    shape = (x.shape[0], channels, *x.shape[2:])
    room = torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout).zero_()
    room[:, : x.shape[1]].copy_(x)
    return room


def pad(x: Tensor, *, after: int) -> Tensor:
    return F.pad(x, (0, after, 0, after))


def sum_and_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    add: Tensor | None,
    second: Tensor | None,
    *,
    groups: int,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor] | Tensor:
    """y, and the sum, where x stood; y alone where nothing is added."""
    total, y = residual_norm(
        x, groups, weight, bias, eps, residual=residual, add=add, second=second,
        activation=activation, inplace=True,
    )  # fmt: skip
    return y if residual is None and add is None else (y, total)


def _positions(x: Tensor) -> Tensor:
    """(N·T, C), a view."""
    return x.movedim(1, -1).flatten(0, -2)
