"""Items of any torch data set as what a network is trained on: x and keyword arguments.

An item is x alone, (x, label), or a dict of x and what else the network is given.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import InputError, first_line

# What x and a label are called in a dict, the first that is there: ours, torchvision's and Hugging
# Face's usual words.
X_NAMES = ("x", "image", "images", "img", "pixel_values", "audio", "data")
LABEL_NAMES = ("y", "label", "labels", "class_label", "class_labels", "fine_label")

Sample = tuple[Tensor, dict[str, Tensor]]


class Items:
    """A map-style data set (``len(data)``, ``data[i]``), read in batches.

    Args:
        data: a ``torch.utils.data.Dataset``, a Hugging Face ``datasets.Dataset``, a list. An item
            is x, (x, label), or a dict. x: a tensor or an array (C, ...), or a picture of Pillow's;
            uint8 and uint16 are scaled to [-1, 1] in training, floats are taken as they are.
        x: of items that are dicts, the name of x; None: the first of ``X_NAMES`` that is there.
        label: likewise, of the label; None: the first of ``LABEL_NAMES``, if there is one.
        random_flip: mirror the last axis at random in training, unless the trainer is told.

    A label is the network's argument ``y``. What else a dict holds is given to the network by its
    name, where x and label are not named; where they are, nothing else is. An argument with as many
    axes as x, such as a ``low_res``, is mirrored with it, and scaled where it is uint8.

    Raises InputError for a set without items or without ``len``, and in ``batch`` for an item that
    is no sample, and for samples of different shapes.
    """

    def __init__(
        self,
        data: Any,
        *,
        x: str | None = None,
        label: str | None = None,
        random_flip: bool = False,
    ) -> None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise InputError(
                f"a {type(data).__name__} has no len() or no items; expected a map-style data set"
            )
        if len(data) == 0:
            raise InputError("the data set holds no items")
        self.data, self.x, self.label, self.random_flip = data, x, label, random_flip

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        return as_sample(self.data[index], self.x, self.label)

    def batch(self, indices: np.ndarray) -> Sample:
        """x (n, ...), a new tensor, and the network's arguments (n, ...) at ``indices`` (n,)."""
        several = getattr(self.data, "__getitems__", None)
        numbers = [int(index) for index in indices]
        items = several(numbers) if several else [self.data[index] for index in numbers]
        return collated([as_sample(item, self.x, self.label) for item in items], numbers)


def as_sample(item: Any, x: str | None = None, label: str | None = None) -> Sample:
    """An item as (x, the network's arguments): see :class:`Items`."""
    if isinstance(item, Mapping):
        return _of_dict(item, x, label)
    if isinstance(item, tuple | list):
        if len(item) == 1:  # as TensorDataset has them
            return as_tensor(item[0], "x"), {}
        if len(item) != 2:
            raise InputError(
                f"an item of the data set has {len(item)} parts; expected x, (x, label), or a dict "
                "of x and the network's arguments"
            )
        return as_tensor(item[0], "x"), {"y": as_tensor(item[1], "label")}
    return as_tensor(item, "x"), {}


def _of_dict(item: Mapping[str, Any], x: str | None, label: str | None) -> Sample:
    names = [name for name in X_NAMES if name in item] if x is None else [x]
    if not names or names[0] not in item:
        expected = f"{x!r}" if x else "one of " + ", ".join(X_NAMES)
        raise InputError(
            f"an item of the data set has {', '.join(map(repr, item))}; expected {expected}, the x "
            "that is trained on: fastdiff.data.Items(data, x=...) names it"
        )
    labels = [name for name in LABEL_NAMES if name in item] if label is None else [label]
    if label is not None and label not in item:
        raise InputError(f"an item of the data set has no {label!r}, which is to be its label")
    named = x is not None or label is not None
    kwargs = {} if named else {k: v for k, v in item.items() if k not in (names[0], *labels[:1])}
    if labels:
        kwargs["y"] = item[labels[0]]
    return as_tensor(item[names[0]], names[0]), {k: as_tensor(v, k) for k, v in kwargs.items()}


def as_tensor(value: Any, name: str) -> Tensor:
    """A tensor, an array, a number, or a picture of Pillow's as (C, H, W) of its own depth."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "getbands"):  # a picture: Pillow need not be there for the others
        value = _pixels(value)
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name!r} of an item is a {type(value).__name__} and no tensor, array, number or "
            f"picture ({first_line(error)}); fastdiff.data.Items(data, x=..., label=...) takes "
            "what it names and leaves the rest"
        ) from None


def _pixels(picture: Any) -> np.ndarray:
    if picture.mode in ("1", "LA"):
        picture = picture.convert("L")
    elif picture.mode not in ("L", "RGB", "I;16"):
        picture = picture.convert("RGB")
    array = np.array(picture)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def collated(samples: Sequence[Sample], names: Sequence[Any]) -> Sample:
    """Samples as one batch; ``names`` say which they are, for messages."""
    first = samples[0]
    for name, sample in zip(names, samples, strict=True):
        if sample[1].keys() != first[1].keys():
            raise InputError(
                f"item {name} has the arguments {sorted(sample[1])}, item {names[0]} has "
                f"{sorted(first[1])}; expected the same of every item"
            )
        for part, value in {"x": sample[0], **sample[1]}.items():
            other = first[0] if part == "x" else first[1][part]
            if value.shape != other.shape or value.dtype != other.dtype:
                raise InputError(
                    f"{part} of item {name} is {tuple(value.shape)} {value.dtype}, of item "
                    f"{names[0]} {tuple(other.shape)} {other.dtype}; expected one shape and dtype"
                )
    kwargs = {part: torch.stack([sample[1][part] for sample in samples]) for part in first[1]}
    return torch.stack([sample[0] for sample in samples]), kwargs
