"""What commands ask of a checkpoint's network, whoever's it is: pictures, classes, arguments.

A UNet says all of it. Of other networks the data that a run was trained on are recorded (``info``),
and much stands in their ``config``, under diffusers' names or ours.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.errors import InputError
from fastdiff.models.unet import UNet
from fastdiff.process.classification import NoisyClassification
from fastdiff.process.low_res import low_res_size
from fastdiff.training.network import label_argument, label_of

IN_PYTHON = "fastdiff.Sampler and GaussianDiffusion handle every kind"


def check_network(checkpoint: Checkpoint, *, upsamplers: bool = False) -> None:
    """InputError unless the network makes pictures of noise, and labels at most; ``upsamplers``: or
    of small pictures."""
    path, model = checkpoint.path, checkpoint.model
    if isinstance(checkpoint.diffusion, NoisyClassification):
        raise InputError(
            f"{path} holds a classifier, which makes no pictures; fastdiff sample takes it as "
            "--classifier beside a --checkpoint that does"
        )
    if is_upsampler(checkpoint) and not upsamplers:
        raise InputError(
            f"{path} is a super-resolution network, which draws of small images: fastdiff sample "
            f"takes it, by --low-res or --cascade ({IN_PYTHON})"
        )
    if isinstance(model, UNet):
        if model.dims != 2:
            raise InputError(
                f"{path} is no image network; the command line handles image networks ({IN_PYTHON})"
            )
        return
    known = [label_argument(model), self_condition(checkpoint)]
    known += ["low_res", "noise_level"] if is_upsampler(checkpoint) else []
    _, _, *others = inspect.signature(model.forward).parameters.values()
    needed = [
        p.name
        for p in others
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    unknown = [name for name in needed if name not in known]
    if unknown:
        raise InputError(
            f"{path} holds a {type(model).__name__}, which needs {' and '.join(unknown)}; the "
            f"command line gives a network x, the time and a label ({IN_PYTHON})"
        )
    if known[0] in needed and num_classes(checkpoint) is None:
        raise InputError(
            f"{path} does not say how many classes its {type(model).__name__} has: give the "
            "network a num_classes, or the run info={'num_classes': ...}"
        )


def image_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """(H, W) the network was trained with."""
    size = _fact(checkpoint, "image_size", "sample_size")
    if size is None:
        raise InputError(f"{checkpoint.path} does not say its image size (info.image_size)")
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2:
        raise InputError(
            f"{checkpoint.path} was trained on x of {len(sides)} axes; the command line handles "
            f"images ({IN_PYTHON})"
        )
    return int(sides[0]), int(sides[1])


def channels(checkpoint: Checkpoint) -> int:
    """Of the network's images."""
    if isinstance(checkpoint.model, UNet):
        return checkpoint.model.in_channels
    found = _fact(checkpoint, "channels", "in_channels")
    if found is None:
        raise InputError(f"{checkpoint.path} does not say its channels (info.channels)")
    return int(found)


def image_shape(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """(C, H, W) of the network's images."""
    return channels(checkpoint), *image_size(checkpoint)


def num_classes(checkpoint: Checkpoint) -> int | None:
    """Of the network, or that a classifier tells apart; None where it takes no label."""
    if isinstance(checkpoint.model, UNet):
        return checkpoint.model.num_classes
    if label_of(checkpoint.model, checkpoint.diffusion) is None:
        return None
    own = getattr(checkpoint.model, "num_classes", None)
    return own or _fact(checkpoint, "num_classes", "num_class_embeds")


def null_label(checkpoint: Checkpoint) -> int | None:
    """The label that stands for none, for guidance."""
    return getattr(checkpoint.model, "null_label", None)


def labelled(checkpoint: Checkpoint, labels: Tensor | None) -> dict[str, Tensor]:
    """int64 labels (n,) as the network's argument, on its device; none where it takes none."""
    name = label_argument(checkpoint.model)
    if name is None or labels is None:
        return {}
    return {name: labels.to(next(checkpoint.model.parameters()).device)}


def unlabelled(kwargs: Mapping[str, Tensor], null: int) -> dict[str, Tensor]:
    """``labelled``'s answer with the label that means none in the place of every other."""
    return {name: torch.full_like(labels, null) for name, labels in kwargs.items()}


def self_condition(checkpoint: Checkpoint) -> str | None:
    """The argument by which the network is given its own estimate of x_0, None where it is not."""
    return checkpoint.info.get("self_condition") or None


def is_upsampler(checkpoint: Checkpoint) -> bool:
    """Whether the network is given small images."""
    if isinstance(checkpoint.model, UNet):
        return checkpoint.model.super_res
    return bool(checkpoint.info.get("upsample_from"))


def small_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """(h, w) of the small images that a super-resolution network is given."""
    side = checkpoint.info.get("upsample_from")
    if not isinstance(side, int):
        raise InputError(
            f"{checkpoint.path} does not say the side of the small images that it is given "
            "(info.upsample_from)"
        )
    return low_res_size(image_size(checkpoint), side)


def cond_noise(checkpoint: Checkpoint) -> float:
    """The highest level of noise in small images that the network was trained with; 0: none."""
    unsaid = 1.0 if getattr(checkpoint.model, "noise_cond", False) else 0.0
    return float(checkpoint.info.get("cond_noise", unsaid))


def _fact(checkpoint: Checkpoint, name: str, theirs: str) -> Any:
    """What the run recorded as ``name``, or the network says of itself, by that name or another."""
    config = getattr(checkpoint.model, "config", None)
    said: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
    for value in (checkpoint.info.get(name), said.get(name), said.get(theirs)):
        if value is not None:
            return value
    return None
