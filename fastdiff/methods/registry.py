"""The sampling methods by name. Each file beside this one adds its own; no list names them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from fastdiff.errors import InputError
from fastdiff.methods.levels import Columns
from fastdiff.methods.rows import Row


@dataclass(frozen=True)
class Method:
    """How a method derives its columns of a step table, and what it takes.

    columns: from a Source and the options that it names; float64 (K,) each, t ascending, for
        methods with a row a step, or Rows in sampling order.
    learned_variance: the rows use the variance that the network learnt, where it learnt one.
    options: the names of ``StepTable.from_process``'s arguments that are such methods' alone.
    """

    name: str
    columns: Callable[..., Columns | list[Row]]
    learned_variance: bool
    options: tuple[str, ...]

    def accepted(
        self, options: Mapping[str, Any], *, eta: float | None, clipped_eps: bool
    ) -> dict[str, Any]:
        """What ``columns`` takes beside the source: ``options``, and of those that all methods are
        asked for by name the ones that it has. InputError for another method's option."""
        given = dict(options)
        if eta is not None and (eta != 0.0 or "eta" in self.options):
            given["eta"] = eta
        if not clipped_eps or "clipped_eps" in self.options:
            given["clipped_eps"] = clipped_eps
        for name, value in given.items():
            if name not in self.options:
                owners = " or ".join(map(repr, taking(name))) or "none that there is"
                raise InputError(f"{name}={value} belongs to method {owners}, not to {self.name!r}")
        return given


METHODS: dict[str, Method] = {}


def method(name: str, *, learned_variance: bool = False) -> Callable[..., Any]:
    """Register the decorated function, which derives a method's columns, or rows, from a Source.

    Its keyword arguments are the method's options, which ``StepTable.from_process`` passes on: all
    but ``clipped_eps`` need a default.

    Args:
        name: of the method, for ``Sampler(method=…)``; no two are alike.
        learned_variance: whether its rows use the variance that a network learnt.
    """

    def register(columns: Callable[..., Any]) -> Callable[..., Any]:
        assert name not in METHODS, f"two methods are named {name!r}"
        _, *options = signature(columns).parameters
        METHODS[name] = Method(name, columns, learned_variance, tuple(options))
        return columns

    return register


def find(name: str) -> Method:
    """InputError for a name that no file registers."""
    try:
        return METHODS[name]
    except (KeyError, TypeError):
        raise InputError(f"method is {name!r}; expected one of {', '.join(METHODS)}") from None


def taking(option: str) -> list[str]:
    """The names of the methods that have this option."""
    return [known.name for known in METHODS.values() if option in known.options]
