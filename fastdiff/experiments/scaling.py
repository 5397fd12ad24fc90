"""An experiment made small, to see it through: every count times a factor, every size by a root.

    iterations, samples, real images, images scored     × factor
    batch size                                          × factor^(1/2)
    width of the network, sampling and scoring steps    × factor^(1/4)

The images keep their size, the process its noise levels, the network its depth.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdiff.errors import InputError
from fastdiff.training import TrainConfig

LEAST_SAMPLES = 8  # precision and recall need more than k = 3, and ranks something to share
LEAST_STEPS = 2
GROUPS = 32  # of every norm: what widths are multiples of


@dataclass(frozen=True)
class Scale:
    """factor: in (0, 1]; 1 is the paper's own size. InputError for another."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise InputError(
                f"--scale is {self.factor:g}; expected more than 0 and at most 1, the paper's size"
            )

    @property
    def whole(self) -> bool:
        return self.factor == 1

    def count(self, number: int, least: int) -> int:
        return max(least, round(number * self.factor))

    def samples(self, number: int) -> int:
        return self.count(number, LEAST_SAMPLES)

    def some(self, number: int) -> int | None:
        """So many of a data set's images in the place of all; None for all."""
        return None if self.whole else self.samples(number)

    def steps(self, number: int) -> int:
        return max(LEAST_STEPS, round(number * self.factor**0.25))

    def training(self, config: TrainConfig, model: Mapping[str, Any]) -> dict[str, int]:
        """What changes of a training and of its network's arguments, by their names as flags; all
        of it can be as it was."""
        if self.whole:
            return {}
        heads = model.get("num_head_channels", -1)
        unit = math.lcm(GROUPS, heads) if heads > 0 else GROUPS
        width = model["model_channels"]
        return {
            "steps": self.count(config.steps, LEAST_STEPS),
            "batch-size": max(2, round(config.batch_size * self.factor**0.5)),
            "warmup": self.count(config.warmup, 0),
            "model-channels": min(width, unit * max(1, round(width * self.factor**0.25 / unit))),
        }
