"""Some of many: as many as are asked for, evenly spaced among them."""

import numpy as np
from torch import Tensor

from fastdiff.data.dataset import ImageDataset


class _Spaced(ImageDataset):
    """The images at ``indices`` (n,) of another set."""

    def __init__(self, base: ImageDataset, indices: np.ndarray) -> None:
        super().__init__(
            len(indices),
            base.image_size,
            base.channels,
            labels=None if base.labels is None else base.labels[indices],
            class_names=base.class_names,
            random_flip=base.random_flip,
            numbered=base.numbered,
            reading=base.reading,
            dtype=base.dtype,
        )
        self.base, self.indices = base, indices

    def gather(self, indices: np.ndarray) -> Tensor:
        return self.base.gather(self.indices[indices])


def evenly_spaced(dataset: ImageDataset, count: int | None) -> ImageDataset:
    """``count`` images from the first to the last of the set; all of them where it has no more, or
    for None. InputError for less than one."""
    if count is None or count >= len(dataset):
        return dataset
    return _Spaced(dataset, spaced_numbers(len(dataset), count))


def spaced_numbers(total: int, most: int) -> np.ndarray:
    """Of 0 … total - 1 no more than ``most``, int64, the first and the last among them."""
    return np.linspace(0, total - 1, min(total, most)).round().astype(np.int64)
