"""Items of any torch data set as what a network is trained on: x and keyword arguments.

An item is x alone or (x,), (x, label), or a dict of x and what else the network is given.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.private_random import left_alone, set_seed
from fastdiff.data.processes import unreadable
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
            is x, (x,), (x, label), or a dict. x: a tensor or an array (C, ...), or a picture of
            Pillow's; uint8 and uint16 are scaled to [-1, 1] in training, floats are taken as they
            are.
        x: of items that are dicts, the name of x; None: the first of ``X_NAMES`` that is there.
        label: likewise, of the label; None: the first of ``LABEL_NAMES``, if there is one.
        random_flip: mirror the last axis at random in training, unless the trainer is told.

    A label is the network's argument ``y``, int64 where it is a whole number. What else a dict
    holds is given to the network by its name, where x and label are not named; where they are,
    nothing else is. An argument with as many axes as x, such as a ``low_res``, is mirrored with it,
    and scaled where it has integers.

    Raises InputError for a set without items or without ``len``, and in ``batch`` for an item that
    is no sample or cannot be read, and for samples of different shapes; OSError for a file.
    """

    def __init__(
        self,
        data: Any,
        *,
        x: str | None = None,
        label: str | None = None,
        random_flip: bool = False,
    ) -> None:
        if isinstance(data, Mapping):
            names = ", ".join(map(repr, list(data)[:5]))
            raise InputError(
                f"a {type(data).__name__} of {names} is no data set: give one of its parts"
            )
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise InputError(
                f"a {type(data).__name__} has no len() or no items; expected a map-style data set"
            )
        if len(data) == 0:
            raise InputError("the data set holds no items")
        self.data, self.x, self.label, self.random_flip = data, x, label, random_flip

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def _first(self) -> tuple[torch.Size, torch.dtype]:
        x, _ = self.batch(np.array([0]))
        return x.shape[1:], x.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x of the first item."""
        return tuple(self._first[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of x of the first item."""
        return self._first[1]

    def batch(self, indices: np.ndarray, seeds: np.ndarray | None = None) -> Sample:
        """x (n, ...), a new tensor, and the network's arguments (n, ...) at ``indices`` (n,).

        seeds: uint64 (n,), of what the set draws at random for each item (a set that reads several
        items at once draws from the first one's); by default their indices.
        """
        seeds = indices if seeds is None else seeds
        numbers = [int(index) for index in indices]
        with left_alone():
            if getattr(self.data, "__getitems__", None):
                samples = self._read(numbers, int(seeds[0]))
            else:
                pairs = zip(numbers, seeds, strict=True)
                samples = [one for n, seed in pairs for one in self._read([n], int(seed))]
        return collated(samples, numbers)

    def _read(self, numbers: list[int], seed: int) -> list[Sample]:
        set_seed(seed)
        try:
            several = getattr(self.data, "__getitems__", None)
            items = several(numbers) if several else [self.data[n] for n in numbers]
            return [as_sample(item, self.x, self.label) for item in items]
        except Exception as error:
            which = f"item {numbers[0]}" if len(numbers) == 1 else f"one of the items {numbers}"
            raise unreadable(f"{which} of the data set", error) from error


def as_sample(item: Any, x: str | None = None, label: str | None = None) -> Sample:
    """An item as (x, the network's arguments): see :class:`Items`."""
    if isinstance(item, Mapping):
        return _of_dict(item, x, label)
    if isinstance(item, tuple | list):
        if len(item) not in (1, 2):
            raise InputError(
                f"an item of the data set has {len(item)} parts; expected x, (x, label), or a dict "
                "of x and the network's arguments"
            )
        x_of_item, *labels = item
        return as_tensor(x_of_item, "x"), {"y": _label(labels[0], "label")} if labels else {}
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
    arguments = {name: as_tensor(value, name) for name, value in kwargs.items()}
    if labels:
        arguments["y"] = _label(item[labels[0]], labels[0])
    return as_tensor(item[names[0]], names[0]), arguments


def _label(value: Any, name: str) -> Tensor:
    """Whole numbers as int64: what an embedding takes, whatever the set counts in."""
    label = as_tensor(value, name)
    return label if label.is_floating_point() else label.long()


def as_tensor(value: Any, name: str) -> Tensor:
    """A tensor, an array, a number, or a picture of Pillow's as (C, H, W) of its own depth."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "getbands"):  # a picture: Pillow need not be there for the others
        value = _pixels(value)
    try:
        if isinstance(value, np.ndarray):  # as torch takes it: of this machine, not read-only
            value = np.require(value, value.dtype.newbyteorder("="), ["C", "W"])
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name!r} of an item is a {type(value).__name__} and no tensor, array, number or "
            f"picture ({first_line(error)}); leave it out of the items: of a map-style set, "
            "fastdiff.data.Items(data, x=..., label=...) takes what it names and leaves the rest"
        ) from None


def _pixels(picture: Any) -> np.ndarray:
    """(C, H, W): uint8, uint16 of 16-bit greyscale, float32 of Pillow's mode F."""
    if picture.mode in ("1", "LA"):
        picture = picture.convert("L")
    deep = picture.mode == "I" or picture.mode.startswith("I;16")
    if not deep and picture.mode not in ("L", "RGB", "F"):
        picture = picture.convert("RGB")
    array = np.array(picture)
    if deep:
        if array.min() < 0 or array.max() > 65535:
            raise InputError(
                f"a picture has values from {array.min()} to {array.max()}; expected 8 or 16 bits"
            )
        array = array.astype(np.uint16)
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
