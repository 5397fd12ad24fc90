"""Beginning a run with the weights of a checkpoint: what is carried over, what starts anew."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdiff.checkpoints.averages import young_average
from fastdiff.checkpoints.checkpoint import load
from fastdiff.checkpoints.network import Given
from fastdiff.data import ImageDataset, match_classes
from fastdiff.errors import InputError
from fastdiff.models.encoder import Encoder


@dataclass(frozen=True)
class Init:
    """What a run takes over from a checkpoint.

    Attributes:
        model: the network with the weights asked for.
        diffusion: the process saved with it, or None.
        info: the checkpoint's facts about its data.
        record: what the run's own record says of all this: {"checkpoint", "path", "weights",
            "step"}; "checkpoint" is what the user named, "path" the directory that was read.
        warning: what is to be said of these weights, or None.
    """

    model: Any
    diffusion: Any
    info: Mapping[str, Any]
    record: Mapping[str, Any]
    warning: str | None

    @property
    def path(self) -> str:
        return str(self.record["path"])

    def process(self, given: Any) -> Any:
        """``given``, else the checkpoint's. InputError where there is neither."""
        found = given or self.diffusion
        if found is None:
            raise InputError(f"{self.path} holds a network without its process: give diffusion=")
        return found


def read_init(
    source: str | os.PathLike[str], weights: str | float = "ema", model: Given = None
) -> Init:
    """Read any checkpoint that ``fastdiff.load`` does, or the newest one of a run's folder.

    InputError when it cannot be read or has no such weights.
    """
    loaded = load(source, weights=weights, model=model)
    record = {
        "checkpoint": os.path.abspath(source),
        "path": str(loaded.path),
        "weights": loaded.weights,
        "step": loaded.step,
    }
    warning = young_average(loaded, "--init-weights model")
    return Init(loaded.model, loaded.diffusion, loaded.info, record, warning)


def fit_to_init(init: Init, dataset: Any) -> Any:
    """The data set with its classes numbered as the weights know them.

    InputError when the images or their classes are not those the weights know.
    """
    model: Any = init.model
    if not isinstance(dataset, ImageDataset) or not isinstance(model, Encoder):
        return dataset
    if dataset.channels != model.in_channels:
        raise InputError(
            f"the training images have {dataset.channels} channels, the network of {init.path} "
            f"takes {model.in_channels}: load them with --channels {model.in_channels}"
        )
    size = init.info.get("image_size") or model.image_size
    sides = [size, size] if isinstance(size, int) else list(size or dataset.image_size)
    if sides != list(dataset.image_size):
        height, width = dataset.image_size
        raise InputError(
            f"the training images are {height}x{width}, {init.path} was trained on "
            f"{sides[0]}x{sides[1]}: load them with --image-size {sides[0]}"
        )
    if (dataset.num_classes is None) != (model.num_classes is None):
        remedy = "leave --class-cond out" if model.num_classes is None else "give --class-cond"
        raise InputError(
            f"the training images have {dataset.num_classes or 'no'} classes, the network of "
            f"{init.path} has {model.num_classes or 'none'}: {remedy}, or start without --init"
        )
    return match_classes(
        dataset, init.info.get("class_names"), model.num_classes, "the training data"
    )


def describe_init(init: Init, diffusion: Any) -> str:
    """Lines for the terminal: where the run begins."""
    count = sum(parameter.numel() for parameter in init.model.parameters())
    weights = init.record["weights"]
    which = "its weights" if weights == "model" else f"its average EMA {weights}"
    step = "" if init.record["step"] is None else f" of step {init.record['step']}"
    same = init.diffusion is not None and init.diffusion.to_config() == diffusion.to_config()
    process = f"the diffusion process ({diffusion.num_timesteps} steps)"
    carried = [f"the network ({count / 1e6:.1f}M parameters)", which + step]
    anew = ["step 0", "the optimizer", "averages (from these weights)", "the order of the images"]
    (carried if same else anew).append(process)
    lines = [
        f"init from {init.path}",
        f"  carried over  {', '.join(carried)}",
        f"  starts anew   {', '.join(anew)}",
    ]
    return "\n".join(lines if init.warning is None else [*lines, f"warning: {init.warning}"])
