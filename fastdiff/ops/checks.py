"""Checks of the operations' arguments: a refusal says in a line what came and what is expected."""

from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.backends import short
from fastdiff.ops.layouts import Maybe

Sizes = tuple[int, ...]


def refusal(op: str, name: str, value: object, expected: str) -> InputError:
    """The error for an argument that is not what is expected."""
    if isinstance(value, Tensor):
        came = f"{tuple(value.shape)} {short(value.dtype)} on {value.device}"
    else:
        came = f"a {type(value).__name__}"
    return InputError(f"{op}: {name} is {came}; expected {expected}")


def check_x(op: str, x: Tensor) -> None:
    """(N, C, *spatial)."""
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
        raise refusal(op, "x", x, "floating-point (N, C, *spatial)")


def check_tensor(
    op: str, name: str, tensor: Tensor, x: Tensor, shape: Sizes, other: Sizes | None = None
) -> None:
    """A floating-point tensor of ``shape``, or of the ``other`` one, on x's device."""
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.device == x.device:
        found = tensor.shape
        if found == shape or (other is not None and found == other):
            return
    either = f"{tuple(shape)}" if other is None else f"{tuple(shape)} or {tuple(other)}"
    raise refusal(op, name, tensor, f"floating-point {either} on {x.device}")


def check_pair(
    op: str, names: tuple[str, str], first: Maybe, second: Maybe, x: Tensor,
    shape: Sizes, other: Sizes | None = None,
) -> None:  # fmt: skip
    """Two such tensors, or neither."""
    if first is None and second is None:
        return
    if first is None or second is None:
        raise InputError(f"{op}: give both {names[0]} and {names[1]}, or neither")
    check_tensor(op, names[0], first, x, shape, other)
    check_tensor(op, names[1], second, x, shape, other)


def check_activation(op: str, activation: str | None) -> None:
    if activation is not None and activation != "silu":
        raise InputError(f"{op}: activation={activation!r}; expected 'silu' or None")
