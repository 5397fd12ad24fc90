"""Convolutions at the ends of a network, from 3 channels or to 3 or 6, with 8 of them on a GPU.

cuDNN's kernels on tensor cores read eight values of two bytes at a time; for fewer channels it
takes a slow one or pads at every call. The channels that are added are zeros, in x and in the
weight, and those of the output are dropped.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = 8
DEVICES = ("cuda",)


class PaddedConvolution:
    """The forward of one nn.Conv2d in the dtype of its weight.

    ``tensors``: its weight and bias with zeros. They stay where they are as long as the layer's are
    of one form, because captured graphs read them.
    """

    def __init__(self, layer: nn.Conv2d):
        self.layer = layer
        self.tensors: list[Tensor] = []
        self.inputs = max(0, CHANNELS - layer.in_channels)  # zeros that are added
        self.outputs = max(0, CHANNELS - layer.out_channels)

    def __call__(self, x: Tensor) -> Tensor:
        layer, (weight, *bias) = self.layer, self.tensors
        fits = x.dim() == 4 and x.shape[1] == layer.in_channels
        if torch.is_grad_enabled() or not fits or _runs_in(x) != weight.dtype:
            return nn.Conv2d.forward(layer, x)  # which also says what does not fit
        padded = functional.pad(x.to(weight.dtype), (0, 0, 0, 0, 0, self.inputs))
        geometry: Any = (layer.stride, layer.padding, layer.dilation)
        y = functional.conv2d(padded, weight, bias[0] if bias else None, *geometry)
        return y[:, : layer.out_channels].contiguous(memory_format=_layout(y))

    def begin(self) -> None:
        """See the weights that the layer has now."""
        live = [self.layer._parameters[name] for name in ("weight", "bias")]
        made = [self._padded(tensor.detach()) for tensor in live if tensor is not None]
        if list(map(_form, made)) != list(map(_form, self.tensors)):
            self.tensors = made
        for kept, new in zip(self.tensors, made, strict=True):
            kept.copy_(new)

    def end(self) -> None:
        """Graphs go on reading the tensors."""

    def _padded(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 1:
            return functional.pad(tensor, (0, self.outputs))
        padded = functional.pad(tensor, (0, 0, 0, 0, 0, self.inputs, 0, self.outputs))
        return padded.contiguous(memory_format=_layout(tensor))


def paddable(layer: nn.Module, dtype: torch.dtype | None) -> bool:
    """Whether it is a plain convolution of few channels on the GPU, in half precision: its weight
    is, or ``dtype`` says what it is cast to. Nobody has replaced its forward or looks before it."""
    return (
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and min(layer.in_channels, layer.out_channels) < CHANNELS
        and "forward" not in layer.__dict__
        and not layer._forward_pre_hooks
        and type(layer.weight) is nn.Parameter
        and layer.weight.device.type in DEVICES
        and _dtype(layer.weight.dtype, dtype) in (torch.bfloat16, torch.float16)
    )


def _dtype(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype | None:
    """That of the weight which the network runs with; None where autocast casts it at every
    call."""
    if dtype in (None, own):
        return own
    return dtype if own == torch.float32 else None


def _runs_in(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _layout(tensor: Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
