"""Which calls of a module a fused forward serves: every other one is the original's.

It serves a call that gives the arguments it understands, of the kinds it was tried with, and every
other argument, if at all, as its default, on a module whose attributes are as they were then.
"""

import inspect
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.code import names_in

MISSING: Any = inspect.Parameter.empty
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
BY_PLACE = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Arguments:
    """A method's parameters after self, of which a fused one understands the first ``count``.

    They may have any name. ``ignored`` are keywords that change nothing.
    """

    def __init__(self, method: Callable[..., Any], count: int, ignored: tuple[str, ...] = ()):
        parameters = list(inspect.signature(method).parameters.values())[1:]
        placed = [p for p in parameters if p.kind in BY_PLACE]
        named = [p for p in parameters if p.kind in BY_NAME]
        self.count, self.ignored = count, ignored
        self.variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self.names = tuple(p.name for p in placed)
        self.defaults = tuple(p.default for p in placed)
        self.others = {p.name: p.default for p in named if p.name not in self.names[:count]}
        self.by_keyword = tuple(p.kind in BY_NAME for p in placed)
        self.complete = MISSING not in (*self.defaults[count:], *self.others.values())

    def understood(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...] | None:
        """The values of the understood parameters, None for one that the method has not; None in
        place of them all where another argument is given, or one is missing or given twice."""
        given, count = len(args), self.count
        if not self.complete or (given > len(self.names) and not self.variadic):
            return None
        if given == count and not kwargs:
            return args
        for i in range(count, given):
            if i >= len(self.names) or not is_same(args[i], self.defaults[i]):
                return None
        taken = 0
        for name, value in kwargs.items():
            if name in self.names[:count]:
                taken += 1
            elif name in self.others:
                if name in self.names[:given] or not is_same(value, self.others[name]):
                    return None
            elif name not in self.ignored:
                return None
        values = list(args[:count])
        for i in range(given, count):
            if i < len(self.names):
                value = self.defaults[i]
                if self.by_keyword[i] and self.names[i] in kwargs:
                    value, taken = kwargs[self.names[i]], taken - 1
            else:
                value = MISSING if self.variadic else None
            if value is MISSING:
                return None
            values.append(value)
        return None if taken else tuple(values)


def shared_arguments(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Arguments:
    """The arguments of their method, of which ours understands those at its beginning that have
    the same names."""
    pairs = zip(*(list(inspect.signature(f).parameters)[1:] for f in (ours, theirs)), strict=False)
    count = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    lengths = [len(inspect.signature(f).parameters) - 1 for f in (ours, theirs)]
    return Arguments(theirs, min(lengths) if count is None else count)


def kinds_of(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the values are: of a floating-point tensor its number of dimensions, and whether its
    batch is the first tensor's."""
    kinds: list[Any] = []
    batch = None
    for value in values:
        if isinstance(value, Tensor):
            dims = value.dim()
            size = value.shape[0] if dims else 0
            batch = size if batch is None else batch
            fits = size == batch and value.is_floating_point()
            kinds.append(dims if fits else value.dtype)
        elif type(value) is tuple:
            kinds.append(kinds_of(value))
        else:
            kinds.append(None if value is None else type(value))
    return tuple(kinds)


def is_same(value: Any, default: Any) -> bool:
    """Never asks a tensor whether it equals something."""
    return value is default or (
        type(value) is type(default) and type(value) in PLAIN and value == default
    )


# --- Attributes -------------------------------------------------------------------------------


# (how many attributes there are, those with their values, names that are none)
Attributes = tuple[int, tuple[tuple[str, Any], ...], tuple[str, ...]]
NOTHING: Attributes = (0, (), ())


def attributes(module: nn.Module, *methods: Any) -> Attributes:
    """What a forward may read of the module beside its parts: its own attributes, and the names in
    its methods' code that may become attributes. For what is no plain value, the type."""
    held = vars(module)
    own = sorted(held.keys() - _OF_EVERY_MODULE)
    named: set[str] = set()
    for method in methods:
        named |= names_in(method)
    parts = {*module._modules, *module._parameters, *module._buffers}
    absent = tuple(sorted(named - held.keys() - parts))
    return len(held), tuple((name, _form(held[name])) for name in own), absent


def are_unchanged(module: nn.Module, expected: Attributes) -> bool:
    held = module.__dict__
    count, present, absent = expected
    for name, form in present:
        value = held.get(name, MISSING)
        if value is not form and _form(value) != form:
            return False
    return len(held) == count or not any(name in held for name in absent)


def _form(value: Any) -> Any:
    kind = type(value)
    if value is None or value is MISSING or kind in PLAIN:
        return value
    return value if kind in (FunctionType, BuiltinFunctionType) else kind
