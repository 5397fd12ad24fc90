"""What a step begins with: this rank's part of the batch, and what is drawn for it."""

import functools
import zlib
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastdiff.data.stream import part_of_batch
from fastdiff.data.words import HIDDEN_LABELS, NETWORK, uniform, words
from fastdiff.errors import InputError
from fastdiff.images import to_float
from fastdiff.ranks import Ranks
from fastdiff.training import network
from fastdiff.training.batches import Batch, Batches, Form, first_difference, form_of
from fastdiff.training.config import TrainConfig
from fastdiff.training.low_res import LowRes


class Feed:
    """The batches of ``stream`` on ``device``, with labels hidden and small images made.

    Attributes:
        label: the name by which a step is given labels; None: it takes none.
        low_res: how a super-resolution network is given its small images.
        last: the batch as it was read last.
        first_sample: the number, in its batch, of this rank's first sample.
    """

    def __init__(
        self,
        stream: Batches,
        model: nn.Module,
        label: str | None,
        config: TrainConfig,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.stream, self.config, self.ranks, self.device = stream, config, ranks, device
        self.label = label
        self.null_label: Any = getattr(model, "null_label", None)
        self.form = Form()
        self.last: Any = None
        self._mine = part_of_batch(config.batch_size, ranks.rank, ranks.count)
        self.first_sample = self._mine.start
        self.low_res = LowRes(config)

    def next_batch(self, step: int) -> Batch:
        """x (n, ...) in floats, images in [-1, 1], and the network's arguments, on the device."""
        x, given = self.last = self._read(step)
        x_start = to_float(x.to(self.device, non_blocking=True))
        if x_start.dim() == 4:
            x_start = x_start.contiguous(memory_format=torch.channels_last)
        kwargs = network.arguments_of(given, self.label)
        kwargs = network.on(self.device, kwargs, x_start.dim())
        if self.config.label_dropout and self.label in kwargs:
            hidden = self.uniform(step, HIDDEN_LABELS) < self.config.label_dropout
            kwargs[self.label] = torch.where(hidden, self.null_label, kwargs[self.label])
        draw = functools.partial(self.uniform, step)
        kwargs |= self.low_res.drawn(x_start, draw, step, self.first_sample)
        return x_start, kwargs

    def uniform(self, step: int, purpose: int) -> Tensor:
        """This rank's numbers in [0, 1) of that step, float64, on the device."""
        found = uniform(self.config.seed, step, purpose, self.config.batch_size)[self._mine]
        return torch.from_numpy(found).to(self.device, non_blocking=True)

    def seed(self, step: int) -> None:
        """torch's generators, from which the network's dropout draws: another stream each step,
        whatever a loader has drawn from them."""
        (seed,) = words(self.config.seed, step, NETWORK + self.ranks.rank, 1)
        torch.manual_seed(int(seed))

    def _read(self, step: int) -> Any:
        """The next batch of the stream, where every rank has one, and all are of one form."""
        try:
            batch = next(self.stream)
            form = form_of(batch)
        except Exception:
            self.ranks.numbers(1, 0)
            raise
        found = self.ranks.numbers(0, zlib.crc32(repr(form).encode()))
        if found[:, 0].any():
            raise SystemExit(2)  # the rank that failed says why
        if (found[:, 1] != found[0, 1]).any():
            self._refuse(step, self.ranks.gather(form))
        return self.form.checked(batch)

    def _refuse(self, step: int, forms: list[dict[str, str]]) -> NoReturn:
        """End where the ranks' batches have other ``forms``: the first rank says how."""
        if self.ranks.rank:
            raise SystemExit(2)
        rank, other = next((i, f) for i, f in enumerate(forms) if f != forms[0])
        name, first, found = first_difference(forms[0], other)
        raise InputError(
            f"at step {step + 1} {name} of the batch is {found} on rank {rank} and {first} on rank "
            "0: give every rank the same number of samples of one shape"
        )
