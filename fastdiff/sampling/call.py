"""One call of a sampler: its arguments checked, x_T, and what each of its rows is run with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.checks import check_float, check_shape, is_finite
from fastdiff.errors import InputError
from fastdiff.methods.protocol import noise_levels
from fastdiff.methods.table import StepTable
from fastdiff.process.published_loops import StepNoise
from fastdiff.process.update import (
    ClassifierGuidance,
    CondFn,
    DenoisedFn,
    XStart,
    classifier_gain,
    mean_is_output,
)
from fastdiff.sampling.conditions import Conditions, Known
from fastdiff.sampling.kwargs import doubled_kwargs
from fastdiff.sampling.network.network import Network
from fastdiff.sampling.noise import noise_source
from fastdiff.sampling.reuse import Extent
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.stats import Stats
from fastdiff.sampling.step import Run, failure_flag


class Parts(Protocol):
    """What a call reads of its Sampler."""

    network: Network
    guide: Network | None
    settings: Settings
    diffusion: Any
    table: StepTable
    denoised_fn: DenoisedFn | None
    cond_fn: CondFn | None
    rng: Any
    self_condition: str | None


@dataclass(frozen=True)
class Inputs:
    """The arguments of ``Sampler.iterate``; its docstring describes them."""

    shape: Sequence[int]
    _: KW_ONLY
    seed: int = 0
    first_sample: int = 0
    noise: Tensor | None = None
    image: Tensor | None = None
    strength: float = 0.8
    known: Tensor | None = None
    known_mask: Tensor | None = None
    model_kwargs: Mapping[str, Any] | None = None
    uncond_kwargs: Mapping[str, Any] | None = None
    cond_kwargs: Mapping[str, Any] | None = None
    step_noise: StepNoise | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", check_shape(self.shape))
        for name, tensor in (("noise", self.noise), ("image", self.image)):
            if tensor is not None:
                check_float(tensor, name)
                if tensor.shape != self.shape:
                    raise InputError(
                        f"{name} has shape {tuple(tensor.shape)}, but shape is {self.shape}"
                    )
        for name in ("model", "uncond", "cond"):
            given = getattr(self, f"{name}_kwargs")
            if given is not None and not isinstance(given, Mapping):
                raise InputError(f"{name}_kwargs is a {type(given).__name__}; expected a dict")
        if (self.known is None) != (self.known_mask is None):
            raise InputError("known and known_mask belong together; give both or neither")


@dataclass(frozen=True, kw_only=True)
class WatchedInputs(Inputs):
    """The arguments of ``Sampler.sample``: how to look at the steps, too."""

    progress: bool | Callable[[], object] = False
    callback: Callable[[dict[str, Any]], None] | None = None


class Call:
    """``x``, (N, C, ...) to start from; ``timesteps``, (K,) numbers, one for each row."""

    def __init__(self, sampler: Parts, inputs: Inputs, device: torch.device, stats: Stats):
        network = sampler.network
        with network.lock:  # another thread may configure the sampler meanwhile
            settings, process, whole = sampler.settings, sampler.diffusion, sampler.table
        shape = tuple(inputs.shape)
        table = whole
        self.first = 0  # of the process's steps, the noisiest being 0
        if inputs.image is not None:
            self.first = _skipped(inputs.strength, len(noise_levels(process)[0]))
            table = settings.table(process, self.first) if self.first else table
        skipped = len(whole) - len(table)
        self.table = table = table.to(device)
        self.timesteps: list[float] = table.timesteps.tolist()
        conditions = Conditions(x_start=XStart(sampler.denoised_fn, settings.dynamic_threshold))
        if sampler.cond_fn is not None:
            gain = classifier_gain(process, table)
            conditions.classifier = ClassifierGuidance(sampler.cond_fn, table, gain)
        elif inputs.cond_kwargs is not None:
            raise InputError("cond_kwargs belong to a classifier; give the sampler a cond_fn")
        if inputs.known is not None and inputs.known_mask is not None:
            given = (inputs.known, inputs.known_mask)
            conditions.known = Known.of(*given, shape, device, process, table)
        kwargs = dict(inputs.model_kwargs or {})
        counters = (inputs.seed, inputs.first_sample, inputs.step_noise)
        self.stats = stats
        self.guided = [settings.is_guided(timestep) for timestep in self.timesteps]
        extents = settings.extents(self.guided, skipped)
        self.plain = Run(
            network=network,
            table=table,
            timesteps=self.timesteps,
            kwargs=kwargs,
            cond_kwargs=kwargs if inputs.cond_kwargs is None else dict(inputs.cond_kwargs),
            noise=noise_source(sampler.rng, shape, device, *counters, len(table)),
            conditions=conditions,
            stats=stats,
            extents={i: extents[i] for i, guided in enumerate(self.guided) if not guided},
            depth=settings.depth,
            failed=failure_flag(device),
            mean_is_output=mean_is_output(process, table),
            self_condition=sampler.self_condition,
        )
        self.with_guidance = self.plain
        if settings.guidance_scale is not None:
            self.with_guidance = self._guided(sampler, settings, inputs, kwargs, extents)
        elif inputs.uncond_kwargs is not None:
            raise InputError("uncond_kwargs belong to guidance; give guidance_scale too")
        self.x = self._first_x(inputs, process, device, network.channels_last)

    def _guided(
        self,
        sampler: Parts,
        settings: Settings,
        inputs: Inputs,
        kwargs: dict[str, Any],
        extents: Sequence[Extent],
    ) -> Run:
        guidance: dict[str, Any] = {
            "guidance_scale": settings.guidance_scale,
            "guidance_rescale": settings.guidance_rescale,
            "extents": {i: extents[i] for i, guided in enumerate(self.guided) if guided},
        }
        if sampler.guide is not None:
            given = kwargs | dict(inputs.uncond_kwargs or {})
            return replace(self.plain, guide=sampler.guide, guide_kwargs=given, **guidance)
        model, count = sampler.network.model, inputs.shape[0]
        doubled = doubled_kwargs(model, count, kwargs, inputs.uncond_kwargs)
        return replace(self.plain, doubled=doubled, **guidance)

    def run_of(self, i: int) -> Run:
        return self.with_guidance if self.guided[i] else self.plain

    def changes_at(self, i: int) -> bool:
        """Whether row i is run with something else than the row before."""
        return i > 0 and self.guided[i] != self.guided[i - 1]

    def _first_x(
        self, inputs: Inputs, process: Any, device: torch.device, channels_last: bool
    ) -> Tensor:
        """x_T, or the image at the level of the first row."""
        given = inputs.noise
        signal, noise = 0.0, 1.0
        if inputs.image is not None or not isinstance(process, StepTable):
            signal, noise = (float(level[-1 - self.first]) for level in noise_levels(process))
        if inputs.image is None and given is None and signal > noise:
            raise InputError(
                f"sampling would start at timestep {self.timesteps[0]:g}, where x_t is mostly data "
                f"({signal:.3g}·x_0 + {noise:.3g}·noise) and cannot be drawn; take noisier steps "
                "(more of them, or spacing 'trailing'), or start from an image or given noise"
            )
        x = self.plain.noise.x_T() if given is None else given.to(device, torch.float32)
        if inputs.image is not None:
            x = signal * inputs.image.to(device, torch.float32) + noise * x
        elif given is None and not isinstance(process, StepTable):
            x = x * process.prior_std
        if x.dim() == 4 and channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x


def _skipped(strength: float, steps: int) -> int:
    """How many steps stand before the last ``strength`` of them, of which there is at least one."""
    if not is_finite(strength) or not 0 < strength <= 1:
        raise InputError(f"strength is {strength!r}; expected a number above 0, at most 1")
    return steps - max(1, round(strength * steps))
