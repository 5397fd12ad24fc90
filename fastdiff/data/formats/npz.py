"""A .npz file of images, as improved-diffusion's sampler writes it."""

from pathlib import Path

from fastdiff.data.dataset import ArrayDataset
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.in_memory import in_memory
from fastdiff.errors import InputError
from fastdiff.images import check_channels_last, read_samples

MAX_CLASSES = 1_000_000  # beyond, labels are something else: names and embeddings grow with them


def _is_npz(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".npz"


@image_format("a .npz file", _is_npz, general=True)  # a batch of ImageNet may be another
def load_npz(path: Path, options: Options) -> ArrayDataset:
    """uint8 (N, H, W, C) ``arr_0`` and, optionally, (N,) integer ``arr_1``, and the names of the
    classes, ``class_names``, by their numbers."""
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
    return in_memory(images, labels, None if labels is None else names, f"'{path}'", options)
