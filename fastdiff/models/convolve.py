"""A network's 2-D convolutions in training, by the library's kernels where these are faster."""

import torch
from torch import Tensor, nn

from fastdiff.ops import backends, native
from fastdiff.ops.convolution.fastest import Products, fastest_once
from fastdiff.ops.convolution.op import MOST_TAPS, convolution

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Measured on two threads of a Xeon with AMX, forward and backward: kernels take channels by 32, and
# with 16 of them PyTorch is twice as fast, as it is with 1×1 kernels in bfloat16, where reading is
# the cost; below so many products the calls are.
FEWEST_CHANNELS = 24
FEWEST_PRODUCTS = 1 << 22


def convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; of a plain nn.Conv2d that trains on the CPU by ``ops.convolution``, where that
    is faster. Under autocast both compute in its dtype."""
    dtype = _dtype_of_kernels(layer, x)
    if dtype is None:
        return layer(x)
    assert isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str)
    before, stride = layer.padding[0], layer.stride[0]
    y, _ = convolution(
        x.to(dtype), layer.weight, layer.bias, stride=stride, padding=(before, before)
    )
    return y


def _dtype_of_kernels(layer: nn.Module, x: Tensor) -> torch.dtype | None:
    """In which dtype kernels serve the call; None where they do not, or do not pay."""
    if not (layer.training and torch.is_grad_enabled()):
        return None
    if torch.compiler.is_compiling() or backends.transforms():
        return None
    if not x.is_cpu or not is_plain_convolution(layer):
        return None
    assert isinstance(layer, nn.Conv2d)
    weight = layer.weight
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    serves = (
        (x.requires_grad or weight.requires_grad)
        and backends.named() in (None, "native")
        and dtype in (torch.float32, torch.bfloat16)
        and x.dtype in (torch.float32, dtype)
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.stride[0] == layer.stride[1]
        and layer.padding[0] == layer.padding[1]
        and not any(layer.__dict__.get(hooks) for hooks in HOOKS)
        and layer.__dict__.get("_compiled_call_impl") is None
        and weight.shape[2:].numel() <= MOST_TAPS
        and _pays(x, weight, layer.stride[0], dtype)
    )
    return dtype if serves else None


def _pays(x: Tensor, weight: Tensor, stride: int, dtype: torch.dtype) -> bool:
    """Of float32 products ours are as fast as PyTorch's, and half as fast again as what it has for
    bfloat16 without AMX."""
    positions = len(x) * x.shape[2] * x.shape[3] // stride**2
    if min(weight.shape[:2]) < FEWEST_CHANNELS or weight.shape[2:].numel() == 1:
        return False
    if positions * weight.numel() < FEWEST_PRODUCTS:
        return False
    products = fastest_once(dtype, weight.shape, positions, stride)
    if products not in (Products.FLOAT32, Products.WINOGRAD4):
        return True
    faster = products == Products.WINOGRAD4 or dtype == torch.bfloat16
    return faster and native.library().current_isa() != "baseline"


def is_plain_convolution(layer: nn.Module) -> bool:
    """Whether it is a convolution with a float32 weight on the CPU whose forward nobody has
    replaced."""
    return (
        type(layer) is nn.Conv2d
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and "forward" not in layer.__dict__
        and type(layer.weight) is nn.Parameter
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
    )
