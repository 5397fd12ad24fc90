"""Modules that hold one network and run it: torch.compile's, DataParallel's, AveragedModel, ..."""

import functools
import inspect
from typing import Any

from torch import Tensor, nn

# What such a module calls the network inside: torch.compile; DataParallel, DistributedDataParallel,
# AveragedModel and DeepSpeed; FSDP; activation checkpointing. Parameters have it in their names.
LINKS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(model: Any) -> Any:
    """The network that ``model`` holds, through any number of wrappers; else ``model`` itself."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def plain_name(name: str) -> str:
    """A parameter's name as it is without wrappers: module._orig_mod.out.2.bias -> out.2.bias."""
    return ".".join(part for part in name.split(".") if part not in LINKS)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the network inside, also where single layers of it are wrapped."""
    return {plain_name(name): tensor for name, tensor in unwrapped(model).state_dict().items()}


def tensor_of(output: Any) -> Tensor:
    """What a network answers: a tensor, a tuple that begins with it, or diffusers' object."""
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)


def attribute_of(model: Any, name: str) -> Any:
    """An attribute of the network that a callable ends in, None where there is none.

    Looked through are wrappers, modules that hold nothing but another one, ``functools.partial``,
    decorators, and bound methods such as ``network.forward``. A function may do anything to its
    arguments; it is not.
    """
    seen: set[int] = set()
    while model is not None and id(model) not in seen:
        seen.add(id(model))
        value = getattr(model, name, None)
        if value is not None:
            return value
        model = _called(model)
    return None


def arguments_of_forward(model: nn.Module) -> tuple[list[str], bool]:
    """The names that the network inside is called with, and whether it takes any name beside."""
    parameters = inspect.signature(unwrapped(model).forward).parameters
    return list(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _inside(model: Any) -> nn.Module | None:
    children = dict(model.named_children()) if isinstance(model, nn.Module) else {}
    if len(children) != 1 or next(iter(children)) not in LINKS:
        return None
    return next(iter(children.values()))


def _called(model: Any) -> Any:
    if isinstance(model, nn.Module):
        children = list(model.children())
        holds_more = next(model.parameters(recurse=False), None) is not None
        return children[0] if len(children) == 1 and not holds_more else None
    if isinstance(model, functools.partial):
        return model.func
    # A bound method has its object; a decorated function keeps the original.
    return getattr(model, "__self__", getattr(model, "__wrapped__", None))
