"""Launching q_sample's kernels, and its gradients: x_t is linear in x_start and in the noise."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, dispatch, native
from fastdiff.ops.counters import TRAINING_STEP_BASE, Counters, value_or_address
from fastdiff.ops.differentiable import Kernel, Outputs
from fastdiff.ops.layouts import Maybe, address, call_elementwise, common_layout, dense
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


def launch(call: Arguments, x_t: Tensor, drawn: Maybe) -> bool | None:
    """Fill both."""
    x_start, noise, t, signal, sigma, counters, _, backend = call
    step, seed, first_sample = counters
    draws = seed is not None
    noise = drawn if draws else noise  # written, or read
    as_read = signal.dtype == sigma.dtype == torch.float32 and (
        t.is_contiguous() and signal.is_contiguous() and sigma.is_contiguous()
    )
    rows = signal.shape[0]
    plan = plan_of(_plan, (x_start, noise), rows, draws, backend)
    if plan is None or not as_read:
        return False
    tensors = (x_start, t, signal, sigma, noise, x_t)
    if backend == "triton":
        from fastdiff.kernels import q_sample as kernels

        with backends.device_of(x_t):
            kernels.launch(plan, tensors, counters)
        return None
    number, place = value_or_address(step, 32) if backend == "cuda" else (int(step), 0)
    counted = (number + TRAINING_STEP_BASE) & 0xFFFFFFFF
    arguments = (plan, *map(address, tensors), draws)
    bad = call_elementwise(
        "q_sample", backend, x_t, arguments, seed, (counted, place), first_sample
    )
    if bad is not None and bad >= 0:
        raise InputError(
            f"t must lie in 0 … {rows - 1} for a process of {rows} steps, got {int(t[bad])}"
        )
    return None


def _readable(call: Arguments) -> Arguments:
    """On contiguous copies in dtypes that the kernels read."""
    return call._replace(
        x_start=call.x_start.contiguous(),
        noise=dense(call.noise),
        t=call.t.contiguous(),
        signal=call.signal.float().contiguous(),
        sigma=call.sigma.float().contiguous(),
    )


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


kernel = Kernel("q_sample", Arguments, allocate, launch, outputs=2, readable=_readable)


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
