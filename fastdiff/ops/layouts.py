"""Where a tensor's elements stand in memory, as kernels are told it.

The elementwise ones read any strides that are (samples, channels, spatial), the norms dense
tensors, contiguous or channels_last, beside rows of neighbouring channels. Whatever else comes is
copied first.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.ops.backends import KERNEL_DTYPES
from fastdiff.ops.native import code

Maybe = Tensor | None


def row_stride(tensor: Maybe) -> int:
    return 0 if tensor is None else tensor.stride(0)


def dense(call: Any) -> Any:
    """A record with contiguous copies of its tensors, in dtypes that kernels read."""

    def copied(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        wide = v.is_floating_point() and v.dtype not in KERNEL_DTYPES
        return (v.float() if wide else v).contiguous()

    return call._make(map(copied, call))


# --- Elementwise kernels ----------------------------------------------------------------------


class Layout(NamedTuple):
    """Where a sample's elements stand, in elements: logical index channel·spatial + position."""

    channels: int
    spatial: int
    sample_stride: int
    channel_stride: int
    spatial_stride: int


def sample_layout(x: Tensor, *, merged: bool = True) -> Layout | None:
    """``x``'s samples as (channels, spatial) with strides, or None where that cannot be said.

    ``merged``: as one channel where they are one run.
    """
    shape, strides = x.shape, x.stride()
    sample_stride = strides[0] if shape[0] > 1 else math.prod(shape[1:])
    whole = _merged_stride(shape[1:], strides[1:]) if merged else None
    if whole is not None:
        return Layout(1, math.prod(shape[1:]), sample_stride, 0, whole)
    spatial_stride = _merged_stride(shape[2:], strides[2:])
    if spatial_stride is None:
        return None
    return Layout(shape[1], math.prod(shape[2:]), sample_stride, strides[1], spatial_stride)


def _merged_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of these dimensions taken as one, or None where they do not follow each other."""
    merged, next_stride = 1, None
    for size, stride in reversed(list(zip(shape, strides, strict=True))):
        if size == 1:
            continue
        if next_stride is None:
            merged = stride
        elif stride != next_stride:
            return None
        next_stride = stride * size
    return merged


def common_layout(operands: Sequence[Tensor], *, counted: bool) -> tuple[tuple, list[tuple]] | None:
    """(samples, channels, spatial) of (N, C, ...) tensors of one size, with each one's (dtype code,
    sample stride, channel stride, spatial stride): csrc/common/elementwise.h.

    ``counted``: the kernel needs the elements' places in the logical order, because it draws noise;
    otherwise operands of one layout are one run in memory's order. None where some operand's
    samples are not (channels, spatial) with strides, or its dtype is not the kernels'.
    """
    if any(v.dtype not in KERNEL_DTYPES for v in operands):
        return None
    # One run each, in memory's order or in the logical one; else channels apart.
    order = sorted(range(1, operands[0].dim()), key=operands[0].stride, reverse=True)
    found = None if counted else _layouts([v.permute(0, *order) for v in operands])
    found = found or _layouts(operands) or _layouts(operands, merged=False)
    if found is None:
        return None
    strides = [(code(v), *layout[2:]) for v, layout in zip(operands, found, strict=True)]
    return (operands[0].shape[0], *found[0][:2]), strides


def _layouts(operands: Sequence[Tensor], *, merged: bool = True) -> list[Layout] | None:
    """Of all, or None where one has none or, ``merged``, has several channels."""
    found = [sample_layout(v, merged=merged) for v in operands]
    known = [v for v in found if v is not None and (v.channels == 1 or not merged)]
    return known if len(known) == len(found) else None


def one_or_two_like(call: Any) -> tuple[Tensor, Maybe]:
    """Room for what comes out: like the record's first tensor, two where ``returns_both`` says."""
    return torch.empty_like(call[0]), torch.empty_like(call[0]) if call.returns_both else None


# --- Norms ------------------------------------------------------------------------------------


def in_kernels_layout(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` in the layout that a norm's kernel takes x (N, C, *spatial) in: dense in x's own
    order where that is N, C, *spatial or N, *spatial, C."""
    like = torch.empty_like(x)
    if like.is_contiguous() or (x.dim() > 2 and like.movedim(1, -1).is_contiguous()):
        return in_layout_of(like, tensor)
    return tensor.contiguous()


def in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` in the memory layout of ``like``."""
    if tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous()):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def rows(*tensors: Maybe) -> list[Maybe]:
    """(C,) or (N, C, 1, …) each, in one dtype that kernels read, neighbouring channels adjacent."""
    given = [v for v in tensors if v is not None]
    if any(v.dtype != given[0].dtype or v.dtype not in KERNEL_DTYPES for v in given):
        given = [v.float() for v in given]
    adjacent = (
        v if v.stride(at := min(1, v.dim() - 1)) == 1 or v.shape[at] == 1 else v.contiguous()
        for v in given
    )
    return [None if v is None else next(adjacent) for v in tensors]


def norm_shape(x: Tensor, scale: Maybe, shift: Maybe) -> dict[str, Any]:
    """What the norms' kernels are told of x and FiLM."""
    n, channels = x.shape[:2]
    positions = x.numel() // (n * channels)
    return dict(
        samples=n,
        channels=channels,
        positions=positions,
        # One position: channels are neighbours, which only the channels_last kernel vectorises.
        channels_last=positions == 1 or not x.is_contiguous(),
        dtype=code(x),
        film_dtype=code(scale),
        scale_stride=row_stride(scale),
        shift_stride=row_stride(shift),
    )
