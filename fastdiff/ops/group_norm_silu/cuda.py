"""Launching group_norm_silu's CUDA C++ kernels: how a call is cut, and its workspace."""

import functools
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import backends, native
from fastdiff.ops.layouts import Maybe, address


def forward(
    shape: Any, x: Tensor, weight: Maybe, bias: Maybe, scale: Maybe, shift: Maybe, add: Maybe,
    y: Tensor, statistics: Maybe,
) -> None:  # fmt: skip
    """y, and the statistics where they are wanted, for arguments as the kernels take them."""
    tile = tile_of(shape, native.cuda_limits(x.device), False, _aligned(x, y, add))
    workspace = _workspace(tile, x)
    with backends.device_of(x):
        native.library().group_norm_silu_cuda(
            shape, tile, x.data_ptr(), address(weight), address(bias), address(scale),
            address(shift), address(add), y.data_ptr(), address(statistics),
            address(workspace), native.cuda_stream(x.device),
        )  # fmt: skip


def backward(
    shape: Any, dy: Tensor, x: Tensor, weight: Maybe, bias: Maybe, scale: Maybe, shift: Maybe,
    add: Maybe, statistics: Tensor, dx: Tensor, small: tuple[Maybe, ...],
) -> None:  # fmt: skip
    """dx, and the gradients of weight, bias, scale, shift and add where there is room for them."""
    tile = tile_of(shape, native.cuda_limits(x.device), True, _aligned(dy, x, dx, add))
    workspace = _workspace(tile, x)
    with backends.device_of(x):
        native.library().group_norm_silu_backward_cuda(
            shape, tile, dy.data_ptr(), x.data_ptr(), address(weight), address(bias),
            address(scale), address(shift), address(add), statistics.data_ptr(), dx.data_ptr(),
            *map(address, small), address(workspace), native.cuda_stream(x.device),
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def tile_of(shape: Any, limits: tuple[int, int, int, int], backward: bool, aligned: bool) -> Any:
    """How the call is cut into blocks (csrc/cuda/group_norm_tile.h)."""
    return native.library().group_norm_tile(shape, limits, backward, aligned)


def _aligned(*tensors: Maybe) -> bool:
    """Whether all begin where 16 bytes can be read at once."""
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _workspace(tile: Any, x: Tensor) -> Maybe:
    """From torch's allocator, which a graph capture knows: it lives as long as it is needed."""
    size = tile.workspace_floats
    return torch.empty(size, dtype=torch.float32, device=x.device) if size else None
