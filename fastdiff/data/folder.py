"""A folder of image files."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff._optional import require
from fastdiff.data.dataset import ImageDataset
from fastdiff.data.transforms import to_array
from fastdiff.errors import InputError

CACHE_BYTES = 1 << 30  # a decoded set of at most this size stays in memory
HEADER_THREADS = 8
SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
KINDS = {
    "1": "greyscale",
    "L": "greyscale",
    "LA": "greyscale with alpha",
    "P": "colour",
    "RGB": "colour",
    "CMYK": "colour",
    "YCbCr": "colour",
    "RGBA": "colour with alpha",
    "PA": "colour with alpha",
}


class Header(NamedTuple):
    file: Path
    mode: str
    size: tuple[int, int]  # (width, height)


class FolderDataset(ImageDataset):
    """Image files decoded on demand; a small set is kept in memory once read.

    Reading is safe from several threads. A file that cannot be decoded raises InputError with
    its name.
    """

    def __init__(
        self,
        files: list[Path],
        image_size: tuple[int, int],
        channels: int,
        *,
        resize: int | None,
        cache_bytes: int = CACHE_BYTES,
        **options: Any,
    ) -> None:
        super().__init__(len(files), image_size, channels, **options)
        self.files = files
        self._resize = resize
        shape = (len(files), channels, *image_size)
        self._cache = np.empty(shape, np.uint8) if np.prod(shape) <= cache_bytes else None
        self._cached = np.zeros(len(files), bool)

    def gather(self, indices: np.ndarray) -> Tensor:
        if self._cache is None:
            return torch.from_numpy(np.stack([self._decode(i) for i in indices]))
        for i in indices[~self._cached[indices]]:
            self._cache[i] = self._decode(i)
            self._cached[i] = True  # after the pixels: another thread may be looking
        return torch.from_numpy(self._cache[indices])

    def _decode(self, index: int) -> np.ndarray:
        """uint8 (C, H, W)."""
        file = self.files[index]
        try:
            with require("PIL.Image", "train").open(file) as image:
                array = to_array(image, self._resize, self.channels)
        except InputError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more
            raise InputError(f"'{file}' cannot be decoded: {error}") from error
        if array.shape[:2] != self.image_size:
            raise InputError(
                f"'{file}' is now {_pixels(array.shape[1::-1])}, was "
                f"{_pixels(self.image_size[::-1])} when the folder was opened"
            )
        return array.transpose(2, 0, 1)


def load_folder(
    root: Path,
    *,
    image_size: int | None,
    class_cond: bool | None,
    random_flip: bool,
    channels: int | None,
    cache_bytes: int = CACHE_BYTES,
) -> FolderDataset:
    """Open a folder and its sub-folders; every file's header is read now, its pixels later."""
    files = list_images(root)
    if not files:
        raise InputError(f"'{root}' holds no image files ({', '.join(sorted(SUFFIXES))})")
    headers = _read_headers(files)
    if channels is None:
        channels = _choose_channels(headers)
    if image_size is None:
        width, height = _one_size(headers)
    else:
        width = height = image_size
    labels, class_names = _classes(root, files, class_cond)
    return FolderDataset(
        files,
        (height, width),
        channels,
        resize=image_size,
        cache_bytes=cache_bytes,
        labels=labels,
        class_names=class_names,
        random_flip=random_flip,
    )


def list_images(root: Path) -> list[Path]:
    """Image files below ``root`` in sorted order; hidden files and folders are passed over."""
    found: list[Path] = []
    visited: set[str] = set()

    def visit(folder: Path) -> None:
        real = os.path.realpath(folder)
        if real in visited:  # a symbolic link back to where we are
            return
        visited.add(real)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                visit(path)
            elif path.suffix.lower() in SUFFIXES:
                found.append(path)

    visit(root)
    return found


def _read_headers(files: list[Path]) -> list[Header]:
    pillow = require("PIL.Image", "train")

    def read(file: Path) -> Header:
        try:
            with pillow.open(file) as image:
                header = Header(file, image.mode, image.size)
        except Exception as error:
            raise InputError(f"'{file}' is not a readable image: {error}") from error
        if header.mode not in KINDS:
            raise InputError(
                f"'{file}' has the pixel mode {header.mode}, expected 8 bits per channel: "
                "convert it first"
            )
        return header

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return list(pool.map(read, files))


def _choose_channels(headers: list[Header]) -> int:
    counts = Counter(KINDS[header.mode] for header in headers)
    if len(counts) > 1:
        first = {KINDS[header.mode]: header.file for header in reversed(headers)}
        found = ", ".join(f"{n} {kind} (such as '{first[kind]}')" for kind, n in counts.items())
        raise InputError(f"images of mixed modes: {found}; choose with --channels 1, 3 or 4")
    return 1 if next(iter(counts)).startswith("greyscale") else 3


def _one_size(headers: list[Header]) -> tuple[int, int]:
    """(width, height) of all images."""
    first = headers[0]
    for other in headers:
        if other.size != first.size:
            raise InputError(
                f"images of mixed sizes: '{first.file}' is {_pixels(first.size)} and "
                f"'{other.file}' is {_pixels(other.size)}; choose one with --image-size"
            )
    return first.size


def _classes(
    root: Path, files: list[Path], class_cond: bool | None
) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels (N,) and the classes' names in sorted order, which numbers them."""
    if class_cond is False:
        return None, None
    parts = [file.relative_to(root).parts for file in files]
    if all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) > 1:
        names = [part[0] for part in parts]
    elif all("_" in file.name for file in files):
        names = [file.name.split("_")[0] for file in files]
    elif class_cond is None:
        return None, None
    else:
        bare = next(file for file in files if "_" not in file.name)
        raise InputError(
            f"no labels for '{bare}', which class_cond needs: expected one sub-folder per class, "
            "or file names that start with the class and '_'"
        )
    classes = sorted(set(names))
    if class_cond is None and len(classes) == 1:
        return None, None  # a common prefix, not a labelling
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in names], dtype=np.int64), classes


def _pixels(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
