"""The twin of one module, or of an object that holds modules: what a replica is made of."""

import operator
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OURS = ("training", "_modules", "_parameters")


class Twin:
    """The twin of one object: of a module, or of an object that holds modules.

    ``copies``: the parameters that are others than the module's; ``forward``: in place of its own.
    """

    def __init__(self, original: Any):
        self.original, self.kind = original, type(original)
        self.twin = object.__new__(self.kind)
        self.is_module = isinstance(original, nn.Module)
        self.source: list[Any] = []  # the values of the original's attributes
        self.deep: list[str] = []  # the names of those in which there may be modules
        self.attributes: dict[str, Any] = {}  # what the original has, with twins in it
        self.given: dict[str, Any] = {}  # and what the twin was given
        self.children: dict[str, Any] = {}
        self.given_children: dict[str, Any] = {}
        self.parameters: dict[str, Any] = {}
        self.copies: dict[str, nn.Parameter] = {}
        self.forward: Any = None
        self.rebound: set[str] = set()
        self.wrapped: dict[str, Any] = {}
        self.hooked = False  # hooks of its own, once

    def hooks_of(self, name: str, hooks: Any) -> Any:
        """The hooks, which are given the module that they were registered on; the twin is given
        to those that compute its weights."""
        own = vars(self.original)
        if name == "_forward_pre_hooks" and any(_is_computed(own, n, v) for n, v in own.items()):
            return hooks
        before, made = self.wrapped.get(name, ({}, None))
        if list(before.items()) != list(hooks.items()):
            made = type(hooks)((key, _Hook(self.original, hook)) for key, hook in hooks.items())
            self.wrapped[name] = dict(hooks), made
        return made

    def is_of(self, held: dict[str, Any]) -> bool:
        """Whether these are the attributes that the original had."""
        known = held.keys() == self.attributes.keys()
        return known and same(held.values(), self.source) and type(self.original) is self.kind

    def is_leaf(self, held: dict[str, Any]) -> bool:
        """Whether nothing in these attributes, which are as they were, leads anywhere."""
        hooks = any(held.get(name) for name in HOOKS) or self.hooked
        return not (hooks or self.deep or held["_modules"] or self.children)

    def has(self, others: dict[str, Any], children: dict[str, Any]) -> bool:
        given = self.given_children
        return (
            all(self.attributes[name] is value for name, value in others.items())
            and same(children.values(), given.values())
            and (not children or list(children) == list(given))
        )

    def set(self, attributes: dict[str, Any], children: dict[str, Any] | None = None) -> None:
        if type(self.original) is not self.kind:
            self.kind = self.twin.__class__ = type(self.original)
        self.attributes = attributes
        if children is not None:
            self.given_children = children
            if list(self.children) != list(children):
                self.children.clear()
            self.children.update(children)
        self._install()

    def put(self, copies: dict[str, nn.Parameter], forward: Any) -> None:
        """Let these stand in place of the module's own from now on."""
        if copies or self.copies or forward is not self.forward:
            self.copies, self.forward = copies, forward
            self._install()

    def _install(self) -> None:
        given = dict(self.attributes)
        if self.is_module:
            given["training"] = False
            given["_modules"] = self.children
            if self.copies:
                update(self.parameters, given["_parameters"] | self.copies)
                given["_parameters"] = self.parameters
            if self.forward is not None:
                given.setdefault("forward", self.forward)
        self.given = given
        update(vars(self.twin), given)

    def changed(self) -> bool:
        """Whether a forward has bound attributes anew, or made modules."""
        held = vars(self.twin)
        return not (
            same(held.values(), self.given.values())
            and same(self.children.values(), self.given_children.values())
        )

    def write_back(self, original_of: Callable[[Any], Any]) -> None:
        """Give the original what a forward has bound anew."""
        held, given, own = vars(self.twin), self.given, vars(self.original)
        for name, value in list(held.items()):
            bound_anew = name not in given or given[name] is not value
            if bound_anew and not (name in _OURS or _is_computed(own, name, value)):
                own[name] = original_of(value)
                given[name] = value
                self.rebound.add(name)
        for name in given.keys() - held.keys():
            own.pop(name, None)
            del given[name]
        if not same(self.children.values(), self.given_children.values()):
            for name, child in self.children.items():
                own["_modules"][name] = original_of(child)
            for name in self.given_children.keys() - self.children.keys():
                own["_modules"].pop(name, None)
            self.given_children = dict(self.children)


class _Hook:
    """A hook of the user's, who knows the module that it was registered on and not the twin."""

    def __init__(self, module: nn.Module, hook: Any):
        self.module, self.hook = module, hook

    def __call__(self, _: Any, *rest: Any) -> Any:
        return self.hook(self.module, *rest)


def _is_computed(own: dict[str, Any], name: str, value: Any) -> bool:
    """Whether it is a weight that a hook computes of others before every forward (weight_norm,
    spectral_norm, pruning), and that belongs to this forward alone."""
    parameters = own.get("_parameters", {})
    return isinstance(value, Tensor) and any(p.startswith(f"{name}_") for p in parameters)


def same(ones: Collection[Any], others: Collection[Any]) -> bool:
    return len(ones) == len(others) and all(map(operator.is_, ones, others))


def update(held: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Make ``held`` what is wanted, never without what stays: somebody may read it meanwhile."""
    for name in held.keys() - wanted.keys():
        del held[name]
    held.update(wanted)
