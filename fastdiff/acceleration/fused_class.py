"""A module's class exchanged for one that derives from it and runs on fused operations.

Names, parameters and their storage stay; ``isinstance`` holds; a pickle or ``torch.save`` of the
module is the original's, which loads without fastdiff.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration.calls import (
    NOTHING,
    Arguments,
    Attributes,
    are_unchanged,
    attributes,
    kinds_of,
)
from fastdiff.errors import InputError, first_line
from fastdiff.models.fused import Fused
from fastdiff.models.replicas.replica import twin_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Refused(Exception):
    """Why a module is left as it is."""


@dataclass(frozen=True)
class Fusion:
    """How a class of modules is fused.

    how: for the report. forward: takes the place of ``method``; its parameters, in the order of the
    original's, are those it understands, whatever they are called there. bypassed: the names of
    submodules that ``forward`` computes itself instead of calling them: where one of them was
    exchanged, has another attribute or a hook, the original method runs. ignored: keyword arguments
    of the original that change nothing. options: further keyword arguments of ``forward``.
    wraps: ``forward`` calls the original itself, with whatever it is given.
    """

    how: str
    forward: Callable[..., Any]
    bypassed: tuple[str, ...] = ()
    method: str = "forward"
    options: tuple[tuple[str, Any], ...] = ()
    ignored: tuple[str, ...] = ()
    wraps: bool = False


# Positional arguments to try a module on. Several: it is fused for those on which it agrees.
Trials = Sequence[tuple[Any, ...]]
Kinds = frozenset[tuple[Any, ...]]


def exchange(module: nn.Module, fusion: Fusion, known: Kinds | None = None) -> None:
    """Give ``module`` the fused class, for arguments of the known kinds (None: of any)."""
    original: Any = type(module)
    methods = _methods(original, fusion)
    own = NOTHING if fusion.wraps else attributes(module, *methods)
    children = (module.get_submodule(path) for path in fusion.bypassed)
    parts = tuple((type(child), _unknown_attributes(child)) for child in children)
    key = (original, fusion, known, own, parts)
    kind: Any = _classes.get(key)
    if kind is None:
        kind = _classes[key] = _class_of(*key)
    module.__class__ = kind


# One class for all modules of a kind.
_classes: "weakref.WeakValueDictionary[Any, Any]" = weakref.WeakValueDictionary()


def _methods(original: Any, fusion: Fusion) -> list[Any]:
    names = dict.fromkeys(("forward", fusion.method))
    return [getattr(original, name) for name in names]


def _unknown_attributes(module: nn.Module) -> Attributes | None:
    """Of torch's own modules it is known what they compute, and that is read at every call."""
    kind: Any = type(module)
    return None if kind.__module__.startswith("torch.nn.") else attributes(module, kind.forward)


def bypassed(module: Any) -> list[nn.Module]:
    """The submodules that a fused module computes itself."""
    kinds = (kind for kind in type(module).__mro__ if issubclass(kind, Fused))
    return [module.get_submodule(path) for kind in kinds for path in kind.fastdiff_bypassed]


def check_removable(module: Any) -> None:
    """InputError where somebody derived another class from the fused one (a parametrization,
    FSDP): what that class does would be lost with it."""
    kind = type(module)
    if isinstance(module, Fused) and "fastdiff_original" not in vars(kind):
        raise InputError(
            f"a {kind.fastdiff_original.__name__} became a {kind.__name__} after it was "
            "accelerated; undo that first"
        )


def put_back(module: Any) -> None:
    check_removable(module)
    if isinstance(module, Fused):
        module.__class__ = module.fastdiff_original  # type: ignore[assignment]


def _class_of(
    original: Any,
    fusion: Fusion,
    known: Kinds | None,
    own: Attributes,
    parts: tuple[tuple[Any, Any], ...],
) -> type:
    paths = [tuple(path.split(".")) for path in fusion.bypassed]
    bypassed = [(path, *part) for path, part in zip(paths, parts, strict=True)]
    options = dict(fusion.options)
    method: Any = getattr(original, fusion.method)
    members: dict[str, Any] = {"fastdiff_bypassed": fusion.bypassed}

    if fusion.wraps:

        @functools.wraps(method)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return fusion.forward(self, *args, **kwargs, **options)

        return _derived(original, members | {fusion.method: wrapper})

    def values_of(self: nn.Module, arguments: Arguments, args: Any, kwargs: Any) -> Any:
        """The arguments of the fused forward, if it serves this call."""
        values = arguments.understood(args, kwargs)
        if values is None or (known is not None and kinds_of(values) not in known):
            return None
        for path, kind, theirs in bypassed:
            child: Any = self
            for name in path:
                child = child._modules.get(name)
                if child is None or _is_watched(child):
                    return None
            if type(child) is not kind or not (theirs is None or are_unchanged(child, theirs)):
                return None
        return values if are_unchanged(self, own) else None

    count = len(inspect.signature(fusion.forward).parameters) - 1 - len(options)

    def exchanged(method: Any) -> Any:
        arguments = Arguments(method, count, fusion.ignored)

        @functools.wraps(method)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            values = values_of(self, arguments, args, kwargs)
            if values is None:
                return method(self, *args, **kwargs)
            return fusion.forward(self, *values, **options)

        return forward

    members[fusion.method] = exchanged(method)
    outer = original.forward
    if fusion.method != "forward":
        # The published forward wraps the method in a checkpoint, which only a gradient needs.
        direct = exchanged(outer)

        @functools.wraps(outer)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (outer if torch.is_grad_enabled() else direct)(self, *args, **kwargs)

        members["forward"] = forward
    arguments = Arguments(outer, count, fusion.ignored)

    def served(self: nn.Module, *args: Any) -> Any:
        return values_of(self, arguments, args, {})

    members["fastdiff_served"] = served
    return _derived(original, members)


def _derived(original: Any, members: dict[str, Any]) -> type:
    bases = (original,) if issubclass(original, Fused) else (Fused, original)
    return derived(original, bases, members)


def derived(original: Any, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """A class in whose place ``original`` seems to be; ``bases`` hold Fused and the original."""
    looks = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, bases, {"fastdiff_original": original} | looks | members)


def _is_watched(module: nn.Module) -> bool:
    held = module.__dict__
    return "forward" in held or any(held.get(hooks) for hooks in HOOKS)


def agreement(module: nn.Module, fusion: Fusion, trials: Trials) -> Kinds:
    """The kinds of arguments for which the fused module computes what the original does. Refused
    where there are none, with what it did instead.

    Both run in float32 with random parameters, since some layers start at zero.
    """
    generator = torch.Generator().manual_seed(0)

    def random(tensor: Tensor) -> Tensor:
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 10
        return (torch.randn(tensor.shape, generator=generator) / fan_in**0.5).to(tensor.device)

    parameters = {name: random(p) for name, p in module.named_parameters()}
    known: set[tuple[Any, ...]] = set()
    reasons: list[str] = []
    for inputs in trials:
        reason, kinds = _disagreement(module, fusion, parameters, inputs)
        if reason is None:
            known.add(kinds)
        else:
            reasons.append(reason)
    if not known:
        raise Refused(next((r for r in reasons if "something else" in r), reasons[0]))
    return frozenset(known)


def _disagreement(
    module: Any, fusion: Fusion, parameters: dict[str, Tensor], inputs: tuple[Any, ...]
) -> tuple[str | None, tuple[Any, ...]]:
    """(None or what the fused module does else, the kinds of the arguments)."""
    original: type = type(module)
    kinds: tuple[Any, ...] = ()
    try:
        # On a replica: somebody may be running the module.
        with twin_of(module) as twin, torch.no_grad():
            tried: Any = twin
            expected = torch.func.functional_call(tried, parameters, inputs)
            exchange(tried, fusion)
            served = tried.fastdiff_served(*inputs)
            if served is None:
                return "its forward takes other arguments", ()
            kinds = kinds_of(served)
            actual = torch.func.functional_call(tried, parameters, inputs)
        if not isinstance(expected, Tensor) or expected.shape != actual.shape:
            return "its result is of another kind", ()
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    except Exception as error:
        return f"it does not run as such a module does ({first_line(error)})", ()
    finally:
        if type(module) is not original:  # it can have no replica
            put_back(module)
    if difference < 1e-4:
        return None, kinds
    return f"it computes something else (differs by {difference:.1e})", ()
