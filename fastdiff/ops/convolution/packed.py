"""A convolution's weight in the order in which the CPU's kernels multiply by it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.backends import KERNEL_DTYPES
from fastdiff.ops.convolution.fastest import Products, possible


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


def pack(weight: Tensor, dtype: torch.dtype, *, products: Products | None = None) -> Packed:
    """A 2-D convolution's weight for inputs of ``dtype``, on the CPU.

    ``products``: how to multiply, one of ``fastest.possible``; None: float32 or AMX's tiles, which
    serve every kernel and stride.
    """
    if weight.dim() != 4 or not weight.is_cpu or dtype not in KERNEL_DTYPES:
        return Packed(weight)
    if products is None:
        products = possible(dtype, (), 1)[-1]
    k, channels, height, width = weight.shape
    size = native.library().convolution_panels(int(products), k, channels, height * width)
    room = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT
    packed = Packed(weight, room[start : start + size], products)
    packed.refresh()
    return packed


ALIGNMENT = 64
