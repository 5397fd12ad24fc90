"""explain: which implementation would serve a call, and why."""

from collections.abc import Callable
from typing import Any

from fastdiff.errors import InputError
from fastdiff.ops.dispatch import OPERATIONS, Choice


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Print, and return, which backend would serve ``op(*args, **kwargs)`` now and why.

    ``op`` is one of ``fastdiff.ops`` or its name: ``explain("attention", qkv, 4)``. Nothing is
    computed. Raises InputError for an unknown operation and for a named backend that cannot serve.
    For what ``accelerate`` did to a model see ``fastdiff.report``.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPERATIONS:
        raise InputError(f"op is {name!r}; expected one of {', '.join(OPERATIONS)}")
    choice = OPERATIONS[name].choose(*args, **kwargs)
    print(choice)
    return choice
