"""Sampling from noise to data through every step of a process: the published loops."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_device, check_float, check_shape
from fastdiff.errors import InputError
from fastdiff.ops.normal import draw_like
from fastdiff.optional import require
from fastdiff.process.protocol import Gaussian
from fastdiff.process.reverse import Model, ReverseStep
from fastdiff.process.update import CondFn, DenoisedFn

StepNoise = Tensor | Callable[[int], Tensor]


@dataclass
class LoopArguments:
    """What a loop over all K steps is given.

    ``clip_denoised``, ``denoised_fn``, ``cond_fn``: see :class:`StepArguments`.
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

    model: Model
    shape: Sequence[int]
    noise: Tensor | None = None
    clip_denoised: bool = True
    denoised_fn: DenoisedFn | None = None
    model_kwargs: dict[str, Any] | None = None
    device: torch.device | str | None = None
    progress: bool = False
    _: KW_ONLY
    step_noise: StepNoise | None = None
    cond_fn: CondFn | None = None
    generator: torch.Generator | None = None


@dataclass
class DDIMLoopArguments(LoopArguments):
    """:class:`LoopArguments`, and DDIM's ``eta``."""

    eta: float = 0.0


def loop(
    process: Gaussian, method: str, given: LoopArguments, eta: float = 0.0
) -> Iterator[dict[str, Tensor]]:
    """{"sample", "pred_xstart"} after every step. x_T is drawn at once."""
    x = initial_x(given.model, given.shape, given.noise, given.device, given.generator)
    return _steps(ReverseStep(process, method, x, given, eta), x, given)


def _steps(step: ReverseStep, x: Tensor, given: LoopArguments) -> Iterator[dict[str, Tensor]]:
    last_row = len(step.table) - 1
    for t in countdown(len(step.table), given.progress):
        # The caller's own gradient mode is back while the generator waits at the yield.
        with torch.no_grad():
            out = step(x, last_row - t, noise_of_step(given.step_noise, t))
        yield out
        x = out["sample"]


def last(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    """The sample after the last of ``loop``'s steps."""
    for out in steps:
        sample = out["sample"]
    return sample


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
