"""What ``fastdiff train`` makes of a preset, flags and images: the network and what trains it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.commands.train_options import part_of
from fastdiff.commands.train_process import build_process
from fastdiff.data import ImageDataset
from fastdiff.errors import InputError
from fastdiff.models import presets
from fastdiff.models.encoder_unet import EncoderUNet
from fastdiff.models.unet import UNet
from fastdiff.process.classification import NoisyClassification
from fastdiff.training import TrainConfig


def built(
    preset: presets.Preset, given: Mapping[str, Any], dataset: ImageDataset, config: TrainConfig
) -> tuple[Any, Any]:
    """A new network and what it is trained by: a process, or a classifier's training."""
    flags = part_of(given, "diffusion")
    diffusion = build_process(preset.diffusion, flags, f"the preset {preset.name}")
    arguments = {**preset.model, **part_of(given, "model")}
    if preset.network == "EncoderUNet":
        return build_classifier(arguments, dataset), NoisyClassification(diffusion)
    check_pool(f"the preset {preset.name}", UNet, arguments)
    return build_model(arguments, diffusion, dataset, config), diffusion


def build_model(
    arguments: Mapping[str, Any],
    diffusion: Any,
    dataset: ImageDataset,
    config: TrainConfig,
) -> UNet:
    """The network for these images: their channels, classes and size replace a preset's."""
    height, width = dataset.image_size
    return UNet(
        **{
            **arguments,
            "in_channels": dataset.channels,
            "out_channels": dataset.channels * (1 + getattr(diffusion, "learns_variance", False)),
            "num_classes": dataset.num_classes,
            "super_res": config.upsample_from > 0,
            "noise_cond": config.cond_noise > 0,
            "null_class": config.label_dropout > 0 and dataset.num_classes is not None,
            "image_size": height if height == width else [height, width],
        }
    )


def build_classifier(arguments: Mapping[str, Any], dataset: ImageDataset) -> EncoderUNet:
    """The classifier of these images, as :func:`build_model`. InputError where they have no
    classes."""
    if dataset.num_classes is None:
        raise InputError("a classifier needs images with classes: leave --no-class-cond out")
    height, width = dataset.image_size
    return EncoderUNet(
        **{
            **arguments,
            "in_channels": dataset.channels,
            "out_channels": dataset.num_classes,
            "image_size": height if height == width else [height, width],
        }
    )


def check_pool(what: str | Path, kind: type, arguments: Mapping[str, Any]) -> None:
    """InputError for a classifier's argument that another network has not got."""
    if "pool" in arguments and kind is not EncoderUNet:
        raise InputError(
            f"--pool is of a classifier, and {what} is of a {kind.__name__}: leave the flag out, "
            f"or give --preset {', '.join(presets.names('EncoderUNet'))}"
        )
