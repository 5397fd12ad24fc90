"""What the elementwise operations share: one (channels, spatial) shape for operands of any layout,
and the counters of the noise they draw."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.normal import op as rng
from fastdiff.ops.normal.op import Layout

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
    layouts = [rng.sample_layout(operand) for operand in operands]
    if any(layout is None for layout in layouts):
        return None
    known = [layout for layout in layouts if layout is not None]
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
    spatial = layout.spatial // channels
    return Layout(
        channels,
        spatial,
        layout.sample_stride,
        spatial * layout.spatial_stride,
        layout.spatial_stride,
    )


def contiguous_like(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


def described(tensor: object) -> tuple | type:
    """All that checks and launch plans ask of a plain tensor but its values and its address; the
    type alone of anything else."""
    if type(tensor) is not Tensor:
        return type(tensor)
    return (
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.is_cpu or tensor.device,  # the first costs less
        tensor.requires_grad,
    )


def is_checked_counter(value: object, limit: int) -> bool:
    """Whether ``value`` needs no further check as a seed, step or sample number where tensors of
    which ``described`` says the same have been checked before."""
    return 0 <= value < limit if type(value) is int else type(value) is Tensor


def signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number: operators' integers are signed."""
    return value - 2**64 if value >= 2**63 else value


def split_counter(
    name: str, value: int | Tensor | None, limit: int, device: torch.device
) -> tuple[int | None, Tensor | None]:
    """A checked seed or step as (number, None), (None, tensor) or (None, None)."""
    if value is None:
        return None, None
    checked = rng.check_counter(name, value, limit, device)
    return (None, checked) if isinstance(checked, Tensor) else (signed(checked), None)


def split_first_sample(
    value: int | Tensor, samples: int, device: torch.device
) -> tuple[int, Tensor | None]:
    """The checked number of a batch's first sample as (number, None) or (0, tensor)."""
    checked = rng.check_first_sample(value, samples, device)
    return (0, checked) if isinstance(checked, Tensor) else (signed(checked), None)
