"""Where a run's batches come from: any kind of data, as x and the network's arguments."""

import os
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fastdiff.data import BatchStream, ImageDataset, Items
from fastdiff.data.loaders import LoaderStream
from fastdiff.errors import InputError
from fastdiff.images import HALF_RANGES, MODES
from fastdiff.ranks import Ranks
from fastdiff.training.config import TrainConfig

Batch = tuple[Tensor, dict[str, Tensor]]


class Batches(Protocol):
    """A rank's batches, endless."""

    position: int  # batches drawn, of all ranks; setting it moves the stream

    def __next__(self) -> Any: ...
    def close(self) -> None: ...


def readable(data: Any) -> Any:
    """``data`` as one of the kinds that ``batches_of`` reads: an ImageDataset, Items, a DataLoader
    or an IterableDataset. InputError for what is none."""
    if isinstance(data, ImageDataset | Items | DataLoader | IterableDataset):
        return data
    if isinstance(data, str | os.PathLike):
        raise InputError(
            f"Trainer trains on a data set, {data!r} is a name: fastdiff.data.load_dataset reads it"
        )
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return Items(data)
    if hasattr(data, "__iter__"):
        return data
    raise InputError(
        f"Trainer cannot train on a {type(data).__name__}: expected a fastdiff.data.ImageDataset, "
        "a torch Dataset, IterableDataset or DataLoader, or a Hugging Face datasets.Dataset"
    )


def batches_of(data: Any, config: TrainConfig, ranks: Ranks, device: torch.device) -> Batches:
    """This rank's share of the batches of ``data``, as ``readable`` gave it."""
    pin = device.type == "cuda"
    if isinstance(data, ImageDataset | Items):
        return BatchStream(
            data,
            config.batch_size,
            seed=config.seed,
            random_flip=config.flip or (isinstance(data, Items) and data.random_flip),
            workers=config.workers,
            rank=ranks.rank,
            world_size=ranks.count,
            pin_memory=pin,
        )
    return LoaderStream(
        data,
        config.batch_size,
        seed=config.seed,
        workers=config.workers,
        rank=ranks.rank,
        world_size=ranks.count,
        pin_memory=pin,
    )


def form_of(batch: Any) -> dict[str, str]:
    """The shape and dtype of x and of each of the network's arguments."""
    x, given = batch
    parts = {"y": given} if isinstance(given, Tensor) else given
    return {n: f"{tuple(v.shape)} {v.dtype}" for n, v in {"x": x, **parts}.items()}


def first_difference(form: dict[str, str], other: dict[str, str]) -> tuple[str, str, str]:
    """The first part that two forms differ in, and what it is in each."""
    name = next(n for n in {**form, **other} if other.get(n) != form.get(n))
    return name, form.get(name, "missing"), other.get(name, "missing")


class Form:
    """What all batches of a run have in common: the form of the first, which is looked at."""

    def __init__(self) -> None:
        self.first: dict[str, str] | None = None

    def checked(self, batch: Any) -> Any:
        """``batch``. InputError where it cannot be trained on, or is not as those before."""
        form = form_of(batch)
        if self.first is None:
            _look(batch[0])
            self.first = form
        if form != self.first:
            name, before, now = first_difference(self.first, form)
            raise InputError(
                f"{name} of a batch is {now}, it was {before} before; expected one shape and dtype "
                "in a run"
            )
        return batch


def _look(x: Tensor) -> None:
    """InputError for what cannot be x (n, C, ...); a warning for floats that should be scaled."""
    shape = tuple(x.shape)
    if x.dtype not in HALF_RANGES and not x.is_floating_point():
        raise InputError(f"x of a batch is {x.dtype} {shape}; expected uint8, uint16 or floats")
    if x.dim() < 2:
        raise InputError(f"x of a batch has shape {shape}; expected (n, C, ...)")
    if x.dtype in HALF_RANGES and x.dim() == 4 and shape[3] in MODES and shape[1] not in MODES:
        raise InputError(
            f"x of a batch has shape {shape}, channels last; expected (n, C, H, W): give items "
            "that are transposed to (C, H, W)"
        )
    if x.is_floating_point() and x.min() >= 0:
        high = float(x.max())
        scales = {"[0, 1]": (0.5, 1, "2 * x - 1"), "[0, 255]": (128, 255, "x / 127.5 - 1")}
        for name, (low, top, remedy) in scales.items():
            if low < high <= top:
                warnings.warn(
                    f"x of the first batch is floats in {name} and trained on as it is; if these "
                    f"are pictures, give {remedy}, in [-1, 1], or uint8",
                    RuntimeWarning,
                    stacklevel=2,
                )


def size_of(data: Any) -> int | None:
    """How many items there are, where that can be known."""
    items: Any = data.dataset if isinstance(data, DataLoader) else data
    try:
        return len(items)
    except (TypeError, NotImplementedError):
        return None


def describe(data: Any) -> dict[str, Any]:
    """What a checkpoint records about the data."""
    if isinstance(data, ImageDataset):
        return {
            "image_size": list(data.image_size),
            "channels": data.channels,
            "num_classes": data.num_classes,
            "class_names": data.class_names,
        }
    if not isinstance(data, Items):
        return {}
    shape = list(data.shape)
    return {"channels": shape[0], "image_size": shape[1:]} if len(shape) > 1 else {}
