"""What the norms share: checks of their arguments, and the layouts that their kernels read.

Those are dense tensors, contiguous or channels_last, beside rows of neighbouring channels; copies
take the place of whatever else comes.
"""

from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.backends import KERNEL_DTYPES, short
from fastdiff.ops.layouts import Maybe


def check_x(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise no_tensor(op, "x", x)
    if x.dim() < 2 or not x.is_floating_point():
        raise InputError(f"{op}: x is {describe(x)}; expected floating-point (N, C, *spatial)")


def check_like(
    op: str, name: str, tensor: Maybe, x: Tensor, shape: Any, other: Any = None, own: str = ""
) -> None:
    """A floating-point tensor of ``shape`` or the ``other`` one (``own``: whose) beside x."""
    if not isinstance(tensor, Tensor):
        raise no_tensor(op, name, tensor)
    found = tensor.shape
    if (found != shape and (other is None or found != other)) or not tensor.is_floating_point():
        also = f" or {own}{tuple(other)}" if other is not None else ""
        raise InputError(
            f"{op}: {name} is {describe(tensor)}; expected floating-point {tuple(shape)}{also}"
        )
    check_device(op, name, tensor, x)


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise InputError(
            f"{op}: {name} is on {tensor.device} but x is on {x.device}: move one of them"
        )


def check_film_and_activation(op: str, scale: Maybe, shift: Maybe, activation: str | None) -> None:
    if (scale is None) != (shift is None):
        raise InputError(f"{op}: give both scale and shift, or neither")
    if activation is not None and activation != "silu":
        raise InputError(f"{op}: activation={activation!r}; expected 'silu' or None")


def no_tensor(op: str, name: str, value: object) -> InputError:
    return InputError(f"{op}: {name} is a {type(value).__name__}; expected a tensor")


def describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {short(tensor.dtype)}"


# --- Layouts ----------------------------------------------------------------------------------


def is_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, *spatial) is dense in the order N, *spatial, C."""
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def dense_like(x: Tensor) -> Tensor:
    """An empty tensor in the layout that a norm's kernel takes x in."""
    like = torch.empty_like(x)
    if like.is_contiguous() or is_channels_last(like):
        return like
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` in the memory layout of ``like``."""
    if tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous()):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def rows(first: Maybe, second: Maybe) -> tuple[Maybe, Maybe]:
    """Both (C,) or (N, C, 1, …), in one dtype that kernels read, neighbouring channels adjacent."""
    if first is None or second is None:
        return None, None
    if first.dtype != second.dtype or first.dtype not in KERNEL_DTYPES:
        first, second = first.float(), second.float()
    return _adjacent(first), _adjacent(second)


def _adjacent(tensor: Tensor) -> Tensor:
    channels = min(1, tensor.dim() - 1)
    if tensor.stride(channels) == 1 or tensor.shape[channels] == 1:
        return tensor
    return tensor.contiguous()


def unchanged(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    return all(a is b for a, b in zip(before, after, strict=True))
