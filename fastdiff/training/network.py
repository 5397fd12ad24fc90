"""How training runs a network, whoever's it is: ``model(x, t, **arguments)``."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.images import HALF_RANGES, to_float
from fastdiff.models import shards
from fastdiff.models.unet import UNet
from fastdiff.models.wrappers import arguments_of_forward, tensor_of, unwrapped
from fastdiff.ranks import Ranks
from fastdiff.training.config import TrainConfig

LABELS = ("y", "class_labels", "labels", "classes", "label")  # what a label is called
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def label_argument(model: nn.Module) -> str | None:
    """The name by which the network takes a label, None where it takes none."""
    network: Any = unwrapped(model)
    if isinstance(network, UNet):
        return "y" if network.num_classes is not None else None
    names, takes_any = arguments_of_forward(network)
    for name in LABELS:
        if name in names:
            # diffusers' networks have the argument and refuse it, where no classes were asked for.
            none = name == "class_labels" and getattr(network, "class_embedding", name) is None
            return None if none else name
    return "y" if takes_any else None


def label_of(model: nn.Module, diffusion: Any) -> str | None:
    """The name by which a training step is given labels: that of ``diffusion``, where it wants them
    itself (a classifier's), else the network's."""
    return getattr(diffusion, "label", None) or label_argument(model)


def check_argument(model: nn.Module, name: str, setting: str) -> None:
    """InputError where the network has no argument of that name, which ``setting`` asks for."""
    names, takes_any = arguments_of_forward(model)
    if name not in names and not takes_any:
        raise InputError(
            f"{setting} asks for {name!r}, and a {type(unwrapped(model)).__name__} has no such "
            f"argument: it takes {', '.join(names)}"
        )


def arguments_of(given: Any, label: str | None) -> dict[str, Tensor]:
    """The second half of a batch, labels or a dict, as the network's arguments."""
    kwargs = {"y": given} if isinstance(given, Tensor) else dict(given)
    if "y" in kwargs and label != "y":
        y = kwargs.pop("y")
        return kwargs if label is None else {**kwargs, label: y}
    return kwargs


def on(device: torch.device, kwargs: dict[str, Tensor], axes: int) -> dict[str, Tensor]:
    """The network's arguments on its device; of those that have as many ``axes`` as x, which are
    pictures such as a ``low_res``, integers are scaled to [-1, 1]."""
    found = {name: value.to(device, non_blocking=True) for name, value in kwargs.items()}
    return {name: _as_argument(value, axes) for name, value in found.items()}


def _as_argument(value: Tensor, axes: int) -> Tensor:
    picture = value.dtype in HALF_RANGES and value.dim() == axes
    return to_float(value) if picture or value.dtype == torch.float64 else value


def over_ranks(
    model: nn.Module, config: TrainConfig, ranks: Ranks, device: torch.device
) -> nn.Module:
    """The network on its device, whose backward averages gradients over the ranks: spread over
    them where the settings say so, else a copy on each with rank 0's weights."""
    if config.shard and ranks.group is not None:
        return shards.spread(model, device, PRECISIONS.get(config.dtype))
    model.to(device)
    if ranks.group is None:
        return model
    try:
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    except RuntimeError as error:
        if "gradient" not in str(error):
            raise
        raise InputError(f"a {type(model).__name__} cannot be trained: {error}") from None


def unsynchronised(network: nn.Module) -> Callable[[], AbstractContextManager]:
    """A block whose backward passes leave the gradients of other ranks for a later one."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return network.no_sync
    tell = getattr(network, "set_requires_gradient_sync", None)  # FSDP2's
    return nullcontext if tell is None else functools.partial(_without_sync, tell)


@contextmanager
def _without_sync(tell: Callable[[bool], None]) -> Iterator[None]:
    tell(False)
    try:
        yield
    finally:
        tell(True)


def asked_by_bound(model: Callable, self_condition: str | None) -> Callable[..., Tensor]:
    """The network as a bound on the likelihood asks it: its answer a tensor, its own estimate of
    x_0, where it is given one by that name, zeros, as in half of the training steps."""

    def ask(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        if self_condition is not None:
            kwargs[self_condition] = torch.zeros_like(x)
        return tensor_of(model(x, t, **kwargs))

    return ask


def predictor(network: nn.Module, config: TrainConfig, device: torch.device) -> Callable:
    """What losses call: ``network``, compiled and under autocast where the settings say so, its
    answer a tensor. The losses around it stay in float32."""
    run = torch.compile(network) if config.compile else network
    dtype = PRECISIONS.get(config.dtype)
    precision: Any = torch.autocast(device.type, dtype) if dtype else nullcontext()

    def predict(x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        with precision:
            return tensor_of(run(x, t, **kwargs))

    return predict
