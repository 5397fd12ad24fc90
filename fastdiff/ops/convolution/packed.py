"""A convolution's weight in the order in which the CPU's kernels multiply by it."""

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.backends import KERNEL_DTYPES


class Products(enum.IntEnum):
    """How a kernel multiplies (csrc/common/convolution.h)."""

    FLOAT32 = 0
    BFLOAT16 = 1
    SPLIT = 2  # float32 as the sum of two bfloat16, without the product of the smaller ones


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
        values = self.weight.detach().float()
        if values.stride(2) != values.shape[3] * values.stride(3):  # its taps are in no order
            values = values.contiguous()
        k, channels, height, width = values.shape
        out_stride, channel_stride, _, tap_stride = values.stride()
        native.library().pack_convolution_cpu(
            int(self.products), values.data_ptr(), k, channels, height * width, out_stride,
            channel_stride, tap_stride, self.panels.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip


def pack(weight: Tensor, dtype: torch.dtype, *, exact: bool = False) -> Packed:
    """A 2-D convolution's weight for inputs of ``dtype``. ``exact``: no products of pieces."""
    if weight.dim() != 4 or not weight.is_cpu or dtype not in KERNEL_DTYPES:
        return Packed(weight)
    products = products_of(dtype, exact)
    k, channels, height, width = weight.shape
    size = native.library().convolution_panels(int(products), k, channels, height * width)
    room = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT
    packed = Packed(weight, room[start : start + size], products)
    packed.refresh()
    return packed


ALIGNMENT = 64


def products_of(dtype: torch.dtype, exact: bool = False) -> Products:
    """What multiplies fastest here, without rounding the values of ``dtype`` any further than to
    the 16 bits that two bfloat16 hold."""
    wanted = Products.BFLOAT16 if dtype == torch.bfloat16 else Products.SPLIT
    if wanted == Products.SPLIT and exact:
        return Products.FLOAT32
    return wanted if native.library().convolution_serves(int(wanted)) else Products.FLOAT32
