"""What beside its tensors decides what a module computes: the values of its Python attributes."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

# Of every module; parameters, buffers and hooks are looked at where they are used.
_EVERYWHERE = frozenset(vars(nn.Module()))
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
_DEPTH = 4  # of containers in containers
_MOST = 4096  # items, or bytes of an array


class Same:
    """An object that equals itself alone. It is kept alive, so that its id is nobody else's."""

    __slots__ = ("given",)

    def __init__(self, given: Any):
        self.given = given

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.given is self.given

    __hash__ = None  # type: ignore[assignment]


def attributes_of(module: nn.Module) -> tuple[Any, ...]:
    """The module's own attributes in a form that can be compared with ``==`` later.

    Numbers, strings and containers of them by value, tensors by where they are, other objects by
    identity and by their own attributes (an attention processor's scale, for one).
    """
    held = vars(module)
    names = (name for name in held if name not in _EVERYWHERE and not name.startswith("_fastdiff"))
    return tuple((name, _frozen(held[name])) for name in names)


def _frozen(value: Any, depth: int = _DEPTH, inside: bool = False) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if isinstance(value, np.ndarray) and value.nbytes <= _MOST:
        return value.shape, value.dtype, value.tobytes()
    if isinstance(value, Mapping):
        value, kind = [part for item in value.items() for part in item], type(value)
    else:
        kind = type(value)
    if isinstance(value, Collection) and depth and len(value) <= _MOST:
        return kind, tuple(_frozen(part, depth - 1, inside) for part in value)
    own = getattr(value, "__dict__", None)
    if inside or isinstance(value, nn.Module | type) or not isinstance(own, dict) or not depth:
        return Same(value)
    return Same(value), tuple((name, _frozen(own[name], depth - 1, True)) for name in own)
