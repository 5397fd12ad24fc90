"""Launching posterior_step's kernels: layouts, addresses and counters."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, native
from fastdiff.ops.counters import Counters, sampling_step, value_or_address
from fastdiff.ops.differentiable import Kernel
from fastdiff.ops.layouts import Maybe, address, call_elementwise, common_layout, dense
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


def allocate(call: Arguments) -> tuple[Tensor, Maybe]:
    """x_prev, and x_start where it is wanted."""
    x_start = torch.empty_like(call.x_t) if call.returns_x_start else None
    return torch.empty_like(call.x_t), x_start


def launch(call: Arguments, x_prev: Tensor, x_start: Maybe) -> bool | None:
    """Fill both."""
    x_t, model_output, packed, noise, before, guidance, number, learned, counters, _, backend = call
    step, seed, first_sample = counters
    rows, guided = packed.shape[0], number is not None or guidance is not None
    as_read = packed.is_contiguous() and (guidance is None or guidance.dtype == torch.float32)
    layouts = (x_t, model_output, noise, before)
    plan = plan_of(_plan, layouts, rows, learned, guided, seed is not None, backend)
    if plan is None or not as_read:
        return False
    tensors = (x_t, model_output, packed, noise, before, x_prev, x_start)
    if backend == "triton":
        from fastdiff.kernels import posterior_step as kernels

        with backends.device_of(x_t):
            kernels.launch(plan, tensors, counters, number if guidance is None else guidance)
        return None
    arguments = (
        plan,
        *map(address, tensors),
        *value_or_address(step),
        type(step) is not int and step.dtype == torch.int64,  # type: ignore[union-attr]
        number or 0.0,
        address(guidance),
        seed is not None,
    )
    served = call_elementwise(
        "posterior_step", backend, x_t, arguments, seed, (FIRST_COUNTER_STEP,), first_sample
    )
    if served is False:
        raise step_error(int(step), rows)
    return None


def _readable(call: Arguments) -> Arguments:
    """On contiguous copies in dtypes that the kernels read."""
    guidance = call.guidance_tensor
    return call._replace(
        x_t=call.x_t.contiguous(),
        model_output=call.model_output.contiguous(),
        packed=call.packed.contiguous(),
        noise=dense(call.noise),
        prev_x_start=dense(call.prev_x_start),
        guidance_tensor=None if guidance is None else guidance.float(),
    )


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
    extras = [v for v in (noise, prev_x_start) if v is not None]
    if not all(v.dtype in native.DTYPE_CODES for v in extras):
        return None
    batch, channels = x_t.shape[:2]
    x_prev = torch.empty_like(x_t)
    given = (x_t if v is None else v for v in (noise, prev_x_start))
    operands = [x_t, model_output[:batch, :channels], *given, x_prev, x_prev]
    common = common_layout(operands, counted=draws)
    if common is None:
        return None
    shape, layouts = common
    offsets = (
        channels * model_output.stride(1) if learned_variance else -1,
        batch * model_output.stride(0) if guided else -1,
    )
    arguments = (shape, rows, *layouts[:2], *offsets, *layouts[2:])
    return arguments if backend == "triton" else native.library().PosteriorStep(*arguments)


def step_error(step: int, rows: int) -> InputError:
    return InputError(f"step is {step}; the table has rows 0 … {rows - 1}")


kernel = Kernel("posterior_step", Arguments, allocate, launch, outputs=2, readable=_readable)
