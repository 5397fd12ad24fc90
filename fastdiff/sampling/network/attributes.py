"""What beside its tensors decides what a module computes: its class and its Python attributes."""

import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

# Of every module; parameters, buffers and hooks are looked at where they are used.
_EVERYWHERE = frozenset(vars(nn.Module()))
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
_DEPTH = 8
_MOST_ITEMS, _MOST_BYTES = 4096, 1 << 20


class Same:
    """An object that equals itself alone. It is kept alive, so that its id is nobody else's."""

    __slots__ = ("given",)

    def __init__(self, given: Any):
        self.given = given

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.given is self.given

    __hash__ = None  # type: ignore[assignment]


def attributes_of(module: nn.Module) -> tuple[Any, ...]:
    """The module's class and own attributes, in a form that can be compared with ``==`` later.

    Numbers, strings, arrays, and containers and plain records of them (dataclasses, namespaces) go
    by value, tensors by where they are, other objects by identity and by their own attributes (an
    attention processor's scale, for one): objects inside those by identity alone.
    """
    held = vars(module)
    names = (name for name in held if name not in _EVERYWHERE and not name.startswith("_fastdiff"))
    return type(module), *((name, _frozen(held[name])) for name in names)


def _frozen(value: Any, depth: int = _DEPTH, inside: bool = False) -> Any:
    """``inside``: of an object that is looked into already."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in weakref.ProxyTypes or isinstance(value, nn.Module | type) or not depth:
        return Same(value)
    if isinstance(value, Tensor):
        return _place(value)
    if isinstance(value, np.ndarray):
        small = value.nbytes <= _MOST_BYTES and not value.dtype.hasobject
        return (value.shape, value.dtype, value.tobytes()) if small else Same(value)
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    parts: Any = None
    if isinstance(value, list | tuple | set | frozenset | deque):
        parts = value
    elif isinstance(value, Mapping):
        parts = value.items()
    elif is_dataclass(value):
        parts = [(field.name, getattr(value, field.name, None)) for field in fields(value)]
    elif isinstance(value, SimpleNamespace | Namespace):
        parts = vars(value).items()
    elif not inside and isinstance(getattr(value, "__dict__", None), dict):
        return Same(value), _frozen(list(vars(value).items()), depth - 1, inside=True)
    if parts is None or len(parts) > _MOST_ITEMS:
        return Same(value)
    return kind, tuple(_frozen(part, depth - 1, inside) for part in parts)


def _place(tensor: Tensor) -> Any:
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    except RuntimeError:  # sparse tensors and others without one storage
        return Same(tensor)
