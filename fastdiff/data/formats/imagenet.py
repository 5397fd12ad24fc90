"""ImageNet at 8x8, 16x16, 32x32 or 64x64 as it is distributed (Chrabaszcz, Loshchilov, Hutter 2017,
arXiv:1707.08819): batches of pickles or of .npz files."""

import math
import re
import zipfile
from pathlib import Path

import numpy as np

from fastdiff.data.batches import (
    Batch,
    checked_batch,
    numbered_files,
    read_batches,
    read_pickle,
)
from fastdiff.data.dataset import ArrayDataset, numbers
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.in_memory import in_memory
from fastdiff.data.text import plain
from fastdiff.errors import InputError, first_line

TRAINING_BATCH = re.compile(r"train_data_batch_(\d+)(\.npz)?")
BATCH = re.compile(r"(?:train_data_batch_(\d+)|val_data)(\.npz)?")
WIDTHS = [3 * side**2 for side in (8, 16, 32, 64)]
CLASSES = 1000


def imagenet_files(path: Path) -> list[Path]:
    """The training batches in a folder, or the one batch that ``path`` is; else nothing."""
    if path.is_dir():
        return numbered_files(path, TRAINING_BATCH)
    return [path] if BATCH.fullmatch(path.name) else []


@image_format("a downsampled-ImageNet folder or batch", lambda path: bool(imagenet_files(path)))
def load_imagenet(path: Path, options: Options) -> ArrayDataset:
    """The training batches of a folder, or one batch: square RGB, 1000 classes.

    All images lie in memory: 1,281,167 of 64x64 take 15.7 GB. Classes are numbers, from 0, in the
    order of the batches' own map_clsloc.txt, which is not that of the folders' names.
    """
    files = imagenet_files(path)
    room = sum(map(_room, files))
    pixels, labels, broken = read_batches(files, _read, room, options.skip_broken)
    if len(labels) and not 1 <= labels.min() <= labels.max() <= CLASSES:
        raise InputError(
            f"'{plain(path)}': labels run from {labels.min()} to {labels.max()}, expected 1 to "
            f"{CLASSES}"
        )
    side = math.isqrt(pixels.shape[1] // 3)
    images = pixels.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    name = f"'{plain(path)}'"
    return in_memory(
        images, labels - 1, numbers(CLASSES), name, options, numbered=True, broken=broken
    )


def _read(file: Path) -> Batch:
    kind = "batch of ImageNet"
    if file.suffix != ".npz":
        return read_pickle(file, kind, WIDTHS)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            pixels, labels = arrays["data"], arrays["labels"]
    except Exception as error:  # zipfile, zlib, struct and numpy each have their own
        message = f"'{plain(file)}' is not a readable {kind}: {first_line(error)}"
        raise InputError(message) from error
    return checked_batch(file, pixels, labels, WIDTHS)


def _room(file: Path) -> int:
    """No fewer bytes than the pixels of a file have; what is wrong with it comes out later."""
    if file.suffix == ".npz":
        try:
            with zipfile.ZipFile(file) as archive:
                return sum(member.file_size for member in archive.infolist())
        except zipfile.BadZipFile:
            return 0
    return file.stat().st_size
