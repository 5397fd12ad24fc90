"""GroupNorm + FiLM + SiLU in one call, forward and backward."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import dispatch, layouts, native
from fastdiff.ops.checks import check_activation, check_pair, check_tensor, check_x, refusal
from fastdiff.ops.differentiable import LARGEST_CACHE, Kernel, differentiable_once
from fastdiff.ops.dispatch import OPERATIONS, Choice, Operation
from fastdiff.ops.group_norm_silu import reference
from fastdiff.ops.layouts import Maybe, row_stride, rows
from fastdiff.ops.native import address, code

OP = "group_norm_silu"
# Contiguous float32 tensors up to this size train on PyTorch's operations: a call of autograd's
# Python side costs more than the kernels save (benchmarks/results, the smallest shapes of
# forward+backward). Not channels_last ones and not those in half precision, which the reference
# copies to float32 and back.
SMALL = 32768
PYTORCH_TRAINS = "reference", f"PyTorch's operations train up to {SMALL} float32 elements faster"


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
    """``silu(group_norm(x + add)·(1 + scale) + shift)``, with statistics in float32.

    Args:
        x: (N, C, *spatial), any number of spatial dimensions and any layout; the result has both.
        num_groups: divides C; each group of C / num_groups channels of one sample is normalised.
        weight: (C,), or None for a norm without parameters.
        bias: likewise.
        eps: added to the variance.
        scale: (N, C), or None, like shift, for no FiLM.
        shift: (N, C), given exactly when scale is.
        add: added to x before the norm: (N, C), an embedding, or a residual of x's own shape.
        activation: ``"silu"``, or None for the norm (and FiLM) alone.

    Returns:
        (N, C, *spatial) in the dtype of ``x``, also under autocast. Differentiable once in every
        tensor; for more, use ``fastdiff.backend("reference")``.

    Raises:
        InputError: shapes, dtypes, devices or names that do not fit.

    Source: Wu & He 2018, equation 1; FiLM as in Nichol & Dhariwal 2021, section 3.
    """
    check_x(OP, x)
    channels = x.shape[1]
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise InputError(
            f"{OP}: num_groups={num_groups!r}; expected an int that divides x's {channels} channels"
        )
    check_activation(OP, activation)
    operands = (x, weight, bias, scale, shift, add)
    training = dispatch.wants_gradient(*operands)
    backend = _choose(x, training).backend
    call = Arguments(*operands, num_groups, float(eps), activation is not None, backend, training)
    if backend == "reference":
        _check(call)
        film: dict[str, Any] = {"scale": scale, "shift": shift, "activation": activation}
        return reference.group_norm_silu(x, num_groups, weight, bias, eps, add=add, **film)
    return _kernel(call, training)[0]


def choose(x: Tensor, *others: Any, **options: Any) -> Choice:
    """Which backend serves this call, and why (``fastdiff.explain``)."""
    return _choose(x, dispatch.wants_gradient(x, *others, *options.values()))


def _choose(x: Tensor, training: bool) -> Choice:
    small = training and x.is_cpu and x.dtype == torch.float32 and 0 < x.numel() <= SMALL
    rule = (lambda: PYTORCH_TRAINS) if small and x.is_contiguous() else None
    return dispatch.choose(OPERATION, x, rule=rule)


OPERATION = OPERATIONS[OP] = Operation(OP, ("native", "triton", "cuda"), choose)


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


def _check(call: Arguments) -> None:
    """InputError for tensors that do not fit each other."""
    x, weight, bias, scale, shift, add, *_ = call
    nc = x.shape[:2]
    check_pair(OP, ("weight", "bias"), weight, bias, x, nc[1:])
    check_pair(OP, ("scale", "shift"), scale, shift, x, nc)
    if add is not None:
        check_tensor(OP, "add", add, x, nc, x.shape)
        if add.shape == x.shape and add.dtype != x.dtype:
            raise refusal(OP, "add", add, f"{x.dtype}, as a residual has the dtype of x")


def _allocate(call: Arguments) -> tuple[Tensor, Maybe]:
    """y, and room for the groups' mean and rstd, (2, N, G)."""
    x, statistics = call.x, None
    if call.keep:
        statistics = x.new_empty((2, x.shape[0], call.num_groups), dtype=torch.float32)
    return torch.empty_like(x), statistics


def _allocate_gradients(call: Any) -> tuple[Maybe, ...]:
    """Those of the forward's tensors. A residual's is that of x."""
    x, *small, add = call[2:8]
    if add is not None and add.shape == x.shape:
        add = None
    dense = torch.contiguous_format
    rest = (None if v is None else torch.empty_like(v, memory_format=dense) for v in (*small, add))
    return torch.empty_like(x), *rest


def _forward(call: Arguments) -> Any:
    """What fills y and the statistics for calls like this one."""
    if call.backend != "triton":
        return _of_library(OP, call, read_wide=(0, 5, 6))
    from fastdiff.kernels.group_norm_silu import forward

    return forward(call.x, call.num_groups, call.eps, call.scale, call.shift, call.add, call.silu)


def _backward(call: Any) -> Any:
    """What fills the gradients of x, and of weight, bias, scale, shift and add where there is room,
    for calls like this one."""
    if call.backend == "triton":
        from fastdiff.kernels.group_norm_silu import backward

        fill = backward(call.x, call.num_groups, call.scale, call.shift, call.add, call.silu)
    else:
        fill = _of_library(f"{OP}_backward", call, read_wide=(0, 1, 6, 8))

    def launch(dy: Tensor, statistics: Tensor, *others: Any) -> None:
        operands, (dx, *small) = others[:6], others[6:]
        fill(layouts.in_layout_of(dx, dy), *operands, statistics, dx, *small)

    return launch


def _of_library(name: str, call: Any, read_wide: tuple[int, ...]) -> Any:
    """The C++ kernel of the CPU, or CUDA's; ``read_wide``: the tensors that are read or written by
    16 bytes where all begin at a multiple of these."""
    x, add, backend = call.x, call.add, call.backend
    embedding = add is not None and add.shape != x.shape
    shape = native.library().GroupNormShape(
        **layouts.norm_shape(x, call.scale, call.shift),
        groups=call.num_groups,
        silu=call.silu,
        eps=call.eps,
        add=0 if add is None else 1 if embedding else 2,
        affine_dtype=code(call.weight),
        add_dtype=code(add),
        add_stride=row_stride(add) if embedding else 0,
    )
    if backend == "native":
        return lambda *tensors: native.launch_on(name, backend, shape, tensors)

    def by_cuda(*tensors: Any) -> None:
        aligned = all(address(tensors[i]) % 16 == 0 for i in read_wide)
        x = tensors[0]
        tile = tile_of(shape, native.cuda_limits(x.device), name.endswith("backward"), aligned)
        # From torch's allocator, which a graph's capture knows: it lives as long as it must.
        workspace = x.new_empty(tile.workspace_floats, dtype=torch.float32)
        native.launch(name, backend, x, shape, tile, *map(address, (*tensors, workspace)))

    return by_cuda


@functools.lru_cache(LARGEST_CACHE)
def tile_of(shape: Any, limits: tuple[int, int, int, int], is_backward: bool, aligned: bool) -> Any:
    """How CUDA cuts a call into blocks (csrc/cuda/group_norm_tile.h)."""
    return native.library().group_norm_tile(shape, limits, is_backward, aligned)


def _readable(call: Arguments) -> Arguments:
    """With copies of what no kernel reads as it stands (strange strides, mixed and wide dtypes)."""
    x, add = call.x, call.add
    weight, bias = rows(call.weight, call.bias)
    scale, shift = rows(call.scale, call.shift)
    if add is not None:
        add = layouts.in_kernels_layout(add, x) if add.shape == x.shape else rows(add)[0]
    x = layouts.in_kernels_layout(x, x)
    return Arguments(x, weight, bias, scale, shift, add, *call[6:])


_kernel = Kernel(OP, Arguments, _allocate, _forward, outputs=2, check=_check, readable=_readable)
differentiable_once(_kernel, _allocate_gradients, _backward, keeps={"statistics": 1})
