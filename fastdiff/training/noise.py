"""The noise of a training step, where it is not the plain one that the losses draw themselves."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.data.words import OFFSET_NOISE, words
from fastdiff.ops.counters import training_step
from fastdiff.ops.normal import normal
from fastdiff.optional import require
from fastdiff.training.config import TrainConfig


class Noise:
    """Noise by ``config``: offset, immiscible, both or neither. InputError: no SciPy to assign by.

    Offset noise (Guttenberg, "Diffusion with offset noise", 2023) adds to every channel of a
    sample one more normal number, offset_noise times: the network learns to move its mean.
    Immiscible noise (Li et al. 2024, arXiv:2406.12303) gives each sample that of the batch's noises
    which makes the sum of distances least.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.assign = None
        if config.immiscible:
            self.assign = require("scipy.optimize", "immiscible").linear_sum_assignment
        (seed,) = words(config.seed, 0, OFFSET_NOISE, 1)
        self.offset_seed = int(seed)

    def drawn(self, x_start: Tensor, step: int, first_sample: int) -> Tensor | None:
        """Like x_start (n, C, ...), the samples from ``first_sample`` on of the batch of ``step``;
        None: the losses draw it.

        The offset follows from (seed, step, sample number). The assignment is among the samples
        that are given, so it depends on what a rank has; for it a GPU is waited for.
        """
        if not self.config.offset_noise and self.assign is None:
            return None
        numbers: dict[str, Any] = {"step": training_step(step), "first_sample": first_sample}
        noise = torch.empty_like(x_start)  # in its layout
        normal(noise.shape, seed=self.config.seed, **numbers, out=noise)
        if self.config.offset_noise:
            shift = torch.empty(x_start.shape[:2], dtype=noise.dtype, device=noise.device)
            normal(shift.shape, seed=self.offset_seed, **numbers, out=shift)
            shift = shift.view(*shift.shape, *[1] * (x_start.dim() - 2))
            noise = noise + self.config.offset_noise * shift
        return noise if self.assign is None else noise[self._nearest(x_start, noise)]

    def _nearest(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """The noise of each sample (n,), by distances of values in half precision, as published."""
        x, z = (value.flatten(1).half().float() for value in (x_start, noise))
        assert self.assign is not None
        _, chosen = self.assign(torch.cdist(x, z).nan_to_num().cpu().numpy())
        return torch.from_numpy(chosen).to(noise.device)
