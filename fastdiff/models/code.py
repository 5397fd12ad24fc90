"""What a function's code names."""

import inspect
from types import CodeType
from typing import Any


def names_in(function: Any) -> set[str]:
    """Globals, attributes and what may be one by ``getattr``, below wrappers; none of what is not
    written in Python."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return _names(code) if isinstance(code, CodeType) else set()


def names_in_forward(kind: Any) -> set[str]:
    """What the forward of a class names, and the methods that it calls."""
    names: set[str] = set()
    unseen = {"forward"}
    while unseen:
        name = unseen.pop()
        names.add(name)
        unseen |= names_in(inspect.getattr_static(kind, name, None)) - names
    return names


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            names.add(constant)
        elif isinstance(constant, CodeType):
            names |= _names(constant)
    return names
