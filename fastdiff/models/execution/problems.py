"""Whether a network is what fastdiff's class makes, so that its program computes what it would."""

import functools
import json
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdiff.errors import InputError
from fastdiff.models.replicas.replica import others_watch
from fastdiff.models.unet import UNet
from fastdiff.models.valueless import valueless

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DEVICES = ("cpu", "cuda")
_EVERYWHERE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# What changes nothing of what is computed in eval mode, or is the user's to write.
_FREE = frozenset({"use_checkpoint", "p", "inplace", "image_size", "null_label"})


class Form(NamedTuple):
    """A module: its class, its own attributes, and its parameters' shapes."""

    kind: type
    attributes: dict[str, Any]
    parameters: dict[str, tuple[int, ...] | None]


def problem(unet: Any) -> str:
    """Why a network as it stands is not executed, in a few words; "" where it is."""
    found = difference(unet)
    if found:
        return found
    for name, module in unet.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p:
            return f"{name} is in training mode and drops"
    return ""


def difference(unet: Any) -> str:
    """What of a network is not as ``UNet(**unet.config)`` makes it, or not on one of ``DEVICES``;
    "" for nothing. Eval mode or not."""
    if type(unet) is not UNet:
        return f"it is a {_name(type(unet))}, not a UNet of fastdiff"
    if others_watch():
        return "there is a hook on all modules"
    try:
        expected = _expected(json.dumps(unet.config))
    except (TypeError, InputError):  # somebody has written to it
        return "its config makes no UNet"
    found = dict(unet.named_modules(remove_duplicate=False))
    if found.keys() != expected.keys():
        name = min(found.keys() ^ expected.keys())
        return f"{name} was {'added' if name in found else 'removed'}"
    dtype = dtype_of(unet)
    if dtype not in DTYPES:
        return f"its weights are {str(dtype).removeprefix('torch.')}"
    device = device_of(unet)
    for name, module in found.items():
        said = _of_module(module, expected[name]) or _of_parameters(module, dtype, device)
        if said:
            return f"{name or 'the network'} {said}"
    return ""


def dtype_of(unet: UNet) -> torch.dtype:
    """That of its weights."""
    return next(unet.parameters()).dtype


def device_of(unet: UNet) -> torch.device:
    """That of its weights."""
    return next(unet.parameters()).device


def _of_module(module: nn.Module, expected: Form) -> str:
    held = vars(module)
    if type(module) is not expected.kind:
        return f"is a {_name(type(module))}, not a {expected.kind.__name__}"
    if any(held.get(hooks) for hooks in _HOOKS):
        return "has a hook"
    if held.get("_compiled_call_impl") is not None:
        return "is compiled"
    for name in held.keys() - _EVERYWHERE - expected.attributes.keys():
        if hasattr(type(module), name) and name not in _FREE:
            return f"has another {name}"
    for name, value in expected.attributes.items():
        if name not in held or held[name] != value:
            return f"has {name} {held.get(name)!r}, not {value!r}"
    shapes = {n: None if p is None else tuple(p.shape) for n, p in held["_parameters"].items()}
    if shapes != expected.parameters:
        return f"has parameters of shapes {shapes}, not {expected.parameters}"
    return ""


def _of_parameters(module: nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return f"has {name} as a {_name(type(parameter))}"
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
    return {name: _form(module) for name, module in unet.named_modules()}


def _form(module: nn.Module) -> Form:
    attributes = {
        name: value
        for name, value in vars(module).items()
        if name not in _EVERYWHERE and name not in _FREE
    }
    parameters = module._parameters.items()
    shapes = {name: None if p is None else tuple(p.shape) for name, p in parameters}
    return Form(type(module), attributes, shapes)


def _name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"
