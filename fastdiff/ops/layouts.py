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

from fastdiff.ops import native
from fastdiff.ops.backends import KERNEL_DTYPES

Maybe = Tensor | None


def address(tensor: Maybe) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def code(tensor: Maybe) -> int:
    """The dtype's number in csrc/common/dtype.h."""
    return 0 if tensor is None else native.DTYPE_CODES[tensor.dtype]


def row_stride(tensor: Maybe) -> int:
    return 0 if tensor is None else tensor.stride(0)


def dense(call: Any) -> Any:
    """A record with contiguous copies of its tensors, in dtypes that kernels read."""
    return call._make(_dense(value) if isinstance(value, Tensor) else value for value in call)


def _dense(x: Tensor) -> Tensor:
    if x.is_floating_point() and x.dtype not in KERNEL_DTYPES:
        x = x.float()
    return x.contiguous()


# --- Elementwise kernels ----------------------------------------------------------------------


class Layout(NamedTuple):
    """Where a sample's elements stand, in elements: logical index channel·spatial + position."""

    channels: int
    spatial: int
    sample_stride: int
    channel_stride: int
    spatial_stride: int


def sample_layout(out: Tensor) -> Layout | None:
    """``out``'s samples as (channels, spatial) with strides, or None where that cannot be said."""
    shape, strides = out.shape, out.stride()
    sample_stride = strides[0] if shape[0] > 1 else math.prod(shape[1:])
    whole = _merged_stride(shape[1:], strides[1:])
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
    otherwise dense operands of one layout are one run in memory's order. None where some operand's
    samples are not (channels, spatial) with strides, or its dtype is not the kernels'.
    """
    known = [v for operand in operands if (v := sample_layout(operand)) is not None]
    if len(known) < len(operands) or any(v.dtype not in KERNEL_DTYPES for v in operands):
        return None
    channels = max(layout.channels for layout in known)
    if channels > 1 and not counted and all(_same_dense(operands[0], v) for v in operands):
        elements = math.prod(operands[0].shape[1:])
        known = [Layout(1, elements, layout.sample_stride, 0, 1) for layout in known]
    elif channels > 1:
        known = [_split(layout, channels) for layout in known]
    strides = [(code(v), *layout[2:]) for v, layout in zip(operands, known, strict=True)]
    return (operands[0].shape[0], known[0].channels, known[0].spatial), strides


def _same_dense(first: Tensor, operand: Tensor) -> bool:
    """Whether both samples fill one stretch of memory, in the same order."""
    dimensions = zip(first.stride()[1:], operand.stride()[1:], first.shape[1:], strict=True)
    reached = 1
    for stride, other, size in sorted(d for d in dimensions if d[2] > 1):
        if not stride == other == reached:
            return False
        reached *= size
    return True


def _split(layout: Layout, channels: int) -> Layout:
    """The same sample as ``channels`` channels."""
    if layout.channels == channels:
        return layout
    spatial, step = layout.spatial // channels, layout.spatial_stride
    return Layout(channels, spatial, layout.sample_stride, spatial * step, step)


def one_or_two_like(x: Tensor, two: bool) -> tuple[Tensor, Maybe]:
    """Room for what comes out: x's successor, and a second of its kind where it is wanted."""
    return torch.empty_like(x), torch.empty_like(x) if two else None


def launch_elementwise(name: str, backend: str, x: Tensor, *arguments: Any) -> Any:
    """The C++ kernel of the CPU, or CUDA's, whose grid strides over its work."""
    if backend == "cuda":
        arguments = *arguments, native.multiprocessors(x.device)
    return native.launch(name, backend, x, *arguments)


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
