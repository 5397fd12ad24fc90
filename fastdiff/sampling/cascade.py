"""A cascade: what one network draws is made larger by the next (Ho et al. 2022, arXiv:2106.15282).

    base ─ 16×16 ─▶ upsampler ─ 64×64 ─▶ upsampler ─ 256×256 ─▶

The later networks are super-resolution networks: ``low_res`` is what the one before has drawn, as
bytes, so that drawing into files in between changes nothing. Of a network that was trained with
noised small images (``cond_noise``) they are noised likewise, which hides what the smaller network
did wrong; or the smaller network is stopped while its samples are as noisy as that (``truncated``).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import check_float, is_finite
from fastdiff.data.words import UPSAMPLING, words
from fastdiff.errors import InputError
from fastdiff.images import to_float, to_uint8
from fastdiff.process.low_res import level_of, noised_to
from fastdiff.sampling.sampler import Sampler

Kwargs = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """One network of a cascade.

    Attributes:
        sampler: what draws with it.
        shape: (C, H, W) of its images.
        low_res_size: (h, w) of the small images that it is given as ``low_res``; None for a network
            that is given none.
        cond_noise: the highest level of the noise in them that it was trained with, in [0, 1]; 0
            for a network that takes no ``noise_level``.
        noise_level: the one that they are given (``fastdiff.process.low_res``).
        name: what to call it in an error.

    Raises InputError for a level that the network was not trained with.
    """

    sampler: Sampler
    shape: tuple[int, int, int]
    low_res_size: tuple[int, int] | None = None
    cond_noise: float = 0.0
    noise_level: float = 0.0
    name: str = "a network"

    def __post_init__(self) -> None:
        level = self.noise_level
        if not is_finite(level) or not 0 <= level <= 1:
            raise InputError(f"noise_level is {level!r}; expected a number in [0, 1]")
        if level and self.low_res_size is None:
            raise InputError(
                f"noise_level is {level:g}, that of small images, which {self.name} is not given"
            )
        if level > self.cond_noise:
            known = f"up to {self.cond_noise:g}" if self.cond_noise else "on clean images alone"
            raise InputError(
                f"noise_level is {level:g}, and {self.name} was trained {known} (cond_noise)"
            )


class Cascade:
    """Samples of ``stages``, each network given the images of the one before.

    Args:
        stages: one at least. The first may be an upsampler too: ``sample`` is then given the small
            images.
        truncated: stop a network whose images the next one is given with noise at the first of its
            steps that leaves no more noise than that, in place of noising what it has finished.
        rounding: how images become bytes between the networks (``fastdiff.images.to_uint8``).

    Raises InputError for networks that do not follow each other, or cannot be stopped there.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        truncated: bool = False,
        rounding: str = "nearest",
    ) -> None:
        if not stages:
            raise InputError("a cascade needs a network at least, got none")
        self.stages, self.rounding = list(stages), rounding
        pairs = list(zip(stages, stages[1:], strict=False))
        for before, stage in pairs:
            _check_follows(before, stage)
        if truncated and not any(stage.noise_level for stage in stages[1:]):
            raise InputError("truncated needs a cascade and the noise_level to stop at, above 0")
        self.stops = [
            _stop_of(before, stage.noise_level) if truncated and stage.noise_level else None
            for before, stage in pairs
        ]

    @property
    def steps(self) -> list[int]:
        """How many steps each network takes."""
        stops = [*self.stops, None]
        return [
            len(stage.sampler.table) if stop is None else stop.rows
            for stage, stop in zip(self.stages, stops, strict=True)
        ]

    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        first_sample: int = 0,
        low_res: Tensor | None = None,
        model_kwargs: Sequence[Kwargs] | None = None,
        uncond_kwargs: Sequence[Kwargs | None] | None = None,
        cond_kwargs: Sequence[Kwargs | None] | None = None,
        progress: Callable[[], object] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> Tensor:
        """``count`` samples (N, C, H, W) of the last network, float32 on its device.

        Image i of a seed is the same in any batch, and the same whether the networks are sampled
        one by one or together.

        Args:
            seed: as :meth:`Sampler.iterate`'s.
            first_sample: as :meth:`Sampler.iterate`'s.
            low_res: (N, C, h, w) floats in [-1, 1], exactly where the first network is an
                upsampler.
            model_kwargs: of each network, such as its labels; low_res and noise_level are added.
            uncond_kwargs: of each network, for guidance; None: as :meth:`Sampler.iterate` has it.
            cond_kwargs: the same for the conditional half.
            progress: is called after every step of every network.
            callback: gets what :meth:`Sampler.iterate` yields, of the last network.

        Raises InputError for small images that are missing or do not fit, and as the samplers do.
        """
        self._check_low_res(count, low_res)
        given = model_kwargs or [{}] * len(self.stages)
        none = [None] * len(self.stages)
        uncond, cond = uncond_kwargs or none, cond_kwargs or none
        small, level = low_res, None
        for i, stage in enumerate(self.stages):
            kwargs, own_seed = dict(given[i]), seed
            if stage.low_res_size is not None:
                assert small is not None
                own_seed = _seed_of(seed, stage.low_res_size)
                counters = {"seed": own_seed, "first_sample": first_sample}
                kwargs |= self._condition(stage, small, level, counters)
            inputs: dict[str, Any] = {
                "shape": (count, *stage.shape),
                "seed": own_seed,
                "first_sample": first_sample,
                "model_kwargs": kwargs,
                "uncond_kwargs": uncond[i],
                "cond_kwargs": cond[i],
            }
            if i + 1 < len(self.stages):
                small, level = self._small(i, inputs, progress)
        return self.stages[-1].sampler.sample(
            **inputs, progress=progress or False, callback=callback
        )

    def _small(
        self, i: int, inputs: dict[str, Any], progress: Callable[[], object] | None
    ) -> tuple[Tensor, float | None]:
        """Images of network ``i`` for the next, and the level of the noise in them where it was
        stopped before they were finished."""
        sampler, stop = self.stages[i].sampler, self.stops[i]
        if stop is None:
            x = sampler.sample(**inputs, progress=progress or False)
            return to_float(to_uint8(x, self.rounding)), None
        with closing(sampler.iterate(**inputs)) as steps:  # type: ignore[type-var]
            for step in steps:
                if progress is not None:
                    progress()
                if step["step"] + 1 == stop.rows:
                    break
        return step["sample"] / stop.length, stop.level

    def _condition(
        self, stage: Stage, small: Tensor, level: float | None, counters: dict[str, int]
    ) -> dict[str, Tensor]:
        """low_res and noise_level of a stage; level: of the noise that is in ``small`` already."""
        small = small.to(stage.sampler.device or stage.sampler.network.device or small.device)
        if not stage.cond_noise:
            return {"low_res": small}
        levels = torch.full(small.shape[:1], stage.noise_level, dtype=torch.float64)
        if level is None:
            small = noised_to(small, levels.to(small.device), step=0, **counters)
        else:
            levels.fill_(level)
        return {"low_res": small, "noise_level": levels.to(small.device, torch.float32)}

    def _check_low_res(self, count: int, low_res: Tensor | None) -> None:
        first = self.stages[0]
        if first.low_res_size is None:
            if low_res is not None:
                raise InputError(f"low_res was given, and {first.name} takes no small images")
            return
        expected = (count, first.shape[0], *first.low_res_size)
        if low_res is None:
            raise InputError(
                f"{first.name} is a super-resolution network: it needs low_res {expected}"
            )
        check_float(low_res, "low_res")
        if low_res.shape != expected:
            raise InputError(f"low_res has shape {tuple(low_res.shape)}; expected {expected}")


@dataclass(frozen=True)
class _Stop:
    """After ``rows`` rows x_t = length·z_s, s = level."""

    rows: int
    level: float
    length: float


def _stop_of(stage: Stage, noise_level: float) -> _Stop:
    """Where a network is stopped. InputError where it has no step of so little noise."""
    table = stage.sampler.table
    if table.levels is None:
        raise InputError(f"truncated needs the process of {stage.name}, which has a StepTable")
    signal, noise = table.levels.T
    levels = level_of(signal, noise)
    for row in range(1, len(table)):
        # A sample, and what leads on from it never goes back up (restarts, churn).
        if table.begins[row] and (levels[row:] <= noise_level).all():
            return _Stop(row, float(levels[row]), float(np.hypot(signal[row], noise[row])))
    raise InputError(
        f"{stage.name} cannot be stopped at noise_level {noise_level:g}: its least noisy step is "
        f"{levels[-1]:.3g}; take a higher level, or more steps"
    )


def _seed_of(seed: int, low_res_size: tuple[int, int]) -> int:
    """An upsampler's: noise that no other network of the cascade draws, wherever it stands in it.

    The number that tells upsamplers apart is their small images' height, then their width.
    """
    height, width = low_res_size
    return int(words(seed, (height << 32) + width, UPSAMPLING, 1)[0])


def _check_follows(before: Stage, stage: Stage) -> None:
    if stage.low_res_size is None:
        raise InputError(
            f"{stage.name} is no super-resolution network: it cannot follow {before.name}"
        )
    if tuple(stage.low_res_size) != tuple(before.shape[1:]):
        height, width = stage.low_res_size
        made = "x".join(map(str, before.shape[1:]))
        raise InputError(
            f"{stage.name} upsamples images of {height}x{width}, and {before.name} makes {made}"
        )
    if stage.shape[0] != before.shape[0]:
        raise InputError(
            f"{stage.name} has {stage.shape[0]} channels, and {before.name} {before.shape[0]}"
        )
