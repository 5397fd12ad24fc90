"""Arrays of images: a .npz file, as improved-diffusion's sampler writes it, or a .npy file."""

from pathlib import Path

import numpy as np

from fastdiff.data.dataset import ArrayDataset
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.in_memory import in_memory
from fastdiff.data.text import plain
from fastdiff.errors import InputError, first_line
from fastdiff.images import check_channels_last, read_samples

MAX_CLASSES = 1_000_000  # beyond, labels are something else: names and embeddings grow with them


def _is_npz(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".npz"


@image_format("a .npz file", _is_npz, general=True)  # a batch of ImageNet may be another
def load_npz(path: Path, options: Options) -> ArrayDataset:
    """``arr_0`` (N, H, W, C) of uint8, uint16 or floats in [-1, 1] and, optionally, (N,) integer
    ``arr_1``, and the names of the classes, ``class_names``, by their numbers."""
    images, labels, names = read_samples(path, deep=True)
    check_channels_last(images, f"'{path}': arr_0", deep=True)
    if labels is not None and len(labels):
        wrong = labels[(labels < 0) | (labels >= MAX_CLASSES)]
        if len(wrong):
            raise InputError(
                f"'{path}': arr_1 holds the label {wrong[0]}, "
                f"expected class numbers from 0, below {MAX_CLASSES:,}"
            )
    if images.size == 0:
        raise InputError(f"'{path}' holds no images: arr_0 has shape {images.shape}")
    names = None if labels is None else names
    where = "expected arr_1, integers (N,)"
    return in_memory(images, labels, names, f"'{path}'", options, where_labels=where)


@image_format("a .npy file", lambda path: path.is_file() and path.suffix.lower() == ".npy")
def load_npy(path: Path, options: Options) -> ArrayDataset:
    """One array (N, H, W, C) of uint8, uint16 or floats in [-1, 1]."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        message = f"'{plain(path)}' is not a readable .npy file: {first_line(error)}"
        raise InputError(message) from error
    name = f"'{path}'"
    check_channels_last(images, name, deep=True)
    if images.size == 0:
        raise InputError(f"{name} holds no images: its shape is {images.shape}")
    where = "a .npz file can hold them, beside the images"
    return in_memory(images, None, None, name, options, where_labels=where)
