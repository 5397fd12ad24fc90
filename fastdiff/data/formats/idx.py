"""IDX files, in which MNIST and its kin (Fashion-MNIST, KMNIST, EMNIST) are distributed."""

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from fastdiff.data.batches import names_of_few
from fastdiff.data.dataset import ArrayDataset
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.in_memory import in_memory
from fastdiff.data.text import listed, plain, shown
from fastdiff.errors import InputError, first_line
from fastdiff.images import MODES

IMAGES = re.compile(r"(.*)images[-.]idx[34]-ubyte(\.gz)?")
BYTES = 8  # IDX's code for uint8


@image_format("MNIST's or another IDX file of images", lambda path: bool(idx_files(path)))
def load_idx(path: Path, options: Options) -> ArrayDataset:
    """uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W), and the labels that lie beside them.

    Of a folder it is the training images.
    """
    file = _one_file(path, idx_files(path))
    images = _as_channels_last(read_idx(file), file)
    name = _labels_name(file)
    beside = next(filter(Path.is_file, map(file.with_name, (name, f"{name}.gz"))), None)
    labels = None if beside is None else read_idx(beside)
    if labels is not None and labels.shape != images.shape[:1]:
        raise InputError(
            f"'{plain(beside)}' has the shape {labels.shape}, expected {images.shape[:1]}: a label "
            f"for every image of '{plain(file)}'"
        )
    if labels is not None:
        labels = labels.astype(np.int64)
    where = f"expected the file {shown(name)} beside it"
    return in_memory(images, labels, None, f"'{plain(file)}'", options, where_labels=where)


def idx_files(path: Path) -> list[Path]:
    """Files of images: the one that ``path`` is, or those of a folder, each once if also as .gz."""
    if not path.is_dir():
        return [path] if IMAGES.fullmatch(path.name) else []
    found = {name.removesuffix(".gz"): path / name for name in reversed(names_of_few(path))}
    return [file for name, file in sorted(found.items()) if IMAGES.fullmatch(name)]


def read_idx(file: Path) -> np.ndarray:
    """A uint8 array: two zero bytes, the type, the number of axes, their lengths, the bytes."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        message = f"'{plain(file)}' is not a readable .gz file: {first_line(error)}"
        raise InputError(message) from error
    axes = content[3] if len(content) > 3 else 0
    if content[:3] != bytes([0, 0, BYTES]) or len(content) < 4 * (1 + axes):
        raise InputError(
            f"'{plain(file)}' begins with the bytes {content[:4].hex(' ') or 'none'}, expected an "
            "IDX file of bytes: 00 00 08, the number of axes and their lengths"
        )
    shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
    expected, found = int(np.prod(shape)), len(content) - 4 * (1 + axes)
    if found != expected:
        raise InputError(
            f"'{plain(file)}' has {found:,} bytes after its header, expected {expected:,} for the "
            f"shape {shape} (is it truncated?)"
        )
    return np.frombuffer(content, np.uint8, offset=4 * (1 + axes)).reshape(shape)


def _one_file(path: Path, files: list[Path]) -> Path:
    training = [file for file in files if "train" in file.name]
    chosen = training or files
    if len(chosen) > 1:
        names = listed([shown(file.name) for file in chosen], 6)
        raise InputError(f"'{plain(path)}' holds several sets: {names}; give one by its path")
    return chosen[0]


def _labels_name(images: Path) -> str:
    """What the file of labels beside one of images is called, not packed."""
    before, _, after = images.name.removesuffix(".gz").rpartition("images")
    return f"{before}labels{re.sub('idx[34]', 'idx1', after)}"


def _as_channels_last(images: np.ndarray, file: Path) -> np.ndarray:
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4 and images.shape[3] in MODES:
        return images
    if images.ndim == 4 and images.shape[1] in MODES:
        return images.transpose(0, 2, 3, 1)
    raise InputError(
        f"'{plain(file)}' has the shape {images.shape}, expected images (N, H, W), or with 1, 3 or "
        "4 channels (N, H, W, C) or (N, C, H, W)"
    )
