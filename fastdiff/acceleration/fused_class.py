"""A module's class exchanged for one that derives from it and runs on fused operations.

Names, parameters and their storage stay; ``isinstance`` holds; a pickle or ``torch.save`` of the
module is the original's, which loads without fastdiff.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError, first_line
from fastdiff.models.replica import replica_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fused:
    """Mixed into every exchanged class.

    What fastdiff itself keeps with an object is its attribute ``_fastdiff``, which pickles lack.
    """

    fastdiff_original: type
    fastdiff_bypassed: tuple[str, ...] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        original: Any = type(self)
        while issubclass(original, Fused):
            original = original.fastdiff_original
        # Of protocol 1, because later ones insist on the object's own class.
        reduced: Any = super().__reduce_ex__(1)
        make, arguments, *rest = reduced
        arguments = tuple(original if a is type(self) else a for a in arguments)
        if rest and isinstance(rest[0], dict):  # its state
            rest[0] = {name: held for name, held in rest[0].items() if name != "_fastdiff"}
        return make, arguments, *rest

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


@dataclass(frozen=True)
class Fusion:
    """How a class of modules is fused.

    how: for the report. forward: takes the place of ``method``. bypassed: the names of submodules
    that ``forward`` computes itself instead of calling them: where one of them was exchanged or has
    a hook, the original method runs. unchanged: names of attributes whose value the forward was
    made for: where one has another value, the original method runs. options: further keyword
    arguments of ``forward``.
    """

    how: str
    forward: Callable[..., Any]
    bypassed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    method: str = "forward"
    options: tuple[tuple[str, Any], ...] = ()


def exchange(module: nn.Module, fusion: Fusion) -> None:
    """Give ``module`` the fused class."""
    kinds: Any = tuple(type(module.get_submodule(path)) for path in fusion.bypassed)
    values = tuple(getattr(module, name, None) for name in fusion.unchanged)
    kind: Any = type(module)
    module.__class__ = _class_of(kind, fusion, kinds, values)


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


@functools.cache
def _class_of(
    original: Any,
    fusion: Fusion,
    kinds: tuple[Any, ...],
    values: tuple[Any, ...],
) -> type:
    own = getattr(original, fusion.method)
    paths = tuple(tuple(path.split(".")) for path in fusion.bypassed)
    options = dict(fusion.options)

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for path, kind in zip(paths, kinds, strict=True):
            child: Any = self
            for name in path:
                child = child._modules.get(name)
                if child is None or _is_watched(child):
                    return own(self, *args, **kwargs)
            if type(child) is not kind:
                return own(self, *args, **kwargs)
        for name, value in zip(fusion.unchanged, values, strict=True):
            if getattr(self, name, None) != value:
                return own(self, *args, **kwargs)
        return fusion.forward(self, *args, **kwargs, **options)

    members = {fusion.method: forward, "fastdiff_bypassed": fusion.bypassed}
    if fusion.method == "_forward":
        # The published forward wraps the method in a checkpoint, which only a gradient needs.
        def outer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return original.forward(self, *args, **kwargs)
            return forward(self, *args, **kwargs)

        members["forward"] = outer
    bases = (original,) if issubclass(original, Fused) else (Fused, original)
    return derived(original, bases, members)


def derived(original: Any, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """A class in whose place ``original`` seems to be; ``bases`` hold Fused and the original."""
    looks = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, bases, {"fastdiff_original": original} | looks | members)


def _is_watched(module: nn.Module) -> bool:
    held = module.__dict__
    return "forward" in held or any(held.get(hooks) for hooks in HOOKS)


def agrees(module: nn.Module, fusion: Fusion, inputs: tuple[Any, ...]) -> str | None:
    """Whether the fused module computes what the original does: None, or what it did instead.

    Both run in float32 with random parameters, since some layers start at zero.
    """
    generator = torch.Generator().manual_seed(0)

    def random(tensor: Tensor) -> Tensor:
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 10
        return (torch.randn(tensor.shape, generator=generator) / fan_in**0.5).to(tensor.device)

    parameters = {name: random(p) for name, p in module.named_parameters()}
    try:
        # On a replica: somebody may be running the module.
        with replica_of(module) as tried, torch.no_grad():
            expected = torch.func.functional_call(tried, parameters, inputs)
            exchange(tried, fusion)
            actual = torch.func.functional_call(tried, parameters, inputs)
        if not isinstance(expected, Tensor) or expected.shape != actual.shape:
            return "its result is of another kind"
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    except Exception as error:
        return f"it does not run as such a module does ({first_line(error)})"
    return (
        None if difference < 1e-4 else f"it computes something else (differs by {difference:.1e})"
    )
