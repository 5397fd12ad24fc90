"""A data set as a checkpoint's network knows images and classes."""

import argparse

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands import networks
from fastdiff.commands.class_options import class_names
from fastdiff.commands.data_options import reading_options
from fastdiff.data import ImageDataset, load_dataset, match_classes
from fastdiff.data.dataset import check_bytes
from fastdiff.errors import InputError


def network_dataset(args: argparse.Namespace, checkpoint: Checkpoint, purpose: str) -> ImageDataset:
    """--data with the images in the format, and the classes in the numbers, the network was trained
    with. ``purpose``: what needs 8 bits. InputError for images of another shape, other classes."""
    height, width = networks.image_size(checkpoint)
    channels, classes = networks.channels(checkpoint), networks.num_classes(checkpoint)
    names = class_names(checkpoint)
    dataset = load_dataset(
        args.data,
        image_size=height if height == width else None,
        channels=channels if channels in (1, 3, 4) else None,
        class_cond=classes is not None,
        known_classes=names or (),
        **reading_options(vars(args)),
    )
    print(dataset.describe(), flush=True)
    check_bytes(dataset, purpose)
    found = (dataset.channels, *dataset.image_size)
    if found != (channels, height, width):
        raise InputError(
            f"--data {args.data} has images of (C, H, W) {found}; the network was trained with "
            f"{(channels, height, width)}"
        )
    return match_classes(dataset, names, classes, f"--data {args.data}")
