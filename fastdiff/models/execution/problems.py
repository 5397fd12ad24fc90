"""Whether a network is what its class makes, so that its program computes what it would."""

import functools
import json
from collections.abc import Collection, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdiff.errors import InputError
from fastdiff.models.code import names_in_forward
from fastdiff.models.fused import unfused
from fastdiff.models.replicas.replica import others_watch
from fastdiff.models.unet import UNet
from fastdiff.models.valueless import valueless

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DEVICES = ("cpu", "cuda")
_EVERYWHERE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# What changes nothing of what is computed in eval mode, or is the user's to write.
FREE = frozenset({"use_checkpoint", "p", "inplace", "image_size", "null_label"})
_COMPARED = (type, FunctionType, BuiltinFunctionType, MethodType, functools.partial)


class Form(NamedTuple):
    """A module: its class, its own attributes, what others its class would know, and its
    parameters' shapes."""

    kind: type
    attributes: dict[str, Any]
    known: Collection[str]
    parameters: dict[str, tuple[int, ...] | None]


def difference(unet: Any) -> str:
    """What of a network is not as ``UNet(**unet.config)`` makes it, or not on one of ``DEVICES``;
    "" for nothing. Eval mode or not."""
    if type(unet) is not UNet:
        return f"it is a {class_name(type(unet))}, not a UNet of fastdiff"
    try:
        expected = _expected(json.dumps(unet.config))
    except (TypeError, InputError):  # somebody has written to it
        return "its config makes no UNet"
    return changed(unet, expected)


def changed(network: nn.Module, expected: Mapping[str, Form]) -> str:
    """What of a network has not the form that is expected of it, or is on none of ``DEVICES``; ""
    for nothing."""
    if others_watch():
        return "there is a hook on all modules"
    found = dict(network.named_modules(remove_duplicate=False))
    if found.keys() != expected.keys():
        name = min(found.keys() ^ expected.keys())
        return f"{name} was {'added' if name in found else 'removed'}"
    dtype = dtype_of(network)
    if dtype not in DTYPES:
        return f"its weights are {name_of(dtype)}"
    device = device_of(network)
    for name, module in found.items():
        said = _of_module(module, expected[name]) or _of_parameters(module, dtype, device)
        if said:
            return f"{name or 'the network'} {said}"
    return ""


def dtype_of(network: nn.Module) -> torch.dtype:
    """That of its weights."""
    return next(network.parameters()).dtype


def device_of(network: nn.Module) -> torch.device:
    """That of its weights."""
    return next(network.parameters()).device


def _of_module(module: nn.Module, expected: Form) -> str:
    held = vars(module)
    if unfused(type(module)) is not expected.kind:
        return f"is a {class_name(type(module))}, not a {expected.kind.__name__}"
    if any(held.get(hooks) for hooks in _HOOKS):
        return "has a hook"
    if held.get("_compiled_call_impl") is not None:
        return "is compiled"
    for name in held.keys() - _EVERYWHERE - expected.attributes.keys():
        if name in expected.known:
            return f"has another {name}"
    for name, value in expected.attributes.items():
        if name not in held or not _same(held[name], value):
            return f"has {name} {_shown(held.get(name))}, not {_shown(value)}"
    shapes = {n: None if p is None else tuple(p.shape) for n, p in held["_parameters"].items()}
    if shapes != expected.parameters:
        return f"has parameters of shapes {shapes}, not {expected.parameters}"
    return ""


def _of_parameters(module: nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return f"has {name} as a {class_name(type(parameter))}"
        if parameter.device.type not in DEVICES:
            return f"is on {parameter.device}"
        if parameter.device != device:
            return f"has {name} on {parameter.device}, others on {device}"
        if parameter.dtype != dtype:
            return f"has {name} in {parameter.dtype}, others in {dtype}"
    return ""


@functools.lru_cache(maxsize=8)
def _expected(config: str) -> dict[str, Form]:
    """What a network of these arguments is made of."""
    with valueless():
        unet = UNet(**json.loads(config))
    return forms(unet, FREE)


def forms(network: nn.Module, free: Collection[str]) -> dict[str, Form]:
    """Of each module; ``free``: attributes that change nothing of what is computed in eval mode, or
    are the user's to write."""
    known: dict[type, frozenset[str]] = {}
    found: dict[str, Form] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        kind = type(module)
        if kind not in known:
            known[kind] = frozenset({*dir(kind), *names_in_forward(kind)} - set(free))
        held = vars(module)
        attributes = {k: held[k] for k in held if k not in _EVERYWHERE and k not in free}
        parameters = module._parameters.items()
        shapes = {k: None if p is None else tuple(p.shape) for k, p in parameters}
        found[name] = Form(kind, attributes, known[kind], shapes)
    return found


def _same(value: Any, expected: Any) -> bool:
    """Objects that do not say what they equal, such as an attention processor, by their class and
    attributes."""
    kind = type(expected)
    if value is expected:
        return True
    if kind.__eq__ is not object.__eq__ or isinstance(expected, _COMPARED):
        equal = value == expected
        return equal is True  # arrays answer other things
    if type(value) is not kind or not hasattr(expected, "__dict__"):
        return False
    held, wanted = vars(value), vars(expected)
    return held.keys() == wanted.keys() and all(_same(held[k], wanted[k]) for k in wanted)


def _shown(value: Any) -> str:
    kind = type(value)
    return class_name(kind) if kind.__repr__ is object.__repr__ else f"{value!r:.80}"


def class_name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
