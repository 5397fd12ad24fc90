"""Launching posterior_step's kernels: layouts, addresses and counters."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import native
from fastdiff.ops.counters import Counters, arguments, sampling_step, value_or_address
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

    @property
    def guidance(self) -> float | Tensor | None:
        return self.guidance_scale if self.guidance_tensor is None else self.guidance_tensor


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
    row, scale = (*value_or_address(step), wide_step), (number or 0.0, address(guidance))
    noise_of = *arguments(backend, seed), FIRST_COUNTER_STEP, *arguments(backend, first_sample)
    given = (plan, *map(address, tensors), *row, *scale, seed is not None, *noise_of)
    served = launch_elementwise("posterior_step", backend, x_t, *given)
    if served is False:
        raise step_error(int(step), packed.shape[0])


def _plan(call: Arguments) -> Any:
    """The kernel's description of the layouts; None where it reads none of the kind."""
    x_t, output = call.x_t, call.model_output
    batch, channels = x_t.shape[:2]
    x_prev = torch.empty_like(x_t)
    given = (x_t if v is None else v for v in (call.noise, call.prev_x_start))
    operands = [x_t, output[:batch, :channels], *given, x_prev, x_prev]
    common = common_layout(operands, counted=call.counters.seed is not None)
    if common is None:
        return None
    shape, layouts = common
    variance = channels * output.stride(1) if call.learned_variance else -1
    unconditional = batch * output.stride(0) if call.guidance is not None else -1
    rows = call.packed.shape[0]
    plan = (shape, rows, *layouts[:2], variance, unconditional, *layouts[2:])
    return plan if call.backend == "triton" else native.library().PosteriorStep(*plan)


def _plan_of(call: Arguments) -> Any:
    layouts = (call.x_t, call.model_output, call.noise, call.prev_x_start)
    guided, draws = call.guidance is not None, call.counters.seed is not None
    options = (call.packed.shape[0], call.learned_variance, guided, draws, call.backend)
    return plan_of(_plan, call, layouts, *options)


def step_error(step: int, rows: int) -> InputError:
    return InputError(f"step is {step}; the table has rows 0 … {rows - 1}")


kernel = Kernel("posterior_step", Arguments, _allocate, _launch, outputs=2, plan=_plan_of)
