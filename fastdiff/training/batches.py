"""Where a run's batches come from: any kind of data, as x and the network's arguments."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fastdiff.data import BatchStream, ImageDataset, Items
from fastdiff.data.loaders import LoaderStream
from fastdiff.errors import InputError
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


def size_of(data: Any) -> int | None:
    """How many items there are, where that can be known."""
    items = data.dataset if isinstance(data, DataLoader) else data
    return len(items) if hasattr(items, "__len__") else None


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
    shape = list(data[0][0].shape)
    return {"channels": shape[0], "image_size": shape[1:]} if len(shape) > 1 else {}
