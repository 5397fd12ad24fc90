"""A record of arguments that several methods share: they are called with its fields."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
Self = TypeVar("Self")
Record = TypeVar("Record")
Result = TypeVar("Result")


def called_with(
    record: Callable[P, Record],
) -> Callable[[Callable[[Self, Record], Result]], Callable[Concatenate[Self, P], Result]]:
    """A method written ``method(self, given)`` is called with the fields of the dataclass
    ``record``, and has their names and defaults in its signature."""
    fields = list(inspect.signature(record).parameters.values())

    def decorate(
        method: Callable[[Self, Record], Result],
    ) -> Callable[Concatenate[Self, P], Result]:
        written = inspect.signature(method)
        this = next(iter(written.parameters.values()))

        @functools.wraps(method)
        def call(self: Self, *args: P.args, **kwargs: P.kwargs) -> Result:
            return method(self, record(*args, **kwargs))

        shown: Any = call
        shown.__signature__ = written.replace(parameters=[this, *fields])
        return call

    return decorate
