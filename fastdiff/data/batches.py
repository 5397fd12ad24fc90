"""Batch files, as CIFAR-10 and the downsampled ImageNet come: rows of pixels and labels."""

import os
import pickle
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdiff.data.text import plain
from fastdiff.errors import InputError, first_line

FEW = 1000  # entries: a larger folder holds pictures, and is not searched for anything else


class Batch(NamedTuple):
    """pixels: uint8 (n, p), the planes of each image. labels: integers (n,). broken: a line for
    every file that was left out."""

    pixels: np.ndarray
    labels: np.ndarray
    broken: Sequence[str] = ()


def names_of_few(folder: Path) -> list[str]:
    """The names in a folder of at most ``FEW`` entries, sorted; of a larger one none."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, FEW + 1)]
    except OSError:  # listing it as a folder of images will say so
        return []
    return sorted(names) if len(names) <= FEW else []


def numbered_files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """A folder's files ``pattern`` by their numbers, group 1; group 2 is a suffix, all of one.

    Raises InputError where a number from 1 on is missing.
    """
    found: dict[str, dict[int, Path]] = {}
    for match in filter(None, map(pattern.fullmatch, names_of_few(folder))):
        found.setdefault(match[2] or "", {})[int(match[1])] = folder / match[0]
    for suffix in sorted(found):
        files = found[suffix]
        if missing := set(range(1, max(files) + 1)) - set(files):
            present = files[max(files)].name
            lacking = present.replace(str(max(files)), str(min(missing)))
            raise InputError(f"'{plain(folder)}' lacks {lacking}: it has {present}")
        return [files[number] for number in sorted(files)]
    return []


def read_batches(
    files: Sequence[Path], read: Callable[[Path], Batch], room: int, skip_broken: bool
) -> Batch:
    """All batches one behind the other, in the memory of all and one.

    room: bytes of pixels in all files, or more. skip_broken: leave out files that ``read`` refuses,
    as long as one is left.
    """
    pixels = np.empty((0, 1), np.uint8)
    labels: list[np.ndarray] = []
    broken: list[str] = []
    end = 0
    for file in files:
        try:
            batch = read(file)
        except InputError as error:
            broken.append(str(error))
            if not skip_broken or len(broken) == len(files):
                raise
            continue
        width = batch.pixels.shape[1]
        if not labels:
            pixels = np.empty((room // width, width), np.uint8)  # unwritten, it takes no memory
        if width != pixels.shape[1]:
            raise InputError(
                f"'{plain(file)}' has {width} bytes for each image, '{plain(files[0])}' has "
                f"{pixels.shape[1]}: expected batches of one size"
            )
        pixels[end : end + len(batch.pixels)] = batch.pixels
        labels.append(batch.labels.astype(np.int64))
        end += len(batch.pixels)
        del batch  # before the next is read
    return Batch(pixels[:end], np.concatenate(labels), broken)


def checked_batch(file: Path, pixels: Any, labels: Any, widths: Sequence[int]) -> Batch:
    """``pixels`` and ``labels`` as a batch, if they are uint8 (n, one of ``widths``) and (n,)."""
    pixels, labels = np.asarray(pixels), np.asarray(labels)
    if (
        pixels.dtype != np.uint8
        or pixels.shape[:1] != labels.shape[:1]
        or pixels.shape[1:] not in [(width,) for width in widths]
    ):
        expected = " or ".join(map(str, widths))
        raise InputError(
            f"'{plain(file)}': data is {pixels.dtype} {pixels.shape} with {labels.size} labels, "
            f"expected uint8 (N, {expected}) with N labels"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InputError(
            f"'{plain(file)}': labels are {labels.dtype} {labels.shape}, expected integers (N,)"
        )
    return Batch(pixels, labels)


def read_pickle(file: Path, kind: str, widths: Sequence[int]) -> Batch:
    """A pickled dictionary of ``data`` and ``labels``; nothing in it is called.

    kind: what the file should be, for a message. widths: bytes that an image may have.
    """
    try:
        with file.open("rb") as stream:
            batch = _ArrayUnpickler(stream, encoding="bytes").load()
        if isinstance(batch, dict):
            batch = {k.encode() if isinstance(k, str) else k: v for k, v in batch.items()}
        pixels, labels = batch[b"data"], np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged pickle can raise nearly anything
        message = f"'{plain(file)}' is not a readable {kind}: {first_line(error)}"
        raise InputError(message) from error
    return checked_batch(file, pixels, labels, widths)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds plain containers and numpy arrays, nothing else: a pickle can name any callable."""

    _ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # numpy's own function for rebuilding an array, which moved in numpy 2
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("_codecs", "encode"): lambda text, encoding: bytes(text, encoding),
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None
