"""A data set as a checkpoint's network knows images and classes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands import networks
from fastdiff.commands.class_options import class_names
from fastdiff.commands.data_options import reading_options
from fastdiff.data import ImageDataset, load_dataset, match_classes
from fastdiff.data.dataset import check_bytes
from fastdiff.data.formats.registry import Options
from fastdiff.data.paths import PathTable
from fastdiff.data.picture_set import Pictures, open_pictures
from fastdiff.errors import InputError
from fastdiff.images import MODES


def network_dataset(
    args: argparse.Namespace, checkpoint: Checkpoint, purpose: str, *, labelled: bool = True
) -> ImageDataset:
    """--data with the images in the format, and the classes in the numbers, the network was trained
    with. ``purpose``: what needs 8 bits. ``labelled``: a network with classes needs the data's.
    InputError for images of another shape, other classes."""
    size, channels = _wanted(checkpoint)
    names = class_names(checkpoint)
    classes = networks.num_classes(checkpoint) if labelled else None
    dataset = load_dataset(
        args.data,
        image_size=size,
        channels=channels,
        class_cond=classes is not None,
        known_classes=names or (),
        **reading_options(vars(args)),
    )
    print(dataset.describe(), flush=True)
    _check(dataset, checkpoint, f"--data {args.data}", purpose)
    return match_classes(dataset, names, classes, f"--data {args.data}")


def network_pictures(
    files: Sequence[Path], checkpoint: Checkpoint, option: str, purpose: str
) -> ImageDataset:
    """These picture files, without classes, as ``network_dataset`` reads those of --data."""
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(
            f"{option}: no file '{missing[0]}'; give --data too for images by their numbers"
        )
    size, channels = _wanted(checkpoint)
    options = Options(image_size=size, channels=channels)
    dataset = open_pictures(Pictures(files[0].parent, files, PathTable()), options)
    _check(dataset, checkpoint, option, purpose)
    return dataset


def _wanted(checkpoint: Checkpoint) -> tuple[int | None, int | None]:
    """The side and the channels to bring images to; None where that is not possible."""
    height, width = networks.image_size(checkpoint)
    channels = networks.channels(checkpoint)
    return height if height == width else None, channels if channels in MODES else None


def _check(dataset: ImageDataset, checkpoint: Checkpoint, name: str, purpose: str) -> None:
    """InputError for images of other than 8 bits, and of another shape than the network's."""
    check_bytes(dataset, purpose)
    expected = networks.image_shape(checkpoint)
    if dataset.shape != expected:
        raise InputError(
            f"{name} has images of (C, H, W) {dataset.shape}; the network was trained with "
            f"{expected}"
        )
