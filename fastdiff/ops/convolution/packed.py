"""A convolution's weight in the order in which the CPU's kernels multiply by it."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.backends import KERNEL_DTYPES
from fastdiff.ops.convolution.fastest import Products, products_of


@dataclass
class Packed:
    """``weight`` (K, C, *kernel), and the kernel's ``panels`` of it; None where there is none.

    ``folded``: the panels are of the taps' sums, for an input that is doubled (``sums_of``) with so
    much padding before it.
    """

    weight: Tensor
    panels: Tensor | None = None
    products: Products = Products.FLOAT32
    folded: int | None = None

    def refresh(self) -> None:
        """Take the values that the weight has now."""
        if self.panels is None:
            return
        if self.folded is None:
            return write_panels(self.weight, self.products, self.panels)
        parts = sums_of(self.weight, self.folded)
        for part, panels in zip(parts, self.panels.chunk(len(parts)), strict=True):
            write_panels(part, self.products, panels)


def write_panels(
    weight: Tensor, products: Products, panels: Tensor, transposed: bool = False
) -> None:
    """The panels of a 2-D convolution's weight; ``transposed``: of the convolution whose result is
    the gradient of its input (inputs for outputs, and the taps in reverse)."""
    values = with_taps_in_order(weight.detach().float())
    k, channels, height, width = values.shape
    strides, first = [values.stride(0), values.stride(1), values.stride(3)], values.data_ptr()
    if transposed:
        first += (height * width - 1) * strides[2] * values.element_size()
        k, channels, strides = channels, k, [strides[1], strides[0], -strides[2]]
    native.library().pack_convolution_cpu(
        int(products), first, k, channels, height * width, *strides, panels.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def with_taps_in_order(weight: Tensor) -> Tensor:
    """The weight, or a copy of it, whose taps are one stride apart."""
    in_order = weight.stride(2) == weight.shape[3] * weight.stride(3)
    return weight if in_order else weight.contiguous()


def sums_of(weight: Tensor, before: int) -> Tensor:
    """(4, K, C, (rows + 1) / 2, (columns + 1) / 2) float32: the sums of the taps that read the same
    position of an input before it is doubled, for the outputs at each remainder of row and column
    by 2. With ``before`` zeros before it, the output at 2i + a reads by tap t the position
    i + ⌊(a + t - before) / 2⌋."""
    taps = weight.detach().float().permute(2, 3, 0, 1)  # matrices are added fast in any layout
    sides = [(count + 1) // 2 for count in taps.shape[:2]]
    sums = taps.new_zeros(2, 2, *sides, *taps.shape[2:])
    for a, b, i, j in itertools.product(range(2), range(2), *map(range, sides)):
        row, column = 2 * i - (a - before) % 2, 2 * j - (b - before) % 2
        for matrices in taps[max(row, 0) : row + 2]:
            for matrix in matrices[max(column, 0) : column + 2]:
                sums[a, b, i, j] += matrix
    return sums.permute(0, 1, 4, 5, 2, 3).flatten(0, 1)


def folds(products: Products, kernel: Sequence[int]) -> bool:
    """Whether a doubling before a convolution of stride 1 is done by sums of taps: of kernels with
    odd sides, which leave equal numbers of them to all outputs."""
    direct = products not in (Products.WINOGRAD2, Products.WINOGRAD4)
    return direct and max(kernel) > 1 and all(taps % 2 for taps in kernel)


def pack(
    weight: Tensor, dtype: torch.dtype, *, products: Products | None = None,
    doubled: int | None = None,
) -> Packed:  # fmt: skip
    """A 2-D convolution's weight for inputs of ``dtype``, on the CPU.

    ``products``: how to multiply, one of ``fastest.possible``; None: the fastest here of those that
    serve every kernel and stride. ``doubled``: for an input that is doubled, with so many zeros
    before the first position, and stride 1.
    """
    if weight.dim() != 4 or not weight.is_cpu or dtype not in KERNEL_DTYPES:
        return Packed(weight)
    if products is None:
        products = products_of(dtype)
    k, channels, height, width = weight.shape
    folded = doubled if folds(products, (height, width)) else None
    times, taps = 1, height * width
    if folded is not None:
        times, taps = 4, (height + 1) // 2 * ((width + 1) // 2)
    size = times * native.library().convolution_panels(int(products), k, channels, taps)
    panels = _aligned(torch.empty(size + ALIGNMENT, dtype=torch.uint8))[:size]
    packed = Packed(weight, panels, products, folded)
    packed.refresh()
    return packed


ALIGNMENT = 64


def _aligned(room: Tensor) -> Tensor:
    return room[-room.data_ptr() % ALIGNMENT :]


@contextmanager
def lent_panels(weight: Tensor, products: Products, transposed: bool = False) -> Iterator[Tensor]:
    """Panels for one call, in memory that the next call's may have."""
    k, channels, height, width = weight.shape
    sides = (channels, k) if transposed else (k, channels)
    size = native.library().convolution_panels(int(products), *sides, height * width)
    room = native.borrow((size + ALIGNMENT) // 4 + 1)
    panels = _aligned(room.view(torch.uint8))
    write_panels(weight, products, panels, transposed)
    yield panels
    native.give_back(room)
