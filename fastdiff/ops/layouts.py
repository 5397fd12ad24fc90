"""What the norms ask of their arguments' memory: the layouts that kernels read, else copies."""

import torch
from torch import Tensor

from fastdiff.ops.backends import KERNEL_DTYPES

Maybe = Tensor | None


def is_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, *spatial) is dense in the order N, *spatial, C."""
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` in the memory layout of ``like``."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def rows(first: Maybe, second: Maybe) -> tuple[Maybe, Maybe]:
    """Both (N, C) or (C,), in one dtype that the kernels read, neighbouring channels adjacent."""
    if first is None or second is None:
        return None, None
    if first.dtype != second.dtype or first.dtype not in KERNEL_DTYPES:
        first, second = first.float(), second.float()
    return _adjacent(first), _adjacent(second)


def _adjacent(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def address(tensor: Maybe) -> int:
    return 0 if tensor is None else tensor.data_ptr()
