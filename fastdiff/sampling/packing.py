"""Convolutions on the CPU with their weights in the order in which oneDNN reads them.

A convolution of PyTorch's reorders its weight at every call, which takes as long as 25 positions
of the image: at batch 1 a tenth of a U-Net's time. While a sampler runs, each nn.Conv2d keeps the
reordered weight of its first step.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
        self.parameters = layer._parameters  # what layer.weight would look up at every call
        self.arguments: tuple[Any, ...] = ()
        self.made_of: tuple[Any, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        live, dtype = self.parameters["weight"], self.dtype
        others = torch.is_grad_enabled() or (
            dtype is None and torch.is_autocast_enabled("cpu")  # the caller's
        )
        if live is None or others or not (self.dtype or self._pays(x)):
            return nn.Conv2d.forward(self.layer, x)
        version = 0 if live.is_inference() else live._version
        made_of = (live.data_ptr(), version, x.shape, x.dtype)
        if made_of != self.made_of:
            fits = x.dim() == 4 and x.shape[1] == self.layer.in_channels
            if not fits or (dtype is None and x.dtype != live.dtype):
                return nn.Conv2d.forward(self.layer, x)  # which says what does not fit
            self.arguments = self._pack(live.detach(), dtype or live.dtype, x.shape)
            self.made_of = made_of
        return _convolve(x if dtype is None else x.to(dtype), *self.arguments)

    def _pays(self, x: Tensor) -> bool:
        return len(x) <= MOST_SAMPLES and x.numel() <= MOST_POSITIONS * self.layer.in_channels

    def _pack(self, weight: Tensor, dtype: torch.dtype, shape: torch.Size) -> tuple[Any, ...]:
        """The arguments of ``_convolve`` beside x."""
        layer = self.layer
        geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        return _reorder(weight.to(dtype), geometry, shape), bias, geometry


class Packing:
    """A module's convolutions, packed while ``in_use``."""

    def __init__(self, module: nn.Module | None, dtype: torch.dtype | None):
        self.module = module
        self.dtype = dtype if dtype in (torch.bfloat16, torch.float16) else None
        self.packed: dict[nn.Conv2d, PackedConvolution] = {}

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
        replaced = self.packed
        try:
            for layer, packed in replaced.items():
                layer.forward = packed  # type: ignore[method-assign,assignment]
            yield
        finally:
            for layer in replaced:
                layer.__dict__.pop("forward", None)


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
