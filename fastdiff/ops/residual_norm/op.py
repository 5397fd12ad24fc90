"""A residual block's sum, and the norm and SiLU of it and of what stands beside it, in one call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, layouts
from fastdiff.ops.checks import check_activation, check_pair, check_tensor, check_x, refusal
from fastdiff.ops.differentiable import Kernel
from fastdiff.ops.dispatch import OPERATIONS, Operation
from fastdiff.ops.layouts import Maybe, rows
from fastdiff.ops.residual_norm import reference

OP = "residual_norm"
OPERATION = OPERATIONS[OP] = Operation(OP, ("triton",))


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
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """``total = x + residual + add`` and ``silu(group_norm([total, second]))``, statistics in
    float32.

    Args:
        x: (N, C, *spatial), any number of spatial dimensions and any layout; the results have both.
        num_groups: divides C + C2; each group of one sample is normalised.
        weight: (C + C2,), or None for a norm without parameters.
        bias: likewise.
        eps: added to the variance.
        residual: as x, or None.
        add: (C,), such as the bias that a convolution left out, or None.
        second: (N, C2, *spatial) in the dtype of x, channels that follow those of the sum, or None.
        activation: ``"silu"``, or None for the norm alone.
        inplace: write the sum where x stands.

    Returns:
        total (N, C, *spatial), the sum rounded to the dtype of ``x``, which is what is normalised;
        ``x`` itself where nothing is added. And y (N, C + C2, *spatial), in that dtype. Gradients
        are the reference's alone.

    Raises:
        InputError: shapes, dtypes, devices or names that do not fit.

    Source: He et al. 2016, equation 1; Wu & He 2018, equation 1.
    """
    check_x(OP, x)
    call = Arguments(
        x, residual, add, second, weight, bias, num_groups, float(eps), activation is not None
    )
    _check(call)
    check_activation(OP, activation)
    if OPERATION.choose(*call[:6]).backend == "reference":
        named: dict[str, Any] = {"residual": residual, "add": add, "second": second}
        total, y = reference.residual_norm(
            x, num_groups, weight, bias, eps, activation=activation, **named
        )
    elif inplace and backends.launches_directly(*call[:6]):
        return x, _kernel.run(call, (_room(call), x if _adds(call) else None))[0]
    else:
        y, total = _kernel(call)
        total = total if _adds(call) else x
    return x.copy_(total) if inplace and total is not x else total, y


class Arguments(NamedTuple):
    x: Tensor
    residual: Maybe
    add: Maybe
    second: Maybe
    weight: Maybe
    bias: Maybe
    num_groups: int
    eps: float
    silu: bool


def _adds(call: Arguments) -> bool:
    return call.residual is not None or call.add is not None


def _check(call: Arguments) -> None:
    """InputError for tensors that do not fit each other."""
    x, residual, add, second, weight, bias, num_groups, *_ = call
    channels = x.shape[1]
    if residual is not None:
        check_tensor(OP, "residual", residual, x, x.shape)
    if add is not None:
        check_tensor(OP, "add", add, x, (channels,))
    if second is not None:
        more = second.shape[1] if isinstance(second, Tensor) and second.dim() > 1 else 1
        check_tensor(OP, "second", second, x, (x.shape[0], more, *x.shape[2:]))
        if not channels:
            raise refusal(OP, "x", x, "at least one channel before those of second")
        channels += more
    for name, tensor in (("residual", residual), ("second", second)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise refusal(OP, name, tensor, f"{x.dtype}, the dtype of x")
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise InputError(
            f"{OP}: num_groups={num_groups!r}; expected an int that divides {channels} channels"
        )
    check_pair(OP, ("weight", "bias"), weight, bias, x, (channels,))


def _allocate(call: Arguments) -> tuple[Tensor, Maybe]:
    return _room(call), torch.empty_like(call.x) if _adds(call) else None


def _room(call: Arguments) -> Tensor:
    """For y, in the layout of x."""
    x, second = call.x, call.second
    if second is None:
        return torch.empty_like(x)
    n, channels, *size = x.shape
    channels += second.shape[1]
    if x.is_contiguous():
        return x.new_empty(n, channels, *size)
    return x.new_empty(n, *size, channels).movedim(-1, 1)


def _plan(call: Arguments) -> Any:
    from fastdiff.kernels.residual_norm import forward

    return forward(call.x, call.second, call.num_groups, call.eps, call.silu)


def _readable(call: Arguments) -> Arguments:
    """With copies of what no kernel reads as it stands: strange strides and wide dtypes."""
    x, residual, add, second, weight, bias = call[:6]
    like = layouts.in_kernels_layout(x, x)
    if residual is not None:
        residual = layouts.in_layout_of(like, residual)
    if second is not None:
        second = _laid_out(second, like)
    (add,), (weight, bias) = rows(add), rows(weight, bias)
    return Arguments(like, residual, add, second, weight, bias, *call[6:])


def _laid_out(second: Tensor, x: Tensor) -> Tensor:
    """In the layout of x, which has other channels."""
    if x.is_contiguous():
        return second.contiguous()
    last = second.movedim(1, -1)
    return second if last.is_contiguous() else last.contiguous().movedim(-1, 1)


_kernel = Kernel(OP, Arguments, _allocate, _plan, outputs=2, check=_check, readable=_readable)
