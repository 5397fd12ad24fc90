"""The file of a published network: a state dict, or one under a key or behind a prefix."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastdiff.errors import InputError

FIRST_WEIGHT = "time_embed.0.weight"  # of every such network
OF_DIFFUSERS = "time_embedding.linear_1.weight"
DEPTH = 4  # of dictionaries in dictionaries that are looked through


def read_published(
    path: str | os.PathLike[str],
    *,
    key: str = "",
    strip: str = "",
    flags: tuple[str, str] = ("key=", "strip="),
) -> dict[str, Tensor]:
    """The state dict in a published ``.pt`` or ``.safetensors`` file, on the CPU.

    Args:
        key: where it lies in the file's dictionaries: "state_dict", "ema.model".
        strip: take the names that begin with this, without it: "module.".
        flags: what the caller calls these two, for messages.

    Raises:
        InputError: the file is missing, damaged, or something else; or the network lies under
            another key or prefix, which the message names.
    """
    name = os.fspath(path)
    if os.path.isdir(path):
        raise InputError(
            f"{name} is a directory; give a file of weights (what fastdiff.load reads, checkpoints "
            "and diffusers' networks, needs no conversion)"
        )
    try:
        content: Any
        if name.endswith(".safetensors"):
            content = safetensors.torch.load_file(path)
        else:
            with open(path, "rb") as file:
                content = _unpickled(file, name)
    except FileNotFoundError:
        raise InputError(f"{name}: there is no such file") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{name} is not a safetensors file ({error})") from error
    return state_in(content, name, key=key, strip=strip, flags=flags)


def state_in(
    content: Any,
    name: str,
    *,
    key: str = "",
    strip: str = "",
    flags: tuple[str, str] = ("key=", "strip="),
) -> dict[str, Tensor]:
    """The state dict at ``key`` of what a file called ``name`` holds; see ``read_published``."""
    found = list(_values_at(content, key)) if key else [content]
    places = list(_networks(content))
    if not found:
        raise InputError(f"{name} has no key {key!r}; {_whereabouts(places, content, flags)}")
    state = found[0]
    if strip and isinstance(state, Mapping):
        prefix = strip.rstrip(".") + "."
        state = {n.removeprefix(prefix): v for n, v in state.items() if str(n).startswith(prefix)}
        if not state:
            where = _whereabouts(places, content, flags)
            raise InputError(f"{name}: no name begins with {prefix!r}; {where}")
    here = isinstance(state, Mapping) and FIRST_WEIGHT in state
    if places and not here:
        raise InputError(
            f"{name} is not the state dict itself; {_whereabouts(places, content, flags)}"
        )
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{name} is not a state dict of tensors: {_summary(state)}")
    if not state or not all(isinstance(n, str) for n in state):
        raise InputError(f"{name} is not a state dict of named tensors")
    if OF_DIFFUSERS in state:
        raise InputError(
            f"{name} holds a network under diffusers' names; fastdiff.load reads the directory of "
            "such a file and its config.json"
        )
    return dict(state)


def _networks(content: Any, depth: int = DEPTH) -> Iterator[tuple[str, str]]:
    """(key, prefix) of each network in nested dictionaries."""
    if not isinstance(content, Mapping):
        return
    for name, value in content.items():
        if isinstance(value, Tensor):
            prefix = str(name).removesuffix(FIRST_WEIGHT)
            if prefix != str(name) and (not prefix or prefix.endswith(".")):
                yield "", prefix
        elif depth:
            for key, prefix in _networks(value, depth - 1):
                yield (f"{name}.{key}" if key else str(name)), prefix


def _values_at(content: Any, key: str) -> Iterator[Any]:
    """What lies under a dotted key; the keys themselves may have dots ("0.9999")."""
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if str(name) == key:
            yield value
        elif key.startswith(f"{name}."):
            yield from _values_at(value, key.removeprefix(f"{name}."))


def _whereabouts(places: list[tuple[str, str]], content: Any, flags: tuple[str, str]) -> str:
    """What to give for the networks that a file holds; what it holds if there are none."""
    if not places:
        return _summary(content)
    choices = []
    for place in places[:6]:
        # Of an average an empty value is said, too: without one the network's own is taken.
        values = zip(flags, place, strict=True)
        given = [_given(flag, v) for flag, v in values if v or flag.startswith("--ema")]
        choices.append(
            " ".join(given) or f"no {flags[0].strip('= ')} and no {flags[1].strip('= ')}"
        )
    return f"the network is inside: give {', or '.join(choices)}"


def _given(flag: str, value: str) -> str:
    """A flag of the command line, or an argument in Python (key=)."""
    return f"{flag}{value!r}" if flag.endswith("=") else f"{flag}{shlex.quote(value)}"


def _summary(content: Any) -> str:
    parts = list(_listed(content))
    return f"it holds {', '.join(parts[:6])}{', ...' if len(parts) > 6 else ''}"


def _listed(value: Any, key: str = "") -> Iterator[str]:
    """What a file holds, as deep as there are dictionaries of other things than tensors."""
    under = f" under {key}" if key else ""
    if isinstance(value, Mapping) and not all(isinstance(v, Tensor) for v in value.values()):
        for name, part in value.items():
            yield from _listed(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Mapping):
        yield f"{len(value)} named tensors{under}"
    elif isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
        yield f"{len(value)} tensors without names{under}"
    else:
        yield f"a {type(value).__name__}{under}"


def _unpickled(file: BinaryIO, name: str) -> Any:
    try:
        # weights_only: a pickle from the network must not run code.
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        pickled = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if pickled:
            raise InputError(
                f"{name} is not a state dict of tensors: it holds a pickled {pickled.group(1)}, "
                "which could only be read by running its code; where it was written, save the "
                "state_dict() alone"
            ) from error
        raise InputError(
            f"{name} is not a PyTorch state dict: it is damaged, or another kind of file"
        ) from error
