"""Arrays that a format has read, as a data set."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fastdiff.data.dataset import ArrayDataset
from fastdiff.data.formats.registry import Options
from fastdiff.data.summary import NOT_ASKED, Found
from fastdiff.data.transforms import convert_arrays
from fastdiff.errors import InputError
from fastdiff.images import check_range


def in_memory(
    images: np.ndarray,
    labels: np.ndarray | None,
    class_names: list[str] | None,
    name: str,
    options: Options,
    *,
    numbered: bool = False,
    broken: Sequence[str] = (),
    where_labels: str = "",
) -> ArrayDataset:
    """Images (N, H, W, C) and, where there are classes, labels (N,) and perhaps names as a set.

    name: of the set, for messages. numbered: the names only repeat the numbers.
    broken: a line for every file that was left out. where_labels: for a message, where the format
    has labels, if it need not have any.
    """
    class_cond = options.class_cond
    if class_cond and labels is None:
        raise InputError(f"{name} has no labels, which class_cond needs: {where_labels}")
    no_classes = NOT_ASKED if class_cond is False and labels is not None else ""
    if class_cond is False:
        labels = class_names = None
        numbered = False
    if len(images) == 0:
        raise InputError(f"{name} holds no images")
    count, height, width, found = images.shape
    check_range(images, name)
    kind = f"{found}-channel{_numbers(images)}"
    images = convert_arrays(images, options.image_size, options.channels, name)
    return ArrayDataset(
        images,
        labels=labels,
        class_names=class_names,
        numbered=numbered,
        random_flip=options.random_flip,
        found=Found(
            name.strip("'"),
            sizes=Counter({f"{width}x{height}": count}),
            modes=Counter({kind: count}),
            no_classes=no_classes,
            broken=list(broken),
        ),
    )


def _numbers(images: np.ndarray) -> str:
    """What to say of numbers that are no bytes: their range shows floats that were never scaled."""
    if images.dtype == np.uint8:
        return ""
    return f" {images.dtype} from {images.min():g} to {images.max():g}"
