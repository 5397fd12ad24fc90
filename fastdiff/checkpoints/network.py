"""A checkpoint's network: what config.json says of it, and how it is made again.

"model" in config.json is

- of a UNet its arguments;
- of a module that its class makes again from its ``config``
  {"class": "package.module:Name", "config": {...}};
- of any other {"class": null, "type": "Name", "why": "..."}: the weights go into a network that
  ``load`` is given.
"""

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.config import check_described
from fastdiff.checkpoints.weights import (
    CONFIG_FILE,
    build,
    check_state,
    load_weights,
    no_weight,
    state_difference,
)
from fastdiff.errors import InputError, first_line
from fastdiff.models.shards import plain_class
from fastdiff.models.unet import UNet
from fastdiff.models.valueless import valueless
from fastdiff.models.wrappers import LINKS, plain_name, plain_state, unwrapped

Given = nn.Module | Callable[[], nn.Module] | None  # the network of a checkpoint, or what makes it


def described(
    network: nn.Module, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """What config.json says of ``network``, and the weights that ``load`` will look for, which may
    lack values. ``state``: its weights, by their names without wrappers.

    Raises:
        InputError: a UNet whose weights are not those of its config; or weights that no file holds.
    """
    if isinstance(network, UNet) and plain_class(network) is UNet:
        return network.config, check_described(network, network.config, state)
    if len(state) < len(network.state_dict()):
        raise InputError(
            f"cannot save this {type(network).__name__}: two of its weights have one name once the "
            f"names of wrappers ({', '.join(LINKS)}) are taken off: call its parts otherwise"
        )
    for name, tensor in state.items():
        unfit = no_weight(tensor, floats=False)
        if unfit is not None:
            raise InputError(f"cannot save this {type(network).__name__}: its {name} {unfit}")
    why = _no_class(network, state)
    if why is None:
        kind, config = _class_of(network), getattr(network, "config", None)
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "config": _plain(config)}, state
    if isinstance(network, UNet):  # of a subclass that changes nothing of the weights
        try:
            return network.config, check_described(network, network.config, state)
        except InputError:
            pass
    return {"class": None, "type": _class_of(network).__name__, "why": why}, state


def made(path: Path, described: Mapping[str, Any], given: Given) -> nn.Module:
    """The network of the checkpoint ``path`` with whatever weights: ``given``, or what it makes, or
    else what config.json describes.

    Only a subclass of ``nn.Module`` is ever called, and with ``given`` nothing is imported.

    Raises:
        InputError: none can be made; one line that says what to give.
    """
    if given is not None:
        network = given if isinstance(given, nn.Module) else given()
        if not isinstance(network, nn.Module):
            raise InputError(
                f"model makes a {type(network).__name__}; expected an nn.Module, or a function "
                "without arguments that makes one"
            )
        return network
    if "class" not in described:
        return build(path, "model", lambda: UNet(**described))
    named, remedy = described["class"], f"fastdiff.load({str(path)!r}, model=...)"
    if named is None:
        raise InputError(
            f"{path} holds the weights of a {described.get('type')} and not how it is made "
            f"({described.get('why')}): {remedy} takes the network, or a function that makes it"
        )
    try:
        kind = _found(named)
        return build(path, "model", lambda: _instance(kind, described["config"]))
    except InputError as error:
        where = "" if str(path) in str(error) else f"{path / CONFIG_FILE}: "
        raise InputError(
            f"{where}{error}; mend that, or {remedy} takes the network itself"
        ) from None


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Put the weights ``state`` of the file ``source`` into ``model``, which may be wrapped.

    Raises:
        InputError: names or shapes are not the model's.
    """
    network = unwrapped(model)
    if isinstance(network, UNet):
        return load_weights(network, state, source)
    check_state(plain_state(network), state, source, floats=False)
    network.load_state_dict({name: state[plain_name(name)] for name in network.state_dict()})
    return None


def _no_class(network: Any, state: Mapping[str, Tensor]) -> str | None:
    """Why this network's class and config do not make it again; None where they do."""
    kind = _class_of(network)
    if not isinstance(getattr(network, "config", None), Mapping):
        return "it has no config, a dict of what its class is made with"
    try:
        config = _plain(network.config)
    except (TypeError, ValueError) as error:
        return f"its config has no JSON form: {first_line(error)}"
    try:
        if _found(f"{kind.__module__}:{kind.__qualname__}") != kind:
            return "another class is imported by its name"
    except InputError as error:
        return str(error)
    try:
        difference = state_difference(_shapes_of(kind, json.dumps(config)), state)
    except Exception as error:  # whatever a constructor raises that did not expect such a config
        return f"its class cannot be called with its config: {first_line(error)}"
    return difference and f"its config describes other weights: {difference}"


def _class_of(network: nn.Module) -> Any:
    """A network's class, also where ``fastdiff.accelerate`` or FSDP2 has put one in its place."""
    return getattr(network, "fastdiff_original", plain_class(network))


def _plain(config: Any) -> dict[str, Any]:
    """A config, a mapping, as a file gives it back."""
    return json.loads(json.dumps(dict(config)))


def _found(name: Any) -> type[nn.Module]:
    """The class "package.module:Name". InputError for what is none of ``nn.Module``'s."""
    module, _, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    if module == "__main__" or not all(part.isidentifier() for part in path.split(".")):
        raise InputError(
            f"its class {name!r} cannot be imported: expected one at the top of a module"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # a module runs whatever it holds
        raise InputError(f"its class {name!r} cannot be imported: {first_line(error)}") from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f"{name!r} is no subclass of nn.Module, and was not called")
    return found


def _instance(kind: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    make: Any = getattr(kind, "from_config", None)
    network = kind(**config) if make is None else make(dict(config))
    if not isinstance(network, nn.Module):
        raise TypeError(f"its from_config makes a {type(network).__name__}, no nn.Module")
    return network


@functools.lru_cache(maxsize=8)  # a run asks at every save
def _shapes_of(kind: type[nn.Module], config: str) -> dict[str, Tensor]:
    """The weights of what ``load`` will make, without values."""
    try:
        with valueless():
            return plain_state(_instance(kind, json.loads(config)))
    except Exception:  # a constructor that looks at values; the caller's random numbers stay
        with torch.random.fork_rng(devices=[]):
            state = plain_state(_instance(kind, json.loads(config)))
        return {name: tensor.to("meta") for name, tensor in state.items()}
