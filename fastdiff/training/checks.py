"""Do the network, the process, the images and the settings fit each other? One line when not."""

from typing import Any

import torch

from fastdiff.data import ImageDataset
from fastdiff.errors import InputError, first_line
from fastdiff.models.unet import UNet
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.training.config import TrainConfig


def check_fit(model: UNet, diffusion: Any, dataset: ImageDataset, config: TrainConfig) -> None:
    """Raise InputError for a combination that cannot be trained."""
    if not isinstance(diffusion, GaussianDiffusion):
        raise InputError(
            f"Trainer needs a GaussianDiffusion, which its checkpoints can describe; "
            f"got a {type(diffusion).__name__}"
        )
    if not isinstance(dataset, ImageDataset):
        raise InputError(
            f"Trainer needs a fastdiff.data.ImageDataset, got a {type(dataset).__name__}: "
            "fastdiff.data.ArrayDataset(images, labels=labels) makes one of an array "
            "(N, H, W, C)"
        )
    check_images(model, dataset, "training")
    if model.dims != 2 or model.super_res:
        raise InputError("Trainer trains 2-D networks of whole images; write a loop for others")
    wanted = dataset.channels * (2 if diffusion.learns_variance else 1)
    if model.out_channels != wanted:
        raise InputError(
            f"the network has {model.out_channels} output channels; {dataset.channels}-channel "
            f"images with var_type {diffusion.var_type!r} need {wanted}"
        )
    halvings = len(model.config["channel_mult"]) - 1
    if min(dataset.image_size) < 2**halvings:
        height, width = dataset.image_size
        raise InputError(
            f"images of {height}x{width} are too small for a network that halves them {halvings} "
            f"times; use larger images (image_size) or fewer levels (channel_mult)"
        )
    if config.label_dropout and model.null_label is None:
        raise InputError(
            f"label_dropout is {config.label_dropout}, which needs a class-conditional network "
            f"with null_class=True"
        )
    if config.sample_every and dataset.channels not in (1, 3, 4):
        raise InputError(
            f"sample grids need images of 1, 3 or 4 channels, these have {dataset.channels}; "
            "set sample_every to 0"
        )


def check_images(model: UNet, dataset: ImageDataset, what: str) -> None:
    """Raise InputError when the network cannot be given these images and labels."""
    if dataset.channels != model.in_channels:
        raise InputError(
            f"the {what} images have {dataset.channels} channels, "
            f"the network takes {model.in_channels}"
        )
    if model.num_classes is not None and dataset.num_classes != model.num_classes:
        raise InputError(
            f"the network has {model.num_classes} classes, the {what} images have "
            f"{dataset.num_classes or 'no labels'}"
        )


def describe_images(dataset: ImageDataset) -> dict[str, Any]:
    """What a checkpoint records about the images."""
    return {
        "image_size": list(dataset.image_size),
        "channels": dataset.channels,
        "num_classes": dataset.num_classes,
        "class_names": dataset.class_names,
    }


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device by that name, or the best there is. InputError when it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"no device {str(device)!r} here ({first_line(error)})") from None
    return chosen
