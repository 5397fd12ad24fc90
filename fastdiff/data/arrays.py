"""Sets that are arrays already: scikit-learn's digits, .npz files, CIFAR-10's own files."""

import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.data.classes import numbers
from fastdiff.data.dataset import ArrayDataset
from fastdiff.data.summary import NOT_ASKED, Found
from fastdiff.data.transforms import convert_arrays
from fastdiff.errors import InputError
from fastdiff.images import check_channels_last, read_samples
from fastdiff.optional import require

CIFAR10_CLASSES = (
    "airplane automobile bird cat deer dog frog horse ship truck".split()
)  # label i is name i
CIFAR10_BATCH = re.compile(r"(data_batch_(\d+)|test_batch)(\.bin)?")
MAX_CLASSES = 1_000_000  # beyond, labels are something else: names and embeddings grow with them
CIFAR10_PIXELS = 3 * 32 * 32


def load_digits(**options: Any) -> ArrayDataset:
    """The 1,797 handwritten digits of scikit-learn: 8x8, values 0..16 brought to 0..255."""
    bunch = require("sklearn.datasets", "demo").load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, :, :, None]
    names = [str(name) for name in bunch.target_names]
    return _array_dataset(images, bunch.target.astype(np.int64), names, "digits", **options)


def load_npz(path: Path, **options: Any) -> ArrayDataset:
    """A .npz of uint8 (N, H, W, C) ``arr_0`` and, optionally, (N,) integer ``arr_1``, and the
    names of the classes, ``class_names``, by their numbers."""
    images, labels, names = read_samples(path)
    check_channels_last(images, f"'{path}': arr_0")
    if labels is not None and len(labels):
        wrong = labels[(labels < 0) | (labels >= MAX_CLASSES)]
        if len(wrong):
            raise InputError(
                f"'{path}': arr_1 holds the label {wrong[0]}, "
                f"expected class numbers from 0, below {MAX_CLASSES:,}"
            )
    if images.size == 0:
        raise InputError(f"'{path}' holds no images: arr_0 has shape {images.shape}")
    numbered = names is None
    if labels is None:
        names = None
    elif names is None:
        names = numbers(int(labels.max()) + 1)
    return _array_dataset(images, labels, names, f"'{path}'", numbered=numbered, **options)


def cifar10_files(path: Path) -> list[Path]:
    """CIFAR-10's training batches in a folder, or the one batch that ``path`` is; else nothing."""
    if path.is_file():
        return [path] if CIFAR10_BATCH.fullmatch(path.name) else []
    for suffix in ("", ".bin"):
        found = {}
        for file in path.iterdir():
            match = CIFAR10_BATCH.fullmatch(file.name)
            if match and match[2] and (match[3] or "") == suffix:
                found[int(match[2])] = file
        if missing := set(range(1, max(found, default=0) + 1)) - set(found):
            raise InputError(f"'{path}' lacks data_batch_{min(missing)}{suffix}")
        if found:
            return [found[number] for number in sorted(found)]
    return []


def load_cifar10(files: list[Path], **options: Any) -> ArrayDataset:
    """CIFAR-10 batches in their python (pickle) or binary form: 32x32 RGB, 10 classes."""
    parts = [_read_binary(file) if file.suffix == ".bin" else _read_pickle(file) for file in files]
    planes = np.concatenate([pixels for pixels, _ in parts])  # (N, 3072): red, green, blue planes
    labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CIFAR10_CLASSES):
        raise InputError(
            f"'{files[0].parent}': labels run from {labels.min()} to {labels.max()}, "
            f"expected 0 to {len(CIFAR10_CLASSES) - 1}"
        )
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _array_dataset(images, labels, list(CIFAR10_CLASSES), f"'{files[0].parent}'", **options)


def _array_dataset(
    images: np.ndarray,
    labels: np.ndarray | None,
    class_names: list[str] | None,
    name: str,
    *,
    image_size: int | None,
    class_cond: bool | None,
    random_flip: bool,
    channels: int | None,
    numbered: bool = False,
) -> ArrayDataset:
    if class_cond and labels is None:
        raise InputError(f"{name} has no labels (arr_1), which class_cond needs")
    no_classes = NOT_ASKED if class_cond is False and labels is not None else ""
    if class_cond is False:
        labels = class_names = None
    if len(images) == 0:
        raise InputError(f"{name} holds no images")
    count, height, width, found = images.shape
    images = convert_arrays(images, image_size, channels, name)
    return ArrayDataset(
        images,
        labels=labels,
        class_names=class_names,
        random_flip=random_flip,
        numbered=numbered and labels is not None,
        found=Found(
            name.strip("'"),
            sizes=Counter({f"{width}x{height}": count}),
            modes=Counter({f"{found}-channel": count}),
            no_classes=no_classes,
        ),
    )


def _read_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of 1 label byte and 3072 pixel bytes."""
    raw = np.frombuffer(file.read_bytes(), dtype=np.uint8)
    if raw.size == 0 or raw.size % (1 + CIFAR10_PIXELS):
        raise InputError(
            f"'{file}' has {raw.size} bytes, expected a multiple of {1 + CIFAR10_PIXELS} "
            "(is it truncated?)"
        )
    records = raw.reshape(-1, 1 + CIFAR10_PIXELS)
    return records[:, 1:], records[:, 0]


def _read_pickle(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with file.open("rb") as stream:
            batch = _ArrayUnpickler(stream, encoding="bytes").load()
        if isinstance(batch, dict):
            batch = {k.encode() if isinstance(k, str) else k: v for k, v in batch.items()}
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(f"'{file}' is not a readable CIFAR-10 batch: {error}") from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), CIFAR10_PIXELS):
        raise InputError(
            f"'{file}': data is {pixels.dtype} {pixels.shape} with {len(labels)} labels, "
            f"expected uint8 (N, {CIFAR10_PIXELS}) with N labels"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InputError(f"'{file}': labels are {labels.dtype} {labels.shape}, expected integers")
    return pixels, labels


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
