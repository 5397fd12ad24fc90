"""Where a tensor's elements stand in memory, as the elementwise kernels are told it.

They read any strides that are (samples, channels, spatial). Whatever else comes is copied first.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.backends import KERNEL_DTYPES, device_of
from fastdiff.ops.counters import Counter, low_bits, value_or_address

Maybe = Tensor | None


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


# A sample's (samples, channels, spatial), and each operand's (dtype code, sample stride, channel
# stride, spatial stride): csrc/common/elementwise.h.
Shape = tuple[int, int, int]
Strides = tuple[int, int, int, int]


def common_layout(
    operands: Sequence[Tensor], *, counted: bool
) -> tuple[Shape, list[Strides]] | None:
    """One shape for (N, C, ...) tensors of one size, with each one's strides.

    ``counted``: the kernel needs the elements' places in the logical order, because it draws noise;
    otherwise dense operands of one layout are one run in memory's order. None where some operand's
    samples are not (channels, spatial) with strides.
    """
    layouts = [sample_layout(operand) for operand in operands]
    known = [layout for layout in layouts if layout is not None]
    if len(known) < len(layouts):
        return None
    samples, first = operands[0].shape[0], operands[0]
    if any(layout.channels > 1 for layout in known):
        if not counted and all(_same_dense(first, operand) for operand in operands):
            elements = first[0].numel()
            known = [Layout(1, elements, layout.sample_stride, 0, 1) for layout in known]
        else:
            channels = max(layout.channels for layout in known)
            known = [_split(layout, channels) for layout in known]
    strides = [
        (native.DTYPE_CODES[operand.dtype], layout[2], layout[3], layout[4])
        for operand, layout in zip(operands, known, strict=True)
    ]
    return (samples, known[0].channels, known[0].spatial), strides


def _same_dense(first: Tensor, operand: Tensor) -> bool:
    """Whether both samples fill one stretch of memory, in the same order."""
    sizes = first.shape[1:]
    pairs = zip(sizes, first.stride()[1:], operand.stride()[1:], strict=True)
    if any(n > 1 and a != b for n, a, b in pairs):
        return False
    reached = 1
    for stride, size in sorted(zip(first.stride()[1:], sizes, strict=True)):
        if size > 1 and stride != reached:
            return False
        reached *= size
    return True


def _split(layout: Layout, channels: int) -> Layout:
    """The same sample as ``channels`` channels."""
    if layout.channels == channels:
        return layout
    spatial, step = layout.spatial // channels, layout.spatial_stride
    return Layout(channels, spatial, layout.sample_stride, spatial * step, step)


def dense(x: Maybe) -> Maybe:
    """Contiguous, in a dtype that kernels read."""
    if x is None or x.dtype in KERNEL_DTYPES:
        return None if x is None else x.contiguous()
    return x.float().contiguous()


# --- What a launch passes ---------------------------------------------------------------------


def address(tensor: Maybe) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def code(tensor: Maybe) -> int:
    """The dtype's number in csrc/common/dtype.h."""
    return 0 if tensor is None else native.DTYPE_CODES[tensor.dtype]


def row_stride(tensor: Maybe) -> int:
    return 0 if tensor is None else tensor.stride(0)


def call_elementwise(
    name: str,
    backend: str,
    x: Tensor,
    arguments: tuple[Any, ...],
    seed: Counter | None,
    step: tuple[int, ...],
    first_sample: Counter,
) -> Any:
    """The C++ kernel of the CPU, or CUDA's, to which tensors of counters go as addresses; ``step``
    as that takes it: the counter's number and, for some, an address."""
    seed = 0 if seed is None else seed
    library = native.library()
    if backend == "native":
        numbers = low_bits(seed, 64), step[0], low_bits(first_sample, 64)
        return getattr(library, f"{name}_cpu")(*arguments, *numbers, torch.get_num_threads())
    counters = *value_or_address(seed), *step, *value_or_address(first_sample)
    on = native.multiprocessors(x.device), native.cuda_stream(x.device)
    with device_of(x):
        return getattr(library, f"{name}_cuda")(*arguments, *counters, *on)
