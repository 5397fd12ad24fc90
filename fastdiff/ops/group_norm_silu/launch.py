"""Launching group_norm_silu's kernels: tensors to memory layouts, row strides and addresses."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import backends, native, norms
from fastdiff.ops.layouts import Maybe, address, code, row_stride
from fastdiff.ops.plans import plan_of


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


def allocate(call: Arguments) -> tuple[Tensor, Maybe]:
    """y, and room for the groups' mean and rstd, (2, N, G)."""
    y = torch.empty_like(call.x)
    return y, _statistics(call) if call.keep else None


def _statistics(call: Arguments) -> Tensor:
    return call.x.new_empty((2, call.x.shape[0], call.num_groups), dtype=torch.float32)


def allocate_gradients(given: Backward) -> tuple[Maybe, ...]:
    """Those of the call's tensors. A residual's is that of x."""
    x, *small, add = given.call[:6]
    if add is not None and add.shape == x.shape:
        add = None
    return torch.empty_like(x), *map(_room, small), _room(add)


def _room(like: Maybe) -> Maybe:
    return None if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)


def forward(call: Arguments, y: Tensor, statistics: Maybe) -> bool | None:
    """Fill both."""
    shape = _shape_of(call)
    if shape is None:
        return False
    if call.backend != "triton":
        _call("group_norm_silu", shape, call, (*call[:6], y, statistics), (call.add, y))
        return None
    from fastdiff.kernels import group_norm_silu as kernels

    x, weight, bias, scale, shift, add, num_groups, eps, silu, _, _ = call
    mean, rstd = (_statistics(call) if statistics is None else statistics).unbind()
    with backends.device_of(y):
        kernels.forward(x, num_groups, weight, bias, eps, scale, shift, add, silu, y, mean, rstd)
    return None


def backward(given: Backward, dx: Tensor, *small: Maybe) -> bool | None:
    """Fill the gradients of x, and of weight, bias, scale, shift and add where there is room."""
    dy, statistics, call = given
    shape = _shape_of(call)
    if shape is None:
        return False
    dy = norms.in_layout_of(dx, dy)
    if call.backend == "triton":
        _triton_backward(dy, statistics, call, dx, small)
    else:
        tensors = (dy, *call[:6], statistics, dx, *small)
        _call("group_norm_silu_backward", shape, call, tensors, (dy, call.add, dx))
    return None


def _call(
    name: str, shape: Any, call: Arguments, tensors: tuple[Maybe, ...], read_wide: tuple[Maybe, ...]
) -> None:
    """The C++ kernel of the CPU, or CUDA's; ``read_wide``: with x, what is read or written by 16
    bytes where all begin at a multiple of these."""
    x, library = call.x, native.library()
    if call.backend == "native":
        function = getattr(library, f"{name}_cpu")
        function(shape, *map(address, tensors), torch.get_num_threads())
        return
    aligned = all(v is None or v.data_ptr() % 16 == 0 for v in (x, *read_wide))
    tile = tile_of(shape, native.cuda_limits(x.device), name.endswith("backward"), aligned)
    # From torch's allocator, which a graph's capture knows: it lives as long as it is needed.
    floats = tile.workspace_floats
    workspace = x.new_empty(floats, dtype=torch.float32) if floats else None
    with backends.device_of(x):
        getattr(library, f"{name}_cuda")(
            shape, tile, *map(address, (*tensors, workspace)), native.cuda_stream(x.device)
        )


def tile_of(shape: Any, limits: tuple[int, int, int, int], is_backward: bool, aligned: bool) -> Any:
    """How CUDA cuts a call into blocks (csrc/cuda/group_norm_tile.h)."""
    return plan_of(native.library().group_norm_tile, (), shape, limits, is_backward, aligned)


def _triton_backward(
    dy: Tensor, statistics: Tensor, call: Arguments, dx: Tensor, small: tuple[Maybe, ...]
) -> None:
    """The kernel gives Σ dv, Σ dv·x̂ and Σ dx over the positions; the rest is (N, C) arithmetic."""
    from fastdiff.kernels import group_norm_silu as kernels

    x, weight, bias, scale, shift, add, num_groups, _, silu, _, _ = call
    mean, rstd = statistics.unbind()
    sums = x.new_empty((3, *x.shape[:2]), dtype=torch.float32)
    with backends.device_of(x):
        kernels.backward(
            dy, x, num_groups, weight, bias, mean, rstd, scale, shift, add, silu, dx, sums
        )
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


def _shape_of(call: Arguments) -> Any:
    """What the kernel is told of the shapes; None for arguments that it does not read."""
    return plan_of(_plan, call[:6], *call[6:10], False)  # what is kept changes no plan


def _plan(*arguments: Any) -> Any:
    call = Arguments(*arguments)
    if not norms.unchanged(call, readable(call)):
        return None
    if call.backend == "triton":
        return ()  # its launcher derives its own
    x, add = call.x, call.add
    n, channels = x.shape[:2]
    positions = x.numel() // (n * channels)
    embedding = add is not None and add.shape != x.shape
    return native.library().GroupNormShape(
        samples=n,
        channels=channels,
        positions=positions,
        groups=call.num_groups,
        # One position: channels are neighbours, which only the channels_last kernel vectorises.
        channels_last=positions == 1 or not x.is_contiguous(),
        silu=call.silu,
        eps=call.eps,
        add=0 if add is None else 1 if embedding else 2,
        dtype=code(x),
        affine_dtype=code(call.weight),
        film_dtype=code(call.scale),
        add_dtype=code(add),
        scale_stride=row_stride(call.scale),
        shift_stride=row_stride(call.shift),
        add_stride=row_stride(add) if embedding else 0,
    )


def readable(call: Arguments) -> Arguments:
    """With copies of what no kernel reads as it stands (strange strides, mixed and wide dtypes)."""
    x, add, like = call.x, call.add, norms.dense_like(call.x)
    weight, bias = norms.rows(call.weight, call.bias)
    scale, shift = norms.rows(call.scale, call.shift)
    if add is not None:
        add = norms.in_layout_of(like, add) if add.shape == x.shape else norms.rows(add, add)[0]
    x = norms.in_layout_of(like, x)
    return call._replace(x=x, weight=weight, bias=bias, scale=scale, shift=shift, add=add)
