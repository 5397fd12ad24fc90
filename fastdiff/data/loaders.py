"""Endless batches of what has an order of its own: DataLoaders and iterable data sets."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from fastdiff.data.items import Sample, as_sample, collated
from fastdiff.data.private_random import PrivateRandom, set_seed, set_state
from fastdiff.data.processes import begun, unreadable
from fastdiff.data.stream import part_of_batch
from fastdiff.data.words import READER, words
from fastdiff.errors import InputError


class LoaderStream:
    """Batches (x, the network's arguments) of a DataLoader, an IterableDataset or any iterable.

    A DataLoader's batches are taken as they come; of several ranks each has its own, of
    ``batch_size / world_size`` samples, and which ones is the loader's matter (torch's
    DistributedSampler, webdataset's split_by_node). Of items that are no batches yet, an
    IterableDataset's or an iterable's, rank r takes the r-th slice of each ``batch_size`` in a row,
    so that a batch is the same on any number of ranks; every rank reads all of them. What is left
    at the end of an epoch and fills no batch is left out, and the next epoch begins: ``set_epoch``
    tells a loader, its sampler or a set that has one. What they draw at random in this process
    (torch's, numpy's and Python's global generators) follows from ``seed`` and the epoch, and
    leaves the caller's generators alone.

    ``position`` counts batches. Set on a new stream, it reads on to there; where ``state_dict`` has
    an answer, as of torchdata's StatefulDataLoader, ``load_state_dict`` begins there.

    Args: as :class:`fastdiff.data.BatchStream`'s; with ``workers`` an IterableDataset is read by
        one process (more would each read all of it), a DataLoader has its own.

    Raises InputError for batches of another size, for data that ends before its first batch, for
    items that are no samples, and what reading raises as ``BatchStream`` does.
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
        self.mine = part_of_batch(batch_size, rank, world_size)
        self.data, self.rank, self.workers, self.pin = data, rank, workers, pin_memory
        self.batch_size, self.share, self.seed = batch_size, batch_size // world_size, seed
        self.is_loader = isinstance(data, DataLoader)
        self.stateful = self.is_loader and hasattr(data, "load_state_dict")
        if world_size > 1:
            _check_shared(data)
        self.epoch = 0
        self._position = 0
        self._to_skip = 0  # batches, before the first
        self._random = PrivateRandom()
        self._batches: Iterator[Sample] | None = None
        self._last: Sample | None = None
        self._again = False  # the last batch is the next one too
        self._resumed: dict[str, Any] | None = None  # where the next epoch begins

    @property
    def position(self) -> int:
        """Batches drawn so far; setting it moves the stream."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if position == self._position - 1 and self._last is not None and not self._again:
            self._position, self._again = position, True  # the step that it was for failed
        elif position != self._position:
            self._position = position
            self.close()

    def state_dict(self) -> dict[str, Any] | None:
        """Where the loader is; None where it does not say. For ``load_state_dict``."""
        if not self.stateful:
            return None
        if self._batches is None:
            return self._resumed
        return {
            "epoch": self.epoch,
            "loader": self.data.state_dict(),  # type: ignore[union-attr]
            "random": self._random.state_dict(),
            "next": self._last if self._again else None,
        }

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """Go on where ``state_dict`` was asked, after ``position`` batches."""
        self.close()
        self._resumed, self.epoch = state, state["epoch"]
        self._position, self._to_skip = position, 0
        self._last, self._again = state["next"], state["next"] is not None

    def __iter__(self) -> "LoaderStream":
        return self

    def __next__(self) -> Sample:
        if not self._again:
            with self._random:
                self._last = self._read()
        self._again = False
        self._position += 1
        assert self._last is not None
        return self._last

    def _read(self) -> Sample:
        try:
            if self._batches is None:
                self._batches = self._endless()
                for _ in range(self._to_skip):
                    next(self._batches)
                self._to_skip = 0
            return next(self._batches)
        except Exception as error:
            found = unreadable("a batch of the data", error)
            error.__traceback__ = None  # its frames would keep the workers alive
            self.close()
            raise found from None

    def close(self) -> None:
        """End the workers. A stream that is used again reads on to where it was."""
        if self._batches is not None and self.stateful:
            self.data.load_state_dict({})  # type: ignore[union-attr]  # lets its iterator go
        self._batches, self._last, self._again, self._resumed = None, None, False, None
        self.epoch, self._to_skip = 0, self._position

    def _endless(self) -> Iterator[Sample]:
        while True:
            rank = self.rank if self.is_loader else 0  # a set's items are the same on all ranks
            set_seed(int(words(self.seed, self.epoch, READER + rank, 1)[0]))
            self._tell_epoch()
            found = self._resumed is not None
            for batch in self._of_loader() if self.is_loader else self._of_items():
                found = True
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

    def _of_loader(self) -> Iterator[Sample]:
        loader: Any = self.data
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            loader.load_state_dict(resumed["loader"])
        batches = begun(loader)
        if resumed is not None:
            set_state(resumed["random"])
        for number, batch in enumerate(batches):
            sample = as_sample(batch)
            size = sample[0].shape[0] if sample[0].dim() else 0
            if size > self.share or (size < self.share and number == 0 and resumed is None):
                raise InputError(
                    f"a batch of the loader has {size} samples; expected {self.share}, this rank's "
                    f"part of batch_size {self.batch_size}"
                )
            if size == self.share:
                yield sample

    def _of_items(self) -> Iterator[Sample]:
        slices = _Slices(self.data, self.batch_size, self.mine)
        in_process = self.workers and isinstance(self.data, IterableDataset)
        loader: DataLoader = DataLoader(
            slices, batch_size=None, num_workers=1 if in_process else 0, pin_memory=self.pin
        )
        for sample in begun(loader):
            if isinstance(sample, Exception):
                raise sample
            yield sample


class _Slices(IterableDataset):
    """The part ``mine`` of each ``count`` items in a row. An error is an answer, as one that a
    worker raises would reach the user as a page of text."""

    def __init__(self, items: Iterable[Any], count: int, mine: slice) -> None:
        self.items, self.count, self.mine = items, count, mine

    def __iter__(self) -> Iterator[Sample | Exception]:
        first = 0
        try:
            items = iter(self.items)
            while len(whole := list(itertools.islice(items, self.count))) == self.count:
                names = range(first, first + self.count)[self.mine]
                yield collated([as_sample(item) for item in whole[self.mine]], names)
                first += self.count
        except Exception as error:
            yield unreadable(f"a batch from item {first} of the data on", error)


def _check_shared(data: Any) -> None:
    """InputError for a DataLoader that would give every rank the same samples, or any."""
    if type(getattr(data, "sampler", None)) in (SequentialSampler, RandomSampler):
        raise InputError(
            "the DataLoader does not know of the other ranks: give it a sampler of torch's "
            "DistributedSampler, or give the data set itself, which is then shared out"
        )
