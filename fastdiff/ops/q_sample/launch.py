"""Launching q_sample's kernels, and its gradients: x_t is linear in x_start and in the noise."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, dispatch, native
from fastdiff.ops.counters import TRAINING_STEP_BASE, Counters, low_bits, value_or_address
from fastdiff.ops.differentiable import Kernel, Outputs
from fastdiff.ops.layouts import Maybe, address, common_layout, dense
from fastdiff.ops.plans import plan_of


class Arguments(NamedTuple):
    x_start: Tensor
    noise: Maybe  # None: drawn where the counters have a seed, else zero
    t: Tensor
    signal: Tensor
    sigma: Tensor
    counters: Counters  # their step is the training step's number
    returns_drawn: bool
    backend: str


def allocate(call: Arguments) -> tuple[Tensor, Maybe]:
    """x_t, and the noise where it is drawn and wanted."""
    drawn = torch.empty_like(call.x_start) if call.returns_drawn else None
    return torch.empty_like(call.x_start), drawn


def launch(call: Arguments, x_t: Tensor, drawn: Maybe) -> None:
    """Fill both."""
    if x_t.numel() == 0:
        return
    step, seed, first_sample = call.counters
    x_start, noise, t, signal, sigma = call[:5]
    draws = seed is not None
    noise = drawn if draws else noise  # written, or read
    as_read = (
        signal.dtype == sigma.dtype == torch.float32
        and t.is_contiguous()
        and signal.is_contiguous()
        and sigma.is_contiguous()
    )
    plan = plan_of(_plan, (x_start, noise), signal.shape[0], draws, call.backend)
    if plan is None or not as_read:
        _launch_copies(call, x_t, drawn)
        return
    if call.backend == "triton":
        from fastdiff.kernels import q_sample as kernels

        tensors = (x_start, t, signal, sigma, noise, x_t)
        with backends.device_of(x_t):
            kernels.launch(plan, tensors, call.counters)
        return
    arguments = (
        plan,
        x_start.data_ptr(),
        t.data_ptr(),
        signal.data_ptr(),
        sigma.data_ptr(),
        address(noise),
        x_t.data_ptr(),
        draws,
    )
    seed = 0 if seed is None else seed
    if call.backend == "cuda":
        number, step_address = value_or_address(step, 32)
        with backends.device_of(x_t):
            native.library().q_sample_cuda(
                *arguments,
                *value_or_address(seed),
                (number + TRAINING_STEP_BASE) & 0xFFFFFFFF,
                step_address,
                *value_or_address(first_sample),
                native.multiprocessors(x_t.device),
                native.cuda_stream(x_t.device),
            )
        return
    counted = (int(step) + TRAINING_STEP_BASE) & 0xFFFFFFFF
    numbers = low_bits(seed, 64), counted, low_bits(first_sample, 64)
    bad = native.library().q_sample_cpu(*arguments, *numbers, torch.get_num_threads())
    if bad >= 0:
        raise InputError(
            f"t must lie in 0 … {len(signal) - 1} for a process of {len(signal)} steps, "
            f"got {int(t[bad])}"
        )


def _launch_copies(call: Arguments, x_t: Tensor, drawn: Maybe) -> None:
    """Through contiguous copies in dtypes that the kernels read."""
    x_start, noise, t, signal, sigma = call[:5]
    tables = signal.float().contiguous(), sigma.float().contiguous()
    copied = Arguments(x_start.contiguous(), dense(noise), t.contiguous(), *tables, *call[5:])
    results = allocate(copied)
    launch(copied, *results)
    for out, result in zip((x_t, drawn), results, strict=True):
        if out is not None and result is not None:
            out.copy_(result)


def _plan(x_start: Tensor, noise: Maybe, rows: int, draws: bool, backend: str) -> Any:
    """The kernel's description of these layouts; None where it reads none of the kind."""
    if noise is not None and noise.dtype not in native.DTYPE_CODES:
        return None
    operands = [x_start, x_start if noise is None else noise, torch.empty_like(x_start)]
    common = common_layout(operands, counted=draws)
    if common is None:
        return None
    arguments = (common[0], rows, *common[1])
    return arguments if backend == "triton" else native.library().QSample(*arguments)


kernel = Kernel("q_sample", Arguments, allocate, launch, outputs=2)


# --- Gradients: the operation is its own derivative ---------------------------------------------


def _setup(ctx: Any, call: Arguments, outputs: Outputs) -> None:
    ctx.save_for_backward(*call[2:5])
    ctx.noise_dtype = None if call.noise is None else call.noise.dtype
    ctx.backend = call.backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Maybe, ...]:
    t, signal, sigma = ctx.saved_tensors

    def scaled(grad: Tensor, by: Tensor, other: Tensor) -> Maybe:
        call = Arguments(grad, None, t, by, other, Counters(), False, ctx.backend)
        return kernel(call, dispatch.wants_gradient(grad))[0]

    x_start = scaled(grad, signal, sigma) if ctx.needs_input_grad[0] else None
    noise = scaled(grad.to(ctx.noise_dtype), sigma, signal) if ctx.needs_input_grad[1] else None
    return x_start, noise, None, None, None


kernel.differentiate(_setup, _backward, returns=2)
