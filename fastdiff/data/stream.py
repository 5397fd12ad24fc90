"""The order in which images are drawn: endless for training, once for evaluation.

Everything about batch k follows from (seed, k): the order of an epoch from (seed, epoch), a flip
from (seed, epoch, image). So one integer resumes a stream, on any number of workers and ranks.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastdiff.data.dataset import ImageDataset
from fastdiff.data.items import Items
from fastdiff.data.processes import begun, unreadable
from fastdiff.data.words import FLIPS, ITEMS, ORDER, words
from fastdiff.errors import InputError

Batch = tuple[Tensor, Any]
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]  # of a batch's samples: indices, flips, seeds


class BatchStream:
    """Endless batches: of an :class:`ImageDataset` (images (n, C, H, W) of the set's dtype, int64
    labels (n,)), of :class:`Items` (x (n, ...), a dict of the network's arguments).

    Epochs follow each other without a gap, inside a batch too, so after e epochs every image has
    been drawn exactly e times, whatever the batch size. ``position`` is the number of batches
    drawn; a stream made (or set) at position k goes on exactly as one that drew k batches. What a
    set draws at random for a sample (torch's, numpy's and Python's global generators) follows from
    the seed and the sample's number in the run, and leaves the caller's generators alone.

    Args:
        dataset: what is drawn from.
        batch_size: images of the global batch; rank r of ``world_size`` gets the r-th slice of
            batch_size / world_size images.
        random_flip: mirror every image with probability 1/2, anew in each epoch; None does what the
            data set says.
        seed: of the order and of the flips.
        position: batches that count as drawn already.
        workers: processes that prepare batches ahead; 0 prepares them in the caller.
        rank: of this process, 0 … world_size − 1.
        world_size: how many processes share each batch.
        pin_memory: page-locked batches, for copies to a GPU that do not wait.

    Raises InputError for arguments that make no sense; what reading an item raises, as InputError
    or OSError in one line; OSError when a worker is gone.
    """

    def __init__(
        self,
        dataset: ImageDataset | Items,
        batch_size: int,
        *,
        seed: int = 0,
        random_flip: bool | None = None,
        position: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        mine = part_of_batch(batch_size, rank, world_size)
        if seed < 0 or workers < 0:
            raise InputError(f"seed {seed} and workers {workers} must not be negative")
        if pin_memory and not torch.cuda.is_available():
            raise InputError("pin_memory needs a CUDA device, and there is none")
        self.dataset = dataset
        self.batch_size = batch_size
        self.workers = workers
        flip = dataset.random_flip if random_flip is None else random_flip
        self._order = _Order(len(dataset), batch_size, mine, seed, flip)
        self._pin = pin_memory
        self._loading: Iterator[Any] | None = None
        self.position = position

    @property
    def position(self) -> int:
        """Batches drawn so far; setting it moves the stream."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if position < 0:
            raise InputError(f"position is {position}, expected a number of batches")
        self._position = position
        self._loading = None  # what was prepared is of other positions

    @property
    def epoch(self) -> float:
        """How often every image has been drawn on average."""
        return self._position * self.batch_size / len(self.dataset)

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        try:
            if self._loading is None:
                self._loading = begun(self._loader())
            batch = next(self._loading)
        except (RuntimeError, OSError, EOFError) as error:  # a worker is gone
            batch = unreadable("a batch", error)
        if isinstance(batch, Exception):
            self._loading = None  # what follows it in the workers is lost
            raise batch
        self._position += 1
        return batch

    def close(self) -> None:
        """End the workers; the stream can still be used and starts them again."""
        self._loading = None

    def _loader(self) -> DataLoader:
        """The batches from ``position`` on."""
        drawn = map(self._order, itertools.count(self.position))
        return DataLoader(
            _Loaded(self.dataset),
            batch_size=None,
            sampler=drawn,  # type: ignore[arg-type]  # any iterable will do
            num_workers=self.workers,
            pin_memory=self._pin,
            generator=torch.Generator(),  # else it draws from everybody's
        )


class _Order:
    """What each batch of a :class:`BatchStream` is made of. Apart from the stream, so that its
    workers end with it: those of a loader in a cycle of references do not end by themselves."""

    def __init__(
        self, count: int, batch_size: int, mine: slice, seed: int, random_flip: bool
    ) -> None:
        self.count, self.batch_size, self.mine = count, batch_size, mine
        self.seed, self.random_flip = seed, random_flip
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, position: int) -> Drawn:
        """This rank's part of batch ``position``."""
        first = position * self.batch_size
        numbers = np.arange(first, first + self.batch_size)[self.mine]
        epochs, offsets = np.divmod(numbers, self.count)
        indices = np.empty(len(numbers), np.int64)
        flips = np.zeros(len(numbers), bool)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order, flipped = self._epoch(int(epoch))
            indices[here] = order[offsets[here]]
            if self.random_flip:
                flips[here] = flipped[indices[here]]
        return indices, flips, words(self.seed, position, ITEMS, self.batch_size)[self.mine]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            # Sorting raw words, not Generator.permutation: numpy may change the latter's stream,
            # and a run has to resume the same way under a newer numpy.
            order = np.argsort(words(self.seed, epoch, ORDER, self.count), kind="stable")
            flips = words(self.seed, epoch, FLIPS, self.count) >> np.uint64(63) == 1
            self._epochs[epoch] = order, flips
        return self._epochs[epoch]


class _Loaded(torch.utils.data.Dataset):
    """Batches by what they are made of, for DataLoader. An error is an answer: one that a worker
    raises would reach the user as a page of text."""

    def __init__(self, dataset: ImageDataset | Items) -> None:
        self.dataset = dataset

    def __getitem__(self, drawn: Drawn) -> Batch | Exception:
        indices, flips, seeds = drawn
        try:
            own = (seeds,) if isinstance(self.dataset, Items) else ()
            images, others = self.dataset.batch(indices, *own)
        except Exception as error:
            return unreadable("a batch of the data set", error)
        if flips.any():
            mirrored = torch.from_numpy(flips)
            for value in (images, *pictures_in(others, images.dim())):
                # torch mirrors no uint16; int16 has the same bits.
                bits = value.view(torch.int16) if value.dtype == torch.uint16 else value
                bits[mirrored] = bits[mirrored].flip(-1)
        return images, others


def pictures_in(others: Any, axes: int) -> list[torch.Tensor]:
    """Of the network's arguments those with as many axes as x: what lies beside it is mirrored with
    it, a picture of low resolution, a mask."""
    given = others.values() if isinstance(others, dict) else (others,)
    return [value for value in given if value.dim() == axes]


def iterate_once(
    dataset: ImageDataset, batch_size: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Every image once and unflipped, in the set's order; the last batch may be smaller.

    Batches of ``batch_size`` images of the ``dataset`` are as :class:`BatchStream`'s. Rank r of
    ``world_size`` gets images r, r + world_size, r + 2·world_size, … Raises InputError for a size
    or a rank that makes no sense.
    """
    _check_rank(rank, world_size)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected a positive number")
    indices = np.arange(rank, len(dataset), world_size)
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        yield dataset.batch(part)


def part_of_batch(batch_size: int, rank: int, world_size: int) -> slice:
    """The samples of a batch that are rank ``rank``'s. InputError for what cannot be shared so."""
    _check_rank(rank, world_size)
    if batch_size < 1 or batch_size % world_size:
        raise InputError(
            f"batch_size is {batch_size}, expected a positive multiple of world_size ({world_size})"
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} of world_size {world_size}, expected 0 <= rank < world_size")
