"""Sampling from noise to data through every step of a process, DDPM or DDIM."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_device, check_float, check_shape
from fastdiff.errors import InputError
from fastdiff.ops.normal.op import draw_like
from fastdiff.optional import require
from fastdiff.process.reverse import CondFn, DenoisedFn, Model, ReverseProcess

StepNoise = Tensor | Callable[[int], Tensor]
Step = Callable[..., dict[str, Tensor]]


class SamplingLoops(ReverseProcess):
    """Loops over all K steps.

    ``clip_denoised``, ``denoised_fn``, ``cond_fn``: see :class:`ReverseProcess`.
    ``shape``: (N, C, ...) of the samples. ``noise``: x_T, drawn when None.
    ``device``: where to sample; by default the device of ``noise``, else of the model's parameters,
    else the CPU.
    ``step_noise``: the draw of every step: one tensor of ``shape`` for all, or a callable that gets
    the step's index t (K-1 first, 0 last) and answers one.
    ``generator``: torch.Generator of all that is drawn: x_T first, then one draw at every step,
    also at t = 0 and for DDIM with eta = 0 (the order of the published code).
    ``progress``: show a progress bar (needs tqdm).

    Nothing is recorded for gradients. Whatever does not fit raises InputError.
    """

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        step_noise: StepNoise | None = None,
        cond_fn: CondFn | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """DDPM sampling (Ho et al. 2020 algorithm 2): x_0. Arguments: :class:`SamplingLoops`."""
        options = (noise, clip_denoised, denoised_fn, model_kwargs, device, progress)
        steps = self.p_sample_loop_progressive(
            model, shape, *options, step_noise=step_noise, cond_fn=cond_fn, generator=generator
        )
        return _last(steps)

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        step_noise: StepNoise | None = None,
        cond_fn: CondFn | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """As :meth:`p_sample_loop`, yielding what ``p_sample`` answers after every step."""
        step = partial(
            self.p_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
            cond_fn=cond_fn,
            generator=generator,
        )
        x = initial_x(model, shape, noise, device, generator)
        return self._loop(step, x, step_noise, progress)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        step_noise: StepNoise | None = None,
        cond_fn: CondFn | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """DDIM sampling (Song et al. 2020 eq. 12): x_0. Arguments: :class:`SamplingLoops`."""
        options = (noise, clip_denoised, denoised_fn, model_kwargs, device, progress, eta)
        steps = self.ddim_sample_loop_progressive(
            model, shape, *options, step_noise=step_noise, cond_fn=cond_fn, generator=generator
        )
        return _last(steps)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        step_noise: StepNoise | None = None,
        cond_fn: CondFn | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """As :meth:`ddim_sample_loop`, yielding what ``ddim_sample`` answers after every step."""
        step = partial(
            self.ddim_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
            eta=eta,
            cond_fn=cond_fn,
            generator=generator,
        )
        x = initial_x(model, shape, noise, device, generator)
        return self._loop(step, x, step_noise, progress)

    def _loop(
        self, step: Step, x: Tensor, step_noise: StepNoise | None, progress: bool
    ) -> Iterator[dict[str, Tensor]]:
        for i in countdown(self.num_timesteps, progress):
            t = torch.full((len(x),), i, dtype=torch.int64, device=x.device)
            # The caller's own gradient mode is back while the generator waits at the yield.
            with torch.no_grad():
                out = step(x, t, noise=noise_of_step(step_noise, i))
            yield out
            x = out["sample"]


def countdown(num_timesteps: int, progress: bool):
    """K-1 … 0, with a progress bar if asked for."""
    steps = range(num_timesteps - 1, -1, -1)
    return require("tqdm.auto", "train").tqdm(steps) if progress else steps


def noise_of_step(noise: StepNoise | None, i: int) -> Tensor | None:
    """The noise of step i: a callable is asked for it, a tensor serves every step."""
    if noise is None or isinstance(noise, Tensor):
        return noise
    drawn = noise(i) if callable(noise) else noise
    if not isinstance(drawn, Tensor):
        raise InputError(f"the noise of step {i} must be a tensor, got {type(drawn).__name__}")
    return drawn


def initial_x(
    model: Model | None,
    shape: Sequence[int],
    noise: Tensor | None,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    """x_T on the device to sample on."""
    shape = check_shape(shape, empty=True)
    device = None if device is None else check_device(device)
    if noise is not None:
        check_float(noise, "noise")
        if noise.shape != shape:
            raise InputError(f"noise has shape {tuple(noise.shape)}, but shape is {shape}")
        return noise if device is None else noise.to(device)
    if device is None:
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
        first = next(parameters, None)
        device = torch.device("cpu") if first is None else first.device
    return draw_like(torch.empty(shape, device=device), generator)


def _last(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    for out in steps:
        sample = out["sample"]
    return sample
