"""Launching posterior_step's kernels: layouts, addresses and counters."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, native
from fastdiff.ops.counters import Counters, low_bits, sampling_step, value_or_address
from fastdiff.ops.differentiable import Kernel
from fastdiff.ops.layouts import Maybe, address, common_layout, dense
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


def launch(call: Arguments, x_prev: Tensor, x_start: Maybe) -> None:
    """Fill both."""
    if x_prev.numel() == 0:
        return
    guided = call.guidance_scale is not None or call.guidance_tensor is not None
    step, seed, first_sample = call.counters
    uses = (call.learned_variance, guided, seed is not None)
    x_t, model_output, packed, noise, prev_x_start, guidance, *_ = call
    as_read = packed.is_contiguous() and (guidance is None or guidance.dtype == torch.float32)
    operands = (x_t, model_output, noise, prev_x_start)
    plan = plan_of(_plan, operands, packed.shape[0], *uses, call.backend)
    if plan is None or not as_read:
        _launch_copies(call, x_prev, x_start)
        return
    if call.backend == "triton":
        from fastdiff.kernels import posterior_step as kernels

        tensors = (x_t, model_output, packed, noise, prev_x_start, x_prev, x_start)
        scale = call.guidance_scale if guidance is None else guidance
        with backends.device_of(x_prev):
            kernels.launch(plan, tensors, call.counters, scale)
        return
    arguments = (
        plan,
        x_t.data_ptr(),
        model_output.data_ptr(),
        packed.data_ptr(),
        address(noise),
        address(prev_x_start),
        x_prev.data_ptr(),
        address(x_start),
        *((step, 0) if type(step) is int else value_or_address(step)),
        type(step) is not int and step.dtype == torch.int64,  # type: ignore[union-attr]
        call.guidance_scale or 0.0,
        address(guidance),
        seed is not None,
    )
    seed = 0 if seed is None else seed
    if call.backend == "cuda":
        device = x_prev.device
        with backends.device_of(x_prev):
            native.library().posterior_step_cuda(
                *arguments,
                *value_or_address(seed),
                FIRST_COUNTER_STEP,
                *value_or_address(first_sample),
                native.multiprocessors(device),
                native.cuda_stream(device),
            )
        return
    numbers = low_bits(seed, 64), FIRST_COUNTER_STEP, low_bits(first_sample, 64)
    if not native.library().posterior_step_cpu(*arguments, *numbers, torch.get_num_threads()):
        raise step_error(int(step), len(call.packed))


def _launch_copies(call: Arguments, x_prev: Tensor, x_start: Maybe) -> None:
    """Through contiguous copies in dtypes that the kernels read."""
    copied = Arguments(*map(dense, call[:6]), *call[6:])  # type: ignore[arg-type]
    if copied.guidance_tensor is not None:
        copied = copied._replace(guidance_tensor=copied.guidance_tensor.float())
    results = allocate(copied)
    launch(copied, *results)
    for out, result in zip((x_prev, x_start), results, strict=True):
        if out is not None and result is not None:
            out.copy_(result)


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


kernel = Kernel("posterior_step", Arguments, allocate, launch, outputs=2)
