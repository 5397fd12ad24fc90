"""What every set of images offers, and the one that lies in memory."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.summary import Found, describe
from fastdiff.errors import InputError
from fastdiff.images import check_range, is_deep

NO_LABEL = -1  # no valid class: an embedding table refuses it instead of using it


class ImageDataset:
    """Images of one size, by index.

    A set of your own is a subclass with a ``gather``, which several threads may call at a time;
    training and evaluation need no more of it.

    Args:
        count: N, how many images.
        image_size: (H, W) in pixels.
        channels: C.
        labels: int64 array (N,), or None.
        class_names: of the labels' numbers in their order; None without labels.
        random_flip: the default of a BatchStream over the set.
        numbered: the classes have numbers alone; ``class_names`` repeats them.
        reading: how a folder's classes were read: one of ``fastdiff.data.labels.WAYS``.
        found: what ``describe`` says.
        dtype: of what ``gather`` returns: torch.uint8, torch.uint16, or torch.float32 in [-1, 1].

    Attributes: those arguments but the first and the last, and ``num_classes``, None without
    labels. Raises InputError for a set without images.
    """

    def __init__(
        self,
        count: int,
        image_size: tuple[int, int],
        channels: int,
        *,
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
        random_flip: bool = False,
        numbered: bool = False,
        reading: str | None = None,
        found: Found | None = None,
        dtype: torch.dtype = torch.uint8,
    ) -> None:
        if count == 0:
            raise InputError("the data set holds no images")
        self._count = count
        self.image_size = image_size
        self.channels = channels
        if labels is not None:
            labels = _checked_labels(labels, count)
            if class_names is None:
                class_names, numbered = numbers(labels.max() + 1), True
        self.labels = labels
        self.class_names = class_names
        self.num_classes = None if class_names is None else len(class_names)
        self.random_flip = random_flip
        self.numbered = numbered
        self.reading = reading
        self._found = found
        self.dtype = dtype

    def __len__(self) -> int:
        return self._count

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.channels, *self.image_size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image ``index``, (C, H, W) of ``dtype``, and its label (``NO_LABEL`` without)."""
        if not -self._count <= index < self._count:
            raise IndexError(f"image {index} of a set of {self._count}")
        index %= self._count
        label = NO_LABEL if self.labels is None else int(self.labels[index])
        return self.gather(np.array([index]))[0], label

    def describe(self) -> str:
        """What was found when the set was opened: a few lines for a terminal."""
        found = self._found
        if found is None:
            size = f"{self.image_size[1]}x{self.image_size[0]}"
            modes = Counter({f"{self.channels}-channel": len(self)})
            found = Found("images", Counter({size: len(self)}), modes)
        return describe(
            found, self.image_size, self.channels, self.labels, self.class_names, self.reading
        )

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W), a new tensor, and labels (n,) at int64 ``indices`` (n,)."""
        return self.gather(indices), self.gather_labels(indices)

    def gather(self, indices: np.ndarray) -> Tensor:
        """Images at int64 ``indices`` (n,) in [0, N) as one new tensor (n, C, H, W)."""
        raise NotImplementedError

    def gather_labels(self, indices: np.ndarray) -> Tensor:
        """Labels at ``indices`` as an int64 tensor (n,)."""
        if self.labels is None:
            return torch.full((len(indices),), NO_LABEL, dtype=torch.int64)
        return torch.from_numpy(self.labels[indices])


class ArrayDataset(ImageDataset):
    """Images held in memory.

    Args:
        images: (N, H, W, C) of uint8, uint16 or floats; floats are taken as they are, in [-1, 1],
            and kept as float32. Copied unless they lie in memory as (N, C, H, W).
        **options: the keyword arguments of :class:`ImageDataset`.
    """

    def __init__(
        self,
        images: np.ndarray,
        **options: Any,
    ) -> None:
        if (
            not isinstance(images, np.ndarray)
            or images.ndim != 4
            or not (images.dtype == np.uint8 or is_deep(images.dtype))
        ):
            came = getattr(images, "dtype", type(images).__name__), getattr(images, "shape", "")
            raise InputError(
                f"images are {came[0]} {came[1]}; expected a uint8 array (N, H, W, C), or one of "
                "uint16 or floats in [-1, 1]"
            )
        check_range(images, "images")
        count, height, width, channels = images.shape
        kept = np.float32 if images.dtype.kind == "f" else images.dtype
        planes = np.require(images.transpose(0, 3, 1, 2), kept, ["C", "W"])
        self.images = torch.from_numpy(planes)
        super().__init__(count, (height, width), channels, dtype=self.images.dtype, **options)

    def gather(self, indices: np.ndarray) -> Tensor:
        return self.images[torch.from_numpy(indices)]


def check_bytes(dataset: ImageDataset, purpose: str) -> None:
    """InputError unless the images are of 8 bits. purpose: what needs them to be."""
    if dataset.dtype != torch.uint8:
        raise InputError(
            f"{purpose} needs images of 8 bits (uint8), these are {dataset.dtype}: give 8-bit ones"
        )


def numbers(count: int) -> list[str]:
    """The names of classes that have none: their numbers."""
    return [str(number) for number in range(count)]


def _checked_labels(labels: np.ndarray, count: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise InputError(
            f"labels are {labels.dtype} {labels.shape}; expected class numbers from 0, one for "
            f"each of {count} images"
        )
    return labels.astype(np.int64)
