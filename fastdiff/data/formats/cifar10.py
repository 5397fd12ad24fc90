"""CIFAR-10 as it is distributed: python (pickle) or binary batches."""

import re
from pathlib import Path

import numpy as np

from fastdiff.data.batches import Batch, numbered_files, read_batches, read_pickle
from fastdiff.data.dataset import ArrayDataset
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.in_memory import in_memory
from fastdiff.errors import InputError

CIFAR10_CLASSES = (
    "airplane automobile bird cat deer dog frog horse ship truck".split()
)  # label i is name i
CIFAR10_BATCH = re.compile(r"(?:data_batch_(\d+)|test_batch)(\.bin)?")
TRAINING_BATCH = re.compile(r"data_batch_(\d+)(\.bin)?")
CIFAR10_PIXELS = 3 * 32 * 32


def cifar10_files(path: Path) -> list[Path]:
    """CIFAR-10's training batches in a folder, or the one batch that ``path`` is; else nothing."""
    if path.is_dir():
        return numbered_files(path, TRAINING_BATCH)
    return [path] if CIFAR10_BATCH.fullmatch(path.name) else []


@image_format("a CIFAR-10 folder or batch", lambda path: bool(cifar10_files(path)))
def load_cifar10(path: Path, options: Options) -> ArrayDataset:
    """The training batches of a folder, or one batch: 32x32 RGB, 10 classes."""
    files = cifar10_files(path)
    room = sum(file.stat().st_size for file in files)
    pixels, labels, broken = read_batches(files, _read, room, options.skip_broken)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CIFAR10_CLASSES):
        raise InputError(
            f"'{files[0].parent}': labels run from {labels.min()} to {labels.max()}, "
            f"expected 0 to {len(CIFAR10_CLASSES) - 1}"
        )
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    name = f"'{files[0].parent}'"
    return in_memory(images, labels, list(CIFAR10_CLASSES), name, options, broken=broken)


def _read(file: Path) -> Batch:
    if file.suffix == ".bin":
        return _read_binary(file)
    return read_pickle(file, "CIFAR-10 batch", [CIFAR10_PIXELS])


def _read_binary(file: Path) -> Batch:
    """Records of 1 label byte and 3072 pixel bytes."""
    raw = np.frombuffer(file.read_bytes(), dtype=np.uint8)
    if raw.size == 0 or raw.size % (1 + CIFAR10_PIXELS):
        raise InputError(
            f"'{file}' has {raw.size} bytes, expected a multiple of {1 + CIFAR10_PIXELS} "
            "(is it truncated?)"
        )
    records = raw.reshape(-1, 1 + CIFAR10_PIXELS)
    return Batch(records[:, 1:], records[:, 0])
