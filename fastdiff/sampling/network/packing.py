"""Convolutions on the CPU with their weights in the order in which oneDNN reads them.

A convolution of PyTorch's reorders its weight at every call, which takes as long as 25 positions
of the image: at batch 1 a tenth of a U-Net's time. While a sampler runs, each nn.Conv2d keeps the
reordered weight of its first step.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.convolve import is_plain_convolution

Geometry = tuple[Any, ...]
# Up to here a second copy of a float32 weight is worth its memory. Another dtype needs one anyway.
MOST_SAMPLES, MOST_POSITIONS = 2, 1024


def _reorder(weight: Tensor, geometry: Geometry, shape: torch.Size) -> Tensor:
    """The weight as oneDNN wants it for inputs of ``shape``."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(shape))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "none", [], "")


@functools.cache
def serves(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and CPU pack convolutions of ``dtype``. These are the operators that
    Inductor's freezing calls; they are private, so what is missing or refused is left alone."""
    x, weight, geometry = (
        torch.ones(1, 4, 4, 4),
        torch.ones(4, 4, 3, 3),
        ((1, 1), (1, 1), (1, 1), 1),
    )
    expected = torch.nn.functional.conv2d(x, weight, padding=1)
    try:
        packed = _reorder(weight.to(dtype), geometry, x.shape)
        return torch.equal(_convolve(x.to(dtype), packed, None, geometry).float(), expected)
    except (AttributeError, RuntimeError, TypeError):
        return False


class PackedConvolution:
    """The forward of one nn.Conv2d in ``dtype``; None: in its weight's."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype | None):
        self.layer, self.dtype = layer, dtype
        # (what it was made of, the arguments): one value, because threads may share the layer.
        self.packed: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        live, dtype = self.layer._parameters["weight"], self.dtype
        others = torch.is_grad_enabled() or (
            dtype is None and torch.is_autocast_enabled("cpu")  # the caller's
        )
        if live is None or others or not (self.dtype or self._pays(x)):
            return nn.Conv2d.forward(self.layer, x)
        version = 0 if live.is_inference() else live._version
        made_of = (live.data_ptr(), version, x.shape, x.dtype)
        packed = self.packed
        if packed is None or made_of != packed[0]:
            fits = x.dim() == 4 and x.shape[1] == self.layer.in_channels
            if not fits or (dtype is None and x.dtype != live.dtype):
                return nn.Conv2d.forward(self.layer, x)  # which says what does not fit
            packed = self.packed = made_of, self._pack(live.detach(), dtype or live.dtype, x.shape)
        return _convolve(x if dtype is None else x.to(dtype), *packed[1])

    def begin(self) -> None:
        """Forget weights that may have changed unseen."""
        self.packed = None

    def end(self) -> None:
        """Give the memory back."""
        self.packed = None

    def _pays(self, x: Tensor) -> bool:
        return len(x) <= MOST_SAMPLES and x.numel() <= MOST_POSITIONS * self.layer.in_channels

    def _pack(self, weight: Tensor, dtype: torch.dtype, shape: torch.Size) -> tuple[Any, ...]:
        """The arguments of ``_convolve`` beside x."""
        layer = self.layer
        geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        return _reorder(weight.to(dtype), geometry, shape), bias, geometry


def packable(layer: nn.Module, dtype: torch.dtype | None) -> bool:
    """Whether it is a plain convolution that this PyTorch packs."""
    return is_plain_convolution(layer) and serves(dtype or torch.float32)
