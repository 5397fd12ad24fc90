"""Python values that hold others, taken apart and put together again with other parts.

What a model calls may be a module or lead to one: a method, a partial, a function that names it in
its closure or its globals, a list of them. ``opened`` does not look into objects.
"""

import copy
import dis
import functools
import weakref
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# These hold nothing.
PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis)}
    | {torch.dtype, torch.device, torch.Size, Tensor, nn.Parameter, np.ndarray}
)
DEPTH = 3  # of values within values
Opened = tuple[list[Any], Callable[[list[Any]], Any]]


class Unfaithful(Exception):
    """A value with other parts would not do what it does."""


def opened(value: Any) -> Opened | None:
    """(its parts, what makes such a value of other parts), or None for what holds none.

    What is made raises Unfaithful for a function that assigns to the names whose values are others.
    """
    kind = type(value)
    if kind is FunctionType:
        return _function(value)
    if kind is MethodType:
        return [value.__self__, value.__func__], lambda parts: MethodType(parts[1], parts[0])
    if kind is functools.partial:
        return _partial(value)
    if kind is weakref.ReferenceType:
        return [value()], lambda parts: weakref.ref(parts[0])
    if kind in weakref.ProxyTypes:
        return None
    if isinstance(value, list | tuple):
        return None if PLAIN.issuperset(map(type, value)) else (list(value), _sequence(value))
    if isinstance(value, dict):
        return _mapping(value)
    return None


def parts_of_object(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that is none of the kinds above; None for what has none."""
    try:
        plain = isinstance(value, type | ModuleType | Tensor | FunctionType)
        held = None if plain else getattr(value, "__dict__", None)
    except ReferenceError:
        return None
    return held if type(held) is dict else None


def is_module(value: Any) -> bool:
    try:
        return isinstance(value, nn.Module)
    except ReferenceError:  # a weak proxy of what is gone
        return False


def modules_in(value: Any, depth: int = DEPTH, objects: bool = True) -> Iterator[nn.Module]:
    """The modules that a value leads to."""
    if is_module(value):
        yield value
        return
    if not depth or type(value) in PLAIN:
        return
    parts: Any = opened(value)
    if parts is not None:
        parts = parts[0]
    elif objects:
        parts, objects = (parts_of_object(value) or {}).values(), False
    for part in parts or ():
        yield from modules_in(part, depth - 1, objects)


def _sequence(value: Any) -> Callable[[list[Any]], Any]:
    def made(parts: list[Any]) -> Any:
        if isinstance(value, tuple):
            return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
        other = copy.copy(value)
        other[:] = parts
        return other

    return made


def _mapping(value: dict[Any, Any]) -> Opened | None:
    if PLAIN.issuperset(map(type, value.values())) and PLAIN.issuperset(map(type, value)):
        return None

    def made(parts: list[Any]) -> Any:
        other = copy.copy(value)
        other.clear()
        other.update(zip(parts[: len(value)], parts[len(value) :], strict=True))
        return other

    return [*value, *value.values()], made


def _partial(value: Any) -> Opened:
    count, names = 1 + len(value.args), list(value.keywords)

    def made(parts: list[Any]) -> Any:
        keywords = dict(zip(names, parts[count:], strict=True))
        other = functools.partial(parts[0], *parts[1:count], **keywords)
        other.__dict__.update(vars(value))
        return other

    return [value.func, *value.args, *value.keywords.values()], made


_EMPTY: Any = object()  # of a cell


def _function(value: Any) -> Opened | None:
    code, named = value.__code__, value.__globals__
    home = str(named.get("__name__", ""))
    cells = value.__closure__ or ()
    # The globals of PyTorch's own functions lead to no model, and are many.
    names = [] if home.startswith("torch") else [name for name in _names(code) if name in named]
    defaults, keywords = value.__defaults__ or (), value.__kwdefaults__ or {}
    if not (cells or names or defaults or keywords):
        return None
    ends = (len(cells), len(cells) + len(names), len(cells) + len(names) + len(defaults))
    given = [*map(_content, cells), *map(named.get, names), *defaults, *keywords.values()]

    def made(parts: list[Any]) -> Any:
        bound = (*code.co_freevars, *names)
        changed = {
            name: part
            for name, part, before in zip(bound, parts, given, strict=False)
            if part is not before
        }
        globals_, outer = _stored(code)
        if (
            home.startswith("torch._dynamo")
            or not outer.isdisjoint(changed)
            or (globals_ and not changed.keys().isdisjoint(names))  # it would write to a copy
        ):
            raise Unfaithful
        closure = tuple(
            cell if part is before else CellType(part)
            for cell, part, before in zip(cells, parts, given, strict=False)
        )
        others = dict(zip(names, parts[ends[0] : ends[1]], strict=True))
        other = FunctionType(
            code,
            named if changed.keys().isdisjoint(names) else named | others,
            value.__name__,
            tuple(parts[ends[1] : ends[2]]) or None,
            closure if cells else None,
        )
        other.__kwdefaults__ = dict(zip(keywords, parts[ends[2] :], strict=True)) or None
        for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
            setattr(other, name, getattr(value, name))
        other.__dict__.update(vars(value))
        return other

    return given, made


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in _codes(code) for name in part.co_names))


@functools.lru_cache(maxsize=1024)
def _stored(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals and the outer variables that a function assigns to."""
    steps = [step for part in _codes(code) for step in dis.get_instructions(part)]

    def those(*kinds: str) -> frozenset[str]:
        return frozenset(step.argval for step in steps if step.opname in kinds)

    return those("STORE_GLOBAL", "DELETE_GLOBAL"), those("STORE_DEREF", "DELETE_DEREF")
