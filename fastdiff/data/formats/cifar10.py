"""CIFAR-10 as it is distributed: python (pickle) or binary batches."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.data.dataset import ArrayDataset
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.in_memory import in_memory
from fastdiff.errors import InputError

CIFAR10_CLASSES = (
    "airplane automobile bird cat deer dog frog horse ship truck".split()
)  # label i is name i
CIFAR10_BATCH = re.compile(r"(data_batch_(\d+)|test_batch)(\.bin)?")
CIFAR10_PIXELS = 3 * 32 * 32


def cifar10_files(path: Path) -> list[Path]:
    """CIFAR-10's training batches in a folder, or the one batch that ``path`` is; else nothing."""
    if not path.is_dir():
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


@image_format("a CIFAR-10 folder or batch", lambda path: bool(cifar10_files(path)))
def load_cifar10(path: Path, options: Options) -> ArrayDataset:
    """The training batches of a folder, or one batch: 32x32 RGB, 10 classes."""
    files = cifar10_files(path)
    parts = [_read_binary(file) if file.suffix == ".bin" else _read_pickle(file) for file in files]
    planes = np.concatenate([pixels for pixels, _ in parts])  # (N, 3072): red, green, blue planes
    labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CIFAR10_CLASSES):
        raise InputError(
            f"'{files[0].parent}': labels run from {labels.min()} to {labels.max()}, "
            f"expected 0 to {len(CIFAR10_CLASSES) - 1}"
        )
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return in_memory(images, labels, list(CIFAR10_CLASSES), f"'{files[0].parent}'", options)


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
