"""Images to train on and to compare with: where they come from and the order they are drawn in."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.data.arrays import (
    cifar10_files,
    load_cifar10,
    load_digits,
    load_npz,
)
from fastdiff.data.dataset import NO_LABEL, ArrayDataset, ImageDataset
from fastdiff.data.folder import CACHE_BYTES, FolderDataset, load_folder
from fastdiff.data.stream import BatchStream, iterate_once
from fastdiff.errors import InputError

__all__ = [
    "NO_LABEL",
    "ArrayDataset",
    "BatchStream",
    "FolderDataset",
    "ImageDataset",
    "iterate_once",
    "load_dataset",
]


def load_dataset(
    spec: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    class_cond: bool | None = False,
    random_flip: bool = False,
    channels: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> ImageDataset:
    """Open a set of images.

    spec: ``"digits"`` (the 1,797 8x8 images inside scikit-learn); a folder of images, searched
        with its sub-folders; a ``.npz`` of uint8 (N, H, W, C) ``arr_0`` and optional (N,) integer
        ``arr_1``; CIFAR-10 as it is distributed (``cifar-10-batches-py`` or
        ``cifar-10-batches-bin``: the training batches, or one batch file by its path).
    image_size: side in pixels to resize and centre-crop to, as improved-diffusion's loader does;
        None keeps the images as they are, and then they must share one size.
    class_cond: True demands labels, False ignores them (``num_classes`` is then None and every
        label ``NO_LABEL``), None takes them when there are any. A folder's classes are its
        first-level sub-folders when every image lies in one of at least two, otherwise the file
        names' prefixes before "_".
    random_flip: what a BatchStream over the set does unless told; items here are never flipped.
    channels: 1, 3 or 4; None keeps an array's own count and, for a folder, takes 1 when every
        image is greyscale and 3 otherwise (an alpha channel is dropped, as published).
    cache_bytes: a folder whose decoded images fit is kept in memory after the first read.

    Items are (uint8 tensor (C, H, W), int label). Raises InputError for what cannot be used.
    """
    if image_size is not None and not _is_size(image_size):
        raise InputError(f"image_size is {image_size!r}, expected a positive number of pixels")
    if channels not in (None, 1, 3, 4):
        raise InputError(f"channels is {channels!r}, expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    options: dict[str, Any] = {
        "image_size": image_size,
        "class_cond": class_cond,
        "random_flip": random_flip,
        "channels": channels,
    }
    if spec == "digits":
        return load_digits(**options)
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError(
            f"no data at '{path}': expected 'digits', a folder of images, a .npz file "
            "or a CIFAR-10 folder"
        )
    if files := cifar10_files(path):
        return load_cifar10(files, **options)
    if path.is_dir():
        return load_folder(path, cache_bytes=cache_bytes, **options)
    if path.suffix == ".npz":
        return load_npz(path, **options)
    raise InputError(
        f"'{path}' is a file of an unknown kind: expected a folder of images, a .npz file "
        "or a CIFAR-10 batch"
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1
