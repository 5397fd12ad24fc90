"""The layout that the library's convolution reads and writes, and launches of it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.layouts import Maybe, row_stride
from fastdiff.ops.native import address, code


def to_channels_last(v: Maybe, dtype: torch.dtype) -> Any:
    """``v`` itself where it is so already."""
    if v is None or (v.dtype == dtype and v.is_contiguous(memory_format=torch.channels_last)):
        return v
    return v.to(dtype).contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: Tensor, size: Sequence[int]) -> Tensor:
    """No view of another layout: what autograd answers may then be written to."""
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def out_size(
    size: Sequence[int], kernel: Sequence[int], stride: int, zeros: int, upsample: bool = False
) -> list[int]:
    """Of the result along each dimension; ``zeros``: before the first and after the last position
    together."""
    times = 2 if upsample else 1  # no shift: a compiler's symbolic sizes have none
    return [
        (side * times + zeros - taps) // stride + 1 for side, taps in zip(size, kernel, strict=True)
    ]


def shape_of(
    x: Tensor,
    out_channels: int,
    kernel: Sequence[int],
    stride: int,
    padding: tuple[int, int],
    products: int,
    *,
    second: Maybe = None,
    add: Maybe = None,
    upsample: bool = False,
    folded: bool = False,
    silu: bool = False,
) -> Any:
    """A call as the library has it."""
    n, channels, height, width = x.shape
    out_height, out_width = out_size((height, width), kernel, stride, sum(padding), upsample)
    return native.library().ConvolutionShape(
        samples=n,
        channels=channels,
        second_channels=0 if second is None else second.shape[1],
        height=height,
        width=width,
        out_channels=out_channels,
        out_height=out_height,
        out_width=out_width,
        kernel_height=kernel[0],
        kernel_width=kernel[1],
        stride=stride,
        padding=padding[0],
        upsample=upsample,
        folded=folded,
        silu=silu,
        dtype=code(x),
        products=products,
        add_stride=row_stride(add),
    )


def prepared(
    shape: Any,
    x: Tensor,
    panels: Tensor,
    bias: Maybe,
    second: Maybe,
    coefficients: Maybe,
    add: Maybe,
    residual: Maybe,
    y: Tensor,
    moments: Maybe,
) -> Callable[[], None]:
    """What launches in torch's threads, from and to where these are now."""
    library = native.library()
    places = map(address, (x, second, coefficients, panels, bias, add, residual, y, moments))
    return native.in_threads(
        partial(library.convolution_cpu, shape, *places),
        partial(library.convolution_workspace, shape, moments is not None),
    )
