"""Between floats and bytes, and onto the disk: grids, PNGs, .npz samples.

Pictures take uint8 images (N, C, H, W), as tensors or arrays, with C = 1, 3 or 4; .npz files hold
(N, H, W, C), as improved-diffusion writes them. Every file is written beside its place and renamed
into it, so a reader never meets half a file and a full disk leaves the older one.
"""

import math
import os
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import InputError, first_line
from fastdiff.files import replacing
from fastdiff.optional import require

MIN_GRID_WIDTH = 600  # pixels: small images are enlarged until one can look at them
SEPARATOR = 2  # pixels between the images of a grid
SEPARATOR_GREY = 96
MAX_TRAJECTORY_COLUMNS = 12
HALF_RANGES = {torch.uint8: 127.5, torch.uint16: 32767.5}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SOFTWARE = ("Software", "fastdiff")  # what every PNG says of its origin

Pathlike = str | os.PathLike[str]


def to_float(images: Tensor) -> Tensor:
    """Images of any shape -> float32 in [-1, 1]: uint8 as x / 127.5 - 1, uint16 as
    x / 32767.5 - 1, floats as they are."""
    if images.dtype in HALF_RANGES:
        return images.float() / HALF_RANGES[images.dtype] - 1
    if not images.is_floating_point():
        raise InputError(f"to_float takes uint8, uint16 or float images, got {images.dtype}")
    return images.float()


def to_uint8(x: Tensor, rounding: str = "nearest") -> Tensor:
    """Floats in [-1, 1] (outside is clipped) -> uint8.

    rounding: "nearest" undoes ``to_float`` exactly; "truncate" is improved-diffusion's
        conversion, which darkens by half a level on average and so moves FID.

    Raises InputError for values that are not finite: they have no colour.
    """
    if rounding not in ("nearest", "truncate"):
        raise InputError(f"rounding is {rounding!r}, expected 'nearest' or 'truncate'")
    levels = (x.float() + 1) * 127.5
    if not torch.isfinite(levels).all():
        raise InputError("the images hold values that are not finite (NaN or infinite)")
    if rounding == "nearest":
        levels = levels.round()
    return levels.clamp(0, 255).to(torch.uint8)


def to_bytes(x: Tensor, rounding: str = "nearest") -> np.ndarray:
    """Floats (N, C, H, W) in [-1, 1] -> a uint8 array (N, H, W, C), as ``.npz`` files hold it."""
    return to_uint8(x, rounding).permute(0, 2, 3, 1).cpu().numpy()


def channels_first(images: np.ndarray) -> np.ndarray:
    """(..., H, W, C) -> (..., C, H, W), which pictures are made of."""
    return np.moveaxis(images, -1, -3)


def save_grid(
    images: Tensor | np.ndarray,
    path: Pathlike,
    columns: int | None = None,
    scale: int | None = None,
) -> Path:
    """Write one PNG with all images in rows of ``columns`` (default: as square as it gets).

    scale: whole-number enlargement without interpolation; by default the smallest one that makes
        the picture at least 600 pixels wide.
    """
    array = _picture_array(images)
    if columns is None:
        columns = math.ceil(math.sqrt(len(array)))
    if columns < 1 or (scale is not None and scale < 1):
        raise InputError(f"columns {columns} and scale {scale} must be positive")
    count, height, width, channels = array.shape
    scale = scale or math.ceil(MIN_GRID_WIDTH / (columns * width))
    rows = math.ceil(count / columns)
    array = array.repeat(scale, axis=1).repeat(scale, axis=2)
    down, right = height * scale + SEPARATOR, width * scale + SEPARATOR
    shape = (rows * down + SEPARATOR, columns * right + SEPARATOR, channels)
    canvas = np.full(shape, SEPARATOR_GREY, np.uint8)
    if channels == 4:
        canvas[..., 3] = 255
    for i, image in enumerate(array):
        top, left = SEPARATOR + i // columns * down, SEPARATOR + i % columns * right
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return _save_png(canvas, Path(path))


def save_trajectory(
    frames: Sequence[Tensor] | Tensor | np.ndarray,
    path: Pathlike,
    *,
    max_columns: int = MAX_TRAJECTORY_COLUMNS,
    scale: int | None = None,
) -> Path:
    """Write one PNG in which each row is an image and each column a moment of its denoising.

    frames: (steps, N, C, H, W) uint8, noisiest first, or a sequence of (N, C, H, W). Of more
        than ``max_columns`` steps, that many are shown, evenly spaced, the first and last included.
    """
    if len(frames) == 0 or max_columns < 1:
        raise InputError(f"{len(frames)} frames in {max_columns} columns: nothing to draw")
    shown = min(len(frames), max_columns)
    # Counted from the end, so that a single column is the finished image.
    chosen = np.linspace(len(frames) - 1, 0, shown).round().astype(int)[::-1]
    steps = np.stack([_nchw(frames[i]) for i in chosen], axis=1)  # (N, steps, C, H, W)
    return save_grid(steps.reshape(-1, *steps.shape[2:]), path, columns=shown, scale=scale)


def save_pngs(
    images: Tensor | np.ndarray, folder: Pathlike, *, prefix: str = "sample", start: int = 0
) -> list[Path]:
    """Write one PNG per image, ``<prefix>_000000.png`` and so on from ``start``."""
    array = _picture_array(images)
    return [
        _save_png(image, Path(folder) / f"{prefix}_{start + i:06d}.png")
        for i, image in enumerate(array)
    ]


def save_samples_npz(
    path: Pathlike,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write samples in the published format: ``arr_0`` uint8 (N, H, W, C), ``arr_1`` labels (N,).

    path: a file ending in .npz, or a folder, which gets the published name
        ``samples_<N>x<H>x<W>x<C>.npz``. Returns the file's path.
    class_names: what the labels' numbers stand for: a third array, ``class_names``.
    """
    array = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    check_channels_last(array, "images")
    return write_samples(path, array, labels, class_names)


def write_samples(
    path: Pathlike,
    images: np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """``save_samples_npz`` for a caller who knows that the channels are last."""
    _check_nhwc(images, "images")
    arrays = [np.ascontiguousarray(images)]
    named: dict[str, Any] = {}
    if labels is not None:
        numbers = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        _check_labels(numbers, len(images), "labels")
        arrays.append(numbers.astype(np.int64))
        if class_names is not None:
            named["class_names"] = np.array(class_names, dtype=np.str_)
            _check_class_names(named["class_names"], numbers, "class_names")
    file = Path(path)
    if file.suffix != ".npz":
        file = file / samples_file_name(images.shape)
    with replacing(file) as stream:
        np.savez(stream, *arrays, **named)
    return file


def samples_file_name(shape: Sequence[int]) -> str:
    """The published name of a file of samples (N, H, W, C): ``samples_<N>x<H>x<W>x<C>.npz``."""
    return f"samples_{'x'.join(map(str, shape))}.npz"


class Samples(NamedTuple):
    """images: uint8 (N, H, W, C). labels: int64 (N,). class_names: of the labels' numbers."""

    images: np.ndarray
    labels: np.ndarray | None
    class_names: list[str] | None


def load_samples_npz(path: Pathlike) -> tuple[np.ndarray, np.ndarray | None]:
    """Read ``arr_0`` uint8 (N, H, W, C) and, where there is one, ``arr_1`` as int64 (N,)."""
    images, labels, _ = read_samples(path)
    check_channels_last(images, f"'{path}': arr_0")
    return images, labels


def read_npz(path: Pathlike, wanted: Collection[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names in an ``.npz``, and those of the wanted arrays that it has. InputError: it cannot
    be read."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return sorted(archive), {name: archive[name] for name in wanted if name in archive}
    except FileNotFoundError:
        raise InputError(f"no file '{path}'") from None
    except Exception as error:  # zipfile, zlib, struct and numpy each have their own
        raise InputError(f"'{path}' is not a readable .npz file: {first_line(error)}") from error


def read_samples(path: Pathlike, *, deep: bool = False) -> Samples:
    """All that ``save_samples_npz`` writes. The channels are taken to be last.

    deep: images of uint16 or floats are taken too.
    """
    names, arrays = read_npz(path, ("arr_0", "arr_1", "class_names"))
    if "arr_0" not in arrays:
        raise InputError(
            f"'{path}' holds {', '.join(names) or 'nothing'}, expected arr_0: write it with "
            "numpy.savez(file, images) or numpy.savez(file, images, labels)"
        )
    _check_nhwc(arrays["arr_0"], f"'{path}': arr_0", deep)
    labels = arrays.get("arr_1")
    if labels is not None:
        _check_labels(labels, len(arrays["arr_0"]), f"'{path}': arr_1")
        labels = labels.astype(np.int64)
    class_names = arrays.get("class_names")
    if class_names is not None:
        _check_class_names(class_names, labels, f"'{path}': class_names")
    return Samples(
        arrays["arr_0"], labels, None if class_names is None else [str(n) for n in class_names]
    )


def _nchw(images: Tensor | np.ndarray) -> np.ndarray:
    array = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in MODES or not array.size:
        raise InputError(
            f"a picture needs uint8 images (N, C, H, W) with C = 1, 3 or 4, "
            f"got {array.dtype} {array.shape}{_picture_remedy(array, isinstance(images, Tensor))}"
        )
    return array


def _picture_remedy(array: np.ndarray, is_tensor: bool) -> str:
    if array.dtype.kind == "f":
        return "; fastdiff.images.to_uint8 makes it of floats in [-1, 1]"
    if array.ndim == 4 and array.shape[3] in MODES:
        turn = "permute" if is_tensor else "transpose"
        return f": its channels seem to be last, give images.{turn}(0, 3, 1, 2)"
    return ""


def _picture_array(images: Tensor | np.ndarray) -> np.ndarray:
    """Checked uint8 (N, H, W, C)."""
    return _nchw(images).transpose(0, 2, 3, 1)


def check_channels_last(array: np.ndarray, name: str, *, deep: bool = False) -> None:
    """InputError unless uint8 (N, H, W, C), as far as a shape can tell; ``deep``: or uint16 or
    floats.

    A picture is not 1, 3 or 4 pixels high with 5 channels or more, unless it is square.
    """
    _check_nhwc(array, name, deep)
    _, height, width, channels = array.shape
    if height in MODES and channels > max(MODES) and height != width:
        raise InputError(
            f"{name} has the shape {array.shape}, which looks like (N, C, H, W), channels first; "
            "expected (N, H, W, C): save images.transpose(0, 2, 3, 1)"
        )


def is_deep(dtype: np.dtype) -> bool:
    """Whether images may have these numbers instead of bytes."""
    return dtype == np.uint16 or dtype.kind == "f"


def check_range(array: np.ndarray, name: str) -> None:
    """InputError for floats outside [-1, 1]."""
    if array.dtype.kind == "f" and array.size and not -1 <= array.min() <= array.max() <= 1:
        raise InputError(
            f"{name}: {array.dtype} {array.shape}, expected floats in [-1, 1], which are taken as "
            f"they are{_remedy(array)}"
        )


def _check_nhwc(array: np.ndarray, name: str, deep: bool = False) -> None:
    if array.ndim != 4 or not (array.dtype == np.uint8 or (deep and is_deep(array.dtype))):
        others = ", or of uint16 or floats in [-1, 1]" if deep else ""
        raise InputError(
            f"{name}: {array.dtype} {array.shape}, expected uint8 (N, H, W, C){others}"
            f"{_remedy(array)}"
        )


def _remedy(array: np.ndarray) -> str:
    """How to make bytes of other numbers, and four axes of two or three."""
    if array.dtype != np.uint8 and array.dtype.kind in "fiub" and array.size:
        low, high = float(array.min()), float(array.max())
        if not math.isfinite(low + high):
            return ": it holds values that are not finite"
        values = f": its values run from {low:g} to {high:g}"
        if array.dtype.kind == "b" or (array.dtype.kind == "f" and 0 <= low and high <= 1):
            return f"{values}, convert them with (images * 255.0).round().astype(numpy.uint8)"
        if array.dtype.kind == "f" and -1 <= low and high <= 1:
            return f"{values}, convert them with ((images + 1) * 127.5).round().astype(numpy.uint8)"
        if 0 <= low and high <= 255:
            return f"{values}, convert them with images.round().astype(numpy.uint8)"
        return f"{values}, bring them to 0 ... 255 first"
    if array.ndim == 3 and array.shape[2] in (3, 4) and array.shape[1] != array.shape[2]:
        return ": for a single image save images[None]"
    if array.ndim == 3:
        return ": for grey images save images[..., None]"
    return ""


def _check_labels(array: np.ndarray, count: int, name: str) -> None:
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise InputError(
            f"{name}: {array.dtype} {array.shape}, expected integers ({count},), one per image"
        )


def _check_class_names(array: np.ndarray, labels: np.ndarray | None, name: str) -> None:
    highest = -1 if labels is None or not len(labels) else int(labels.max())
    if array.dtype.kind != "U" or array.ndim != 1 or len(array) <= highest:
        raise InputError(
            f"{name}: {array.dtype} {array.shape}, expected a string for every class number, "
            f"0 to {highest}"
        )
    if (twice := repeated(list(map(str, array)))) is not None:
        raise InputError(f"{name} holds {twice!r:.60} twice, expected another name for every class")


def repeated(names: Sequence[str]) -> str | None:
    """A name that stands in the list more than once, in whatever form of Unicode."""
    seen = set()
    for name in names:
        form = unicodedata.normalize("NFC", name)
        if form in seen:
            return name
        seen.add(form)
    return None


def _save_png(array: np.ndarray, path: Path) -> Path:
    """Write a uint8 (H, W, C) picture."""
    pixels = array[:, :, 0] if array.shape[2] == 1 else array
    image = require("PIL.Image", "train").fromarray(np.ascontiguousarray(pixels))
    origin = require("PIL.PngImagePlugin", "train").PngInfo()
    origin.add_text(*SOFTWARE)
    with replacing(path) as stream:
        image.save(stream, format="PNG", pnginfo=origin)
    return path


def is_our_png(path: Path) -> bool:
    """Whether ``save_grid`` or another of these functions wrote this file (in this version)."""
    with path.open("rb") as stream:
        return "\0".join(SOFTWARE).encode() in stream.read(200)  # it precedes the pixels
