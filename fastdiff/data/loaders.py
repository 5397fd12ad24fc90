"""Endless batches of what has an order of its own: DataLoaders and iterable data sets."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from fastdiff.data.items import Sample, as_sample, collated
from fastdiff.data.words import LOADER, words
from fastdiff.errors import InputError


class LoaderStream:
    """Batches (x, the network's arguments) of a DataLoader, an IterableDataset or any iterable.

    A DataLoader's batches are taken as they come; of several ranks each has its own, of
    ``batch_size / world_size`` samples, and which ones is the loader's matter (torch's
    DistributedSampler, webdataset's split_by_node). Of items that are no batches yet, an
    IterableDataset's or an iterable's, rank r takes the r-th slice of each ``batch_size`` in a row,
    so that a batch is the same on any number of ranks; every rank reads all of them. What is left
    at the end of an epoch and fills no batch is left out, and the next epoch begins: ``set_epoch``
    tells a loader, its sampler or a set that has one. torch's own generator, by which loaders
    shuffle and torchvision augments, is seeded before each batch, by ``seed`` and its number.

    ``position`` counts batches. Set on a stream that is new, it reads on to there; a loader that
    has ``state_dict`` and ``load_state_dict``, as torchdata's StatefulDataLoader, begins there.

    Args: as :class:`fastdiff.data.BatchStream`'s; ``workers`` are of an IterableDataset, a
        DataLoader has its own.

    Raises InputError for batches of another size, for data that ends before its first batch, and
    for items that are no samples.
    """

    def __init__(
        self,
        data: DataLoader | IterableDataset | Iterable[Any],
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise InputError(
                f"batch_size is {batch_size}, expected a positive multiple of world_size "
                f"({world_size})"
            )
        self.data, self.rank, self.workers, self.pin = data, rank, workers, pin_memory
        self.seed = seed
        self.batch_size, self.share = batch_size, batch_size // world_size
        self.is_loader = isinstance(data, DataLoader) or hasattr(data, "load_state_dict")
        self.epoch = 0
        self._position = 0
        self._to_skip = 0  # batches, before the first
        self._batches: Iterator[Sample] | None = None
        self._last: Sample | None = None
        self._again = False  # the last batch is the next one too

    @property
    def position(self) -> int:
        """Batches drawn so far; setting it moves the stream."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if position == self._position - 1 and self._last is not None and not self._again:
            self._again = True  # the step that it was for failed
        elif position != self._position:
            self.close()
            self.epoch, self._to_skip = 0, position
        self._position = position

    def state_dict(self) -> dict[str, Any] | None:
        """What the loader says of where it is, or None where it says nothing."""
        if not hasattr(self.data, "state_dict"):
            return None
        return {"epoch": self.epoch, "loader": self.data.state_dict()}

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """Go on where ``state_dict`` was asked, after ``position`` batches."""
        self.close()
        self.data.load_state_dict(state["loader"])  # type: ignore[union-attr]
        self.epoch, self._position, self._to_skip = state["epoch"], position, 0

    def __iter__(self) -> "LoaderStream":
        return self

    def __next__(self) -> Sample:
        if not self._again:
            self._last = self._read()
        self._again = False
        self._position += 1
        assert self._last is not None
        return self._last

    def _read(self) -> Sample:
        if self._batches is None:
            self._batches = self._endless()
            for number in range(self._to_skip):
                self._draw(self._batches, number)
            self._to_skip = 0
        return self._draw(self._batches, self._position)

    def _draw(self, batches: Iterator[Sample], number: int) -> Sample:
        torch.manual_seed(int(words(self.seed, number, LOADER, 1)[0]))
        return next(batches)

    def close(self) -> None:
        """End the workers. A stream that is used again begins at its first batch."""
        self._batches, self._last, self._again = None, None, False

    def _endless(self) -> Iterator[Sample]:
        while True:
            self._tell_epoch()
            found = 0
            for found, batch in enumerate(self._epoch(), 1):  # noqa: B007
                yield batch
            if not found:
                raise InputError(
                    f"the data of rank {self.rank} ended before a batch of {self.share} in epoch "
                    f"{self.epoch}: an iterator can be read once only, give what iter() begins anew"
                )
            self.epoch += 1

    def _tell_epoch(self) -> None:
        of_loader = (getattr(self.data, name, None) for name in ("sampler", "dataset"))
        for part in (self.data, *of_loader):
            tell: Any = getattr(part, "set_epoch", None)
            if tell is not None:
                tell(self.epoch)

    def _epoch(self) -> Iterator[Sample]:
        if self.is_loader:
            for batch in self.data:  # type: ignore[union-attr]
                sample = as_sample(batch)
                if len(sample[0]) == self.share:
                    yield sample
                elif len(sample[0]) > self.share:
                    raise InputError(
                        f"a batch of the loader has {len(sample[0])} samples; expected "
                        f"{self.share}, this rank's part of batch_size {self.batch_size}"
                    )
            return
        items = iter(self._items())
        first = self.rank * self.share
        for number in itertools.count():
            whole = list(itertools.islice(items, self.batch_size))
            if len(whole) < self.batch_size:
                return
            mine = slice(first, first + self.share)
            names = range(number * self.batch_size, (number + 1) * self.batch_size)[mine]
            yield collated([as_sample(item) for item in whole[mine]], names)

    def _items(self) -> Iterable[Any]:
        if self.workers and isinstance(self.data, IterableDataset):
            return DataLoader(
                self.data, batch_size=None, num_workers=self.workers, generator=torch.Generator()
            )
        return self.data
