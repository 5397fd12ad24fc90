"""Launching group_norm_silu's kernels: tensors to memory layouts, row strides and addresses."""

import functools
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import layouts, native
from fastdiff.ops.differentiable import Kernel, differentiable_once
from fastdiff.ops.layouts import Maybe, address, code, row_stride, rows
from fastdiff.ops.plans import LARGEST_CACHE, plan_of


class Arguments(NamedTuple):
    x: Tensor
    weight: Maybe
    bias: Maybe
    scale: Maybe
    shift: Maybe
    add: Maybe
    num_groups: int
    eps: float
    silu: bool
    backend: str
    keep: bool  # the groups' mean and rstd, for a backward to come


class Backward(NamedTuple):
    dy: Tensor
    statistics: Tensor
    call: Arguments


def _allocate(call: Arguments) -> tuple[Tensor, Maybe]:
    """y, and room for the groups' mean and rstd, (2, N, G)."""
    return torch.empty_like(call.x), _statistics(call) if call.keep else None


def _statistics(call: Arguments) -> Tensor:
    return call.x.new_empty((2, call.x.shape[0], call.num_groups), dtype=torch.float32)


def _allocate_gradients(given: Backward) -> tuple[Maybe, ...]:
    """Those of the call's tensors. A residual's is that of x."""
    x, *small, add = given.call[:6]
    if add is not None and add.shape == x.shape:
        add = None
    rest = (None if v is None else v.new_empty(v.shape) for v in (*small, add))
    return torch.empty_like(x), *rest


def _forward(call: Arguments, shape: Any, y: Tensor, statistics: Maybe) -> None:
    if call.backend != "triton":
        _call("group_norm_silu", shape, call, (*call[:6], y, statistics), (call.add, y))
        return
    from fastdiff.kernels import group_norm_silu as kernels

    x, weight, bias, scale, shift, add, num_groups, eps, silu, _, _ = call
    mean, rstd = (_statistics(call) if statistics is None else statistics).unbind()
    kernels.forward(x, num_groups, weight, bias, eps, scale, shift, add, silu, y, mean, rstd)


def _backward(given: Backward, shape: Any, dx: Tensor, *small: Maybe) -> None:
    """Fill the gradients of x, and of weight, bias, scale, shift and add where there is room."""
    dy, statistics, call = given
    dy = layouts.in_layout_of(dx, dy)
    if call.backend == "triton":
        _triton_backward(dy, statistics, call, dx, small)
    else:
        tensors = (dy, *call[:6], statistics, dx, *small)
        _call("group_norm_silu_backward", shape, call, tensors, (dy, call.add, dx))


def _call(
    name: str, shape: Any, call: Arguments, tensors: tuple[Maybe, ...], read_wide: tuple[Maybe, ...]
) -> None:
    """The C++ kernel of the CPU, or CUDA's; ``read_wide``: with x, what is read or written by 16
    bytes where all begin at a multiple of these."""
    x, plan = call.x, [shape]
    if call.backend == "cuda":
        aligned = all(v is None or v.data_ptr() % 16 == 0 for v in (x, *read_wide))
        tile = tile_of(shape, native.cuda_limits(x.device), name.endswith("backward"), aligned)
        # From torch's allocator, which a graph's capture knows: it lives as long as it is needed.
        workspace = x.new_empty(tile.workspace_floats, dtype=torch.float32)
        plan, tensors = [shape, tile], (*tensors, workspace)
    native.launch(name, call.backend, x, *plan, *map(address, tensors))


@functools.lru_cache(LARGEST_CACHE)
def tile_of(shape: Any, limits: tuple[int, int, int, int], is_backward: bool, aligned: bool) -> Any:
    """How CUDA cuts a call into blocks (csrc/cuda/group_norm_tile.h)."""
    return native.library().group_norm_tile(shape, limits, is_backward, aligned)


def _triton_backward(
    dy: Tensor, statistics: Tensor, call: Arguments, dx: Tensor, small: tuple[Maybe, ...]
) -> None:
    """The kernel gives Σ dv, Σ dv·x̂ and Σ dx over the positions; the rest is (N, C) arithmetic."""
    from fastdiff.kernels import group_norm_silu as kernels

    x, weight, bias, scale, shift, add, num_groups, _, silu, _, _ = call
    mean, rstd = statistics.unbind()
    sums = x.new_empty((3, *x.shape[:2]), dtype=torch.float32)
    kernels.backward(dy, x, num_groups, weight, bias, mean, rstd, scale, shift, add, silu, dx, sums)
    dv, dv_xhat, dx_sum = sums.unbind()
    dweight, dbias, dscale, dshift, dadd = small
    if dweight is not None and dbias is not None:
        share = 1.0 if scale is None else 1 + scale.float()
        dweight.copy_((dv_xhat * share).sum(0))
        dbias.copy_((dv * share).sum(0))
    if dscale is not None and dshift is not None:  # v = u·(1 + scale) + shift, u = x̂·weight + bias
        if weight is not None and bias is not None:
            dv_xhat = dv_xhat * weight.float() + dv * bias.float()
        dscale.copy_(dv_xhat)
        dshift.copy_(dv)
    if dadd is not None:
        dadd.copy_(dx_sum)


# --- Plans ------------------------------------------------------------------------------------


def shape_of(call: Arguments) -> Any:
    """What the kernel is told of the shapes; None for arguments that it does not read."""
    return plan_of(_plan, call, call[:6], call[6:10])  # what is kept changes no plan


def _plan(call: Arguments) -> Any:
    if not all(map(operator.is_, call, _readable(call))):
        return None
    if call.backend == "triton":
        return ()  # its launcher derives its own
    x, add = call.x, call.add
    embedding = add is not None and add.shape != x.shape
    return native.library().GroupNormShape(
        **layouts.norm_shape(x, call.scale, call.shift),
        groups=call.num_groups,
        silu=call.silu,
        eps=call.eps,
        add=0 if add is None else 1 if embedding else 2,
        affine_dtype=code(call.weight),
        add_dtype=code(add),
        add_stride=row_stride(add) if embedding else 0,
    )


def _readable(call: Arguments) -> Arguments:
    """With copies of what no kernel reads as it stands (strange strides, mixed and wide dtypes)."""
    x, add = call.x, call.add
    weight, bias = rows(call.weight, call.bias)
    scale, shift = rows(call.scale, call.shift)
    if add is not None:
        add = layouts.in_kernels_layout(add, x) if add.shape == x.shape else rows(add)[0]
    x = layouts.in_kernels_layout(x, x)
    return Arguments(x, weight, bias, scale, shift, add, *call[6:])


kernel = Kernel(
    "group_norm_silu",
    Arguments,
    _allocate,
    _forward,
    outputs=2,
    plan=shape_of,
    readable=_readable,
)
_gradients = Kernel(
    "group_norm_silu_backward",
    Backward,
    _allocate_gradients,
    _backward,
    outputs=6,
    plan=lambda given: shape_of(given.call),
    readable=lambda given: given._replace(call=_readable(given.call)),
)
differentiable_once(kernel, _gradients, keeps=(1,))
