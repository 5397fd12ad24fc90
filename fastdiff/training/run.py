"""A trainer to those who stand below it: what they read of the run, and what they ask for."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fastdiff.models.ema import EMA
from fastdiff.ranks import Ranks
from fastdiff.training.batches import Batches
from fastdiff.training.config import TrainConfig
from fastdiff.training.feed import Feed
from fastdiff.training.guard import FiniteGuard
from fastdiff.training.metrics import IntervalMeter
from fastdiff.training.timestep_samplers import TimestepSampler
from fastdiff.training.update import Update

T = TypeVar("T")


class Run(Protocol):
    """A Trainer."""

    run_dir: Path
    config: TrainConfig
    ranks: Ranks
    device: torch.device
    model: nn.Module
    description: Any  # of the network, for config.json
    diffusion: Any
    data: Any
    eval_dataset: Any
    info: dict[str, Any]
    show_progress: bool

    step: int
    half_done: bool
    update: Update
    ema: EMA
    timesteps: TimestepSampler
    meter: IntervalMeter
    stream: Batches
    feed: Feed
    reports: Any  # which stand above a Run
    saving: Any  # as does this
    scores: Any  # and this
    guard: FiniteGuard

    @property
    def is_spread(self) -> bool: ...

    def with_weights(self, work: Callable[[], T]) -> T: ...
    def averaged(self) -> AbstractContextManager[None]: ...
    def due(self, interval: int) -> bool: ...
    def check_finite(self) -> None: ...
