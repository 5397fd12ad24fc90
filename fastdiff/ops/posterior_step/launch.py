"""Launching posterior_step's kernels: layouts, addresses and counters."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import native
from fastdiff.ops.counters import Counters, sampling_step, value_or_address
from fastdiff.ops.differentiable import Kernel
from fastdiff.ops.layouts import Maybe, address, common_layout, launch_elementwise
from fastdiff.ops.plans import plan_of

FIRST_COUNTER_STEP = sampling_step(0)


class Arguments(NamedTuple):
    x_t: Tensor
    model_output: Tensor
    packed: Tensor  # the table's
    noise: Maybe
    prev_x_start: Maybe
    guidance_tensor: Maybe
    guidance_scale: float | None  # where no tensor says it
    learned_variance: bool
    counters: Counters  # their step is the table's row
    returns_x_start: bool
    backend: str


def _allocate(call: Arguments) -> tuple[Tensor, Maybe]:
    """x_prev, and x_start where it is wanted."""
    x_start = torch.empty_like(call.x_t) if call.returns_x_start else None
    return torch.empty_like(call.x_t), x_start


def _launch(call: Arguments, plan: Any, x_prev: Tensor, x_start: Maybe) -> None:
    x_t, output, packed, noise, before, guidance, number, _, counters, _, backend = call
    step, seed, first_sample = counters
    packed = packed.contiguous()
    guidance = None if guidance is None else guidance.float()
    tensors = (x_t, output, packed, noise, before, x_prev, x_start)
    if backend == "triton":
        from fastdiff.kernels import posterior_step as kernels

        kernels.launch(plan, tensors, counters, number if guidance is None else guidance)
        return
    wide_step = isinstance(step, Tensor) and step.dtype == torch.int64
    row = (*value_or_address(step), wide_step)
    scale = (number or 0.0, address(guidance))
    arguments = (plan, *map(address, tensors), *row, *scale, seed is not None)
    counted = (FIRST_COUNTER_STEP,)
    served = launch_elementwise(
        "posterior_step", backend, x_t, arguments, seed, counted, first_sample
    )
    if served is False:
        raise step_error(int(step), packed.shape[0])


def _plan(
    x_t: Tensor,
    model_output: Tensor,
    noise: Maybe,
    prev_x_start: Maybe,
    rows: int,
    learned_variance: bool,
    guided: bool,
    draws: bool,
    backend: str,
) -> Any:
    """The kernel's description of these layouts; None where it reads none of the kind."""
    batch, channels = x_t.shape[:2]
    x_prev = torch.empty_like(x_t)
    given = (x_t if v is None else v for v in (noise, prev_x_start))
    operands = [x_t, model_output[:batch, :channels], *given, x_prev, x_prev]
    common = common_layout(operands, counted=draws)
    if common is None:
        return None
    shape, layouts = common
    variance = channels * model_output.stride(1) if learned_variance else -1
    unconditional = batch * model_output.stride(0) if guided else -1
    arguments = (shape, rows, *layouts[:2], variance, unconditional, *layouts[2:])
    return arguments if backend == "triton" else native.library().PosteriorStep(*arguments)


def _plan_of(call: Arguments) -> Any:
    layouts = (call.x_t, call.model_output, call.noise, call.prev_x_start)
    guided = call.guidance_scale is not None or call.guidance_tensor is not None
    draws = call.counters.seed is not None
    options = (call.packed.shape[0], call.learned_variance, guided, draws, call.backend)
    return plan_of(_plan, layouts, *options)


def step_error(step: int, rows: int) -> InputError:
    return InputError(f"step is {step}; the table has rows 0 … {rows - 1}")


kernel = Kernel("posterior_step", Arguments, _allocate, _launch, outputs=2, plan=_plan_of)
