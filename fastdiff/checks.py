"""Checks of arguments that several modules share. None of them waits for a device."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError, first_line

_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_timesteps(
    t: Tensor, x: Tensor, num_timesteps: int, x_name: str = "x", *, look: bool = True
) -> Tensor:
    """``t`` as int64 (N,), one timestep index 0 … num_timesteps - 1 per sample of ``x`` (N, ...).

    Raises InputError for another type, shape or device, and on the CPU for an index out of range.
    Elsewhere reading the values would stall the device: the caller's gathers answer NaN instead.
    ``look=False`` leaves the range to the caller.
    """
    if not isinstance(t, Tensor) or t.dtype not in _INDEX_DTYPES:
        came = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise InputError(f"t must be an integer tensor of timestep indices, got {came}")
    if x.dim() == 0 or t.shape != x.shape[:1]:
        raise InputError(
            f"t must hold one timestep per sample of {x_name}: expected a shape ({_batch(x)},) "
            f"for {x_name} of shape {tuple(x.shape)}, got {tuple(t.shape)}"
        )
    if t.device != x.device:
        raise InputError(f"t is on {t.device} but {x_name} is on {x.device}: move one of them")
    if t.dtype != torch.int64:
        t = t.long()
    if look and (stray := first_outside(t, num_timesteps)) is not None:
        raise timestep_error(stray, num_timesteps)
    return t


def first_outside(values: Tensor, count: int) -> int | None:
    """The first of integer ``values`` that is not 0 … count - 1; None where all are, or nobody may
    look: on another device than the CPU that would stall it, and a compiler has no values."""
    if values.device.type != "cpu" or not values.numel() or torch.compiler.is_compiling():
        return None
    low, high = (int(value) for value in torch.aminmax(values))
    if low >= 0 and high < count:
        return None
    return int(values[(values < 0) | (values >= count)][0])


def check_labels(y: Tensor, n: int, name: str, what: str) -> None:
    """Raise InputError unless ``y`` holds ``n`` integers. ``what`` they are, for the message."""
    if y.shape != (n,) or y.is_floating_point() or y.dtype == torch.bool:
        raise InputError(
            f"{name} has shape {tuple(y.shape)} and dtype {str(y.dtype).removeprefix('torch.')}; "
            f"expected ({n},) integer {what}"
        )


def timestep_error(t: int, steps: int) -> InputError:
    """What a timestep that a process of so many has not got raises."""
    return InputError(f"t must lie in 0 … {steps - 1} for a process of {steps} steps, got {t}")


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a real number, neither infinite nor NaN (text and tensors are none)."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def check_positive(name: str, value: float) -> None:
    """Raise InputError unless ``value`` is a positive number."""
    if not (is_finite(value) and value > 0):
        raise InputError(f"{name} must be a positive number, got {value!r}")


def check_shape(shape: Sequence[int], *, empty: bool = False) -> tuple[int, ...]:
    """``shape`` as a tuple, or InputError unless it is (N, C, ...) in positive integers.

    ``empty`` allows N = 0.
    """
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if len(sizes) < 2 or sizes[0] < (0 if empty else 1) or min(sizes[1:]) < 1:
        raise InputError(
            f"shape is {shape!r}; expected (N, C, ...) in positive integers, as in (16, 3, 32, 32)"
        )
    return sizes


def check_device(device: torch.device | str) -> torch.device:
    """``device`` as a torch.device, or InputError for what names none."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(
            f"device is {device!r}; expected 'cpu', 'cuda', 'cuda:1', … or a torch.device"
        ) from None


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device by that name, or the best there is. InputError when it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {str(device)!r} here ({first_line(error)})") from None
    return chosen


def check_float(x: Tensor, name: str) -> None:
    """Raise InputError unless ``x`` is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        came = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(
            f"{name} must be a floating-point tensor (images scaled to [-1, 1]), got {came}"
        )


def check_like(value: Tensor, name: str, x: Tensor, x_name: str) -> None:
    """Raise InputError unless ``value`` is a float tensor of ``x``'s shape and device."""
    check_float(value, name)
    if value.shape != x.shape:
        raise InputError(
            f"{name} must have the shape of {x_name}, {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    if value.device != x.device:
        raise InputError(f"{name} is on {value.device} but {x_name} is on {x.device}: move one")


def _batch(x: Tensor) -> str:
    return str(x.shape[0]) if x.dim() else "N"
