"""Convolutions in one to three dimensions, and the layers that resample."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.convolve import convolve
from fastdiff.models.execution.program import Program, Value

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


def convolution(
    dims: int,
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: Any = 1,
    padding: Any = None,
) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A 1-D, 2-D or 3-D convolution; without a padding one that keeps the size up to its stride."""
    padding = kernel // 2 if padding is None else padding
    return CONVOLUTIONS[dims](in_channels, out_channels, kernel, stride, padding)


def upsample_nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest-neighbour resize of (N, C, *spatial) to ``size``: any size, so that odd ones fit."""
    return F.interpolate(x, tuple(size), mode="nearest")


# Doubling repeats every position, so along one axis the taps (a, b, c) of a kernel meet positions
# only as a, b + c (even outputs) and a + b, c (odd ones): that is a transposed convolution of
# stride 2 with the kernel (c, b + c, a + b, a).
DOUBLING = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def doubling_folds(x: Tensor, size: Sequence[int]) -> bool:
    """Whether ``convolve_doubled`` serves, and pays: measured on the CPU in float32, from 512
    positions on, where the convolution itself is the cost."""
    if x.dim() != 4 or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    n, _, height, width = x.shape
    doubles = tuple(size) == (2 * height, 2 * width)
    return doubles and n * height * width >= 512 and not torch.is_autocast_enabled("cpu")


def convolve_doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest-neighbour doubling and a 3×3 convolution in one: 4 products per output in place of 9.

    x (N, C, H, W), weight (C', C, 3, 3), bias (C',) -> (N, C', 2H, 2W).
    """
    axis = weight.new_tensor(DOUBLING)  # (4, 3)
    both = torch.kron(axis, axis)  # (16, 9)
    out_channels, channels = weight.shape[:2]
    folded = weight.reshape(out_channels * channels, 9) @ both.t()
    folded = folded.view(out_channels, channels, 4, 4).transpose(0, 1)
    return F.conv_transpose2d(x, folded, bias, stride=2, padding=1)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to a given size, then a convolution if ``use_conv``."""

    def __init__(self, channels: int, use_conv: bool, dims: int):
        super().__init__()
        self.use_conv = use_conv
        if use_conv:
            self.conv = convolution(dims, channels, channels, 3)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if self.use_conv and doubling_folds(x, size):
            return convolve_doubled(x, self.conv.weight, self.conv.bias)
        x = upsample_nearest(x, size)
        return convolve(self.conv, x) if self.use_conv else x

    def unroll(self, program: Program, x: Value, size: Sequence[int]) -> Value:
        x = program.upsample(self, x, size)
        return program.convolution(self.conv, x) if self.use_conv else x


class Downsample(nn.Module):
    """Halving by a strided convolution or by average pooling; n becomes ceil(n / 2).

    With ``padding=0`` the convolution's zeros are one row and one column after the image instead of
    one on each side, and n becomes floor(n / 2). A 3-D input keeps its first spatial dimension, as
    published (video depth).

    Source: Ho et al.'s code for ``padding=0`` (TensorFlow's "SAME"); improved-diffusion.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int, padding: int = 1):
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        self.pad_after = (0, 1) * min(dims, 2) if use_conv and padding == 0 else None
        if use_conv:
            sides = (1, padding, padding) if dims == 3 else padding
            self.op = convolution(dims, channels, channels, 3, stride, sides)
        else:
            pool = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims]
            # ceil_mode averages the last, smaller window of an odd size over what is there.
            self.op = pool(stride, stride, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.op, nn.AvgPool3d):
            # Unlike its kin it refuses an image smaller than the window.
            window = [min(k, n) for k, n in zip((1, 2, 2), x.shape[2:], strict=True)]
            return F.avg_pool3d(x, window, self.op.stride, ceil_mode=True)
        return convolve(self.op, x if self.pad_after is None else F.pad(x, self.pad_after))

    def unroll(self, program: Program, x: Value) -> Value:
        if isinstance(self.op, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return program.convolution(self.op, x, after=int(self.pad_after is not None))
        strides = (1, 2, 2) if len(x.size) == 3 else (2,) * len(x.size)
        size = [-(-n // stride) for n, stride in zip(x.size, strides, strict=True)]
        # Not the module itself: hooks on all modules of the process see modules that are called.
        pool = self.forward if isinstance(self.op, nn.AvgPool3d) else self.op.forward
        return program.plain("pool", pool, x, shape=(*x.shape[:2], *size), layer=self)
