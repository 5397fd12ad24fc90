"""A convolution's weight in the order in which the CPU's kernels multiply by it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.backends import KERNEL_DTYPES
from fastdiff.ops.convolution.fastest import Products, products_of


@dataclass
class Packed:
    """``weight`` (K, C, *kernel), and the kernel's ``panels`` of it; None where there is none."""

    weight: Tensor
    panels: Tensor | None = None
    products: Products = Products.FLOAT32

    def refresh(self) -> None:
        """Take the values that the weight has now."""
        if self.panels is None:
            return
        write_panels(self.weight, self.products, self.panels)


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


def pack(weight: Tensor, dtype: torch.dtype, *, products: Products | None = None) -> Packed:
    """A 2-D convolution's weight for inputs of ``dtype``, on the CPU.

    ``products``: how to multiply, one of ``fastest.possible``; None: the fastest here of those that
    serve every kernel and stride.
    """
    if weight.dim() != 4 or not weight.is_cpu or dtype not in KERNEL_DTYPES:
        return Packed(weight)
    if products is None:
        products = products_of(dtype)
    k, channels, height, width = weight.shape
    size = native.library().convolution_panels(int(products), k, channels, height * width)
    packed = Packed(weight, _aligned(torch.empty(size + ALIGNMENT, dtype=torch.uint8)), products)
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
