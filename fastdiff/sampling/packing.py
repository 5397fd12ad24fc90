"""Convolutions on the CPU with their weights in the order in which oneDNN reads them.

A convolution of PyTorch's reorders its weight at every call, which at batch 1 is a quarter of a
U-Net's time. While a sampler runs, each nn.Conv2d keeps the reordered weight of its first step.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Geometry = tuple[Any, ...]


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

    def __init__(self, convolution: nn.Conv2d, dtype: torch.dtype | None):
        self.convolution, self.dtype = convolution, dtype
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.made_of: tuple[Any, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.convolution
        others = torch.is_grad_enabled() or (
            self.dtype is None and torch.is_autocast_enabled("cpu")  # the caller's
        )
        if others or x.dim() != 4 or x.shape[1] != layer.in_channels:
            return nn.Conv2d.forward(layer, x)  # which says what does not fit
        live, dtype = layer.weight, self.dtype or layer.weight.dtype
        made_of = (live.data_ptr(), live._version, x.shape)
        with torch.autocast("cpu", enabled=False):
            if self.weight is None or made_of != self.made_of:
                self.weight = _reorder(live.detach().to(dtype), self.geometry, x.shape)
                self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
                self.made_of = made_of
            return _convolve(x.to(dtype), self.weight, self.bias, self.geometry)

    @property
    def geometry(self) -> Geometry:
        layer = self.convolution
        return layer.padding, layer.stride, layer.dilation, layer.groups


class Packing:
    """A module's convolutions, packed while ``in_use``."""

    def __init__(self, module: nn.Module | None, dtype: torch.dtype | None):
        self.module = module
        self.dtype = dtype if dtype in (torch.bfloat16, torch.float16) else None
        self.packed: dict[nn.Conv2d, PackedConvolution] = {}
        self.depth = 0

    def refresh(self) -> None:
        """Forget what was packed of weights that may have changed since."""
        convolutions = () if self.module is None else _packable(self.module, self.dtype)
        self.packed = {layer: PackedConvolution(layer, self.dtype) for layer in convolutions}

    def forget(self) -> None:
        """Give the memory back."""
        self.packed = {}

    def weights(self) -> set[nn.Parameter]:
        """The parameters that are read when they are packed, and not at every call."""
        return {layer.get_parameter("weight") for layer in self.packed}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        if self.depth or not self.packed:
            yield
            return
        self.depth += 1
        try:
            for layer, packed in self.packed.items():
                layer.forward = packed  # type: ignore[method-assign,assignment]
            yield
        finally:
            for layer in self.packed:
                layer.__dict__.pop("forward", None)
            self.depth -= 1


def _packable(module: nn.Module, dtype: torch.dtype | None) -> Iterator[nn.Conv2d]:
    """The plain convolutions on the CPU whose forward nobody has replaced."""
    for layer in module.modules():
        if (
            type(layer) is nn.Conv2d
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
            and "forward" not in layer.__dict__
            and type(layer.weight) is nn.Parameter
            and layer.weight.device.type == "cpu"
            and layer.weight.dtype == torch.float32
            and serves(dtype or torch.float32)
        ):
            yield layer
