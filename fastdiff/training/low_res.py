"""The small images of a training step, of which a super-resolution network makes its batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.data.words import LOW_RES_BLUR, LOW_RES_LEVEL, LOW_RES_NOISE, words
from fastdiff.process.low_res import (
    BLUR_SIGMAS,
    blurred,
    downsampled,
    low_res_size,
    noised_to,
)
from fastdiff.training.config import TrainConfig


class LowRes:
    """``low_res`` and ``noise_level`` of the network, as ``config`` says; neither where its
    ``upsample_from`` is 0.

    Which images are blurred, and how much, the levels and the noise follow from (seed, step, sample
    number): Ho et al. 2022, as ``fastdiff.process.low_res`` has it.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        (seed,) = words(config.seed, 0, LOW_RES_NOISE, 1)
        self.noise_seed = int(seed)

    def plain(self, x_start: Tensor) -> dict[str, Tensor]:
        """Of large images (n, C, H, W) in floats, as they are when nothing is augmented."""
        if not self.config.upsample_from:
            return {}
        size = low_res_size(x_start.shape[2:], self.config.upsample_from)
        given = {"low_res": downsampled(x_start, size)}
        if self.config.cond_noise:
            given["noise_level"] = torch.zeros(len(x_start), device=x_start.device)
        return given

    def drawn(
        self, x_start: Tensor, uniform: Callable[[int], Tensor], step: int, first_sample: int
    ) -> dict[str, Tensor]:
        """:meth:`plain`, augmented: the samples from ``first_sample`` on of the batch of ``step``.

        uniform: gives this rank's numbers in [0, 1) of the step, float64 (n,), by their purpose.
        """
        given, config = self.plain(x_start), self.config
        if config.cond_blur:
            given["low_res"] = blurred(given["low_res"], self._sigmas(uniform(LOW_RES_BLUR)))
        if config.cond_noise:
            levels = config.cond_noise * uniform(LOW_RES_LEVEL)
            counters = {"seed": self.noise_seed, "step": step, "first_sample": first_sample}
            given["low_res"] = noised_to(given["low_res"], levels, **counters)
            given["noise_level"] = levels.float()
        return given

    def _sigmas(self, u: Tensor) -> Tensor:
        """(n,): uniform in the published range for a share ``cond_blur`` of the images, else 0."""
        low, high = BLUR_SIGMAS
        share = u / self.config.cond_blur  # of those below 1, uniform again
        return torch.where(share < 1, low + (high - low) * share, 0.0)
