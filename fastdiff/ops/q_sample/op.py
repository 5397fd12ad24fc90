"""q_sample: noise images to their timesteps, x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · noise."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.checks import check_float, check_like, check_timesteps
from fastdiff.errors import InputError
from fastdiff.ops import backends, dispatch, native
from fastdiff.ops.counters import (
    TRAINING_STEP_BASE,
    Counters,
    check_counter,
    check_first_sample,
    training_step,
    value_or_address,
)
from fastdiff.ops.differentiable import Kernel, Outputs
from fastdiff.ops.dispatch import Choice, MissingGradient
from fastdiff.ops.layouts import Maybe, address, call_elementwise, common_layout, dense
from fastdiff.ops.normal import draw_like, normal
from fastdiff.ops.plans import plan_of
from fastdiff.ops.q_sample.reference import q_sample as reference_q_sample


def q_sample(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int | Tensor = 0,
    step: int | Tensor = 0,
    return_noise: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Draw x_t from q(x_t | x_0) (Ho et al. 2020 eq. 4). Returns (x_t, noise), both like x_start.

    Args:
        x_start: (N, ...) of any floating dtype. The arithmetic is float32 (float64 for float64
            input) whatever the storage dtype. Gradients reach it, and ``noise``.
        t: (N,) integer, the tables' row of each sample.
        sqrt_alphas_cumprod: (K,), √ᾱ_t, the scale of the signal.
        sqrt_one_minus_alphas_cumprod: (K,), √(1 − ᾱ_t), that of the noise.
        noise: N(0, I) like x_start; not with ``seed``.
        seed: the noise is drawn from the counter-based generator, in the pass that uses it, in
            x_start's dtype: to the bit what ``fastdiff.ops.normal`` draws. Sample i of the batch
            takes the stream of sample ``first_sample + i`` at training step ``step``. Each of the
            three may be an int64 tensor of one element on x_start's device, which is read where the
            noise is drawn. With neither noise nor seed, torch.randn draws in logical order, so that
            channels_last changes no number.
        first_sample: with ``seed``, the number of the batch's first sample.
        step: with ``seed``, the training step.
        return_noise: False: the second result is None, and with ``seed`` no noise is written.

    Raises InputError for both noise and seed, a shape, dtype or device that does not fit, and, on
    the CPU, a t out of range. On other devices such a t gives NaN: reading it would stall them.
    """
    signal, sigma = sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod
    check_float(x_start, "x_start")
    rows = _table_length(signal, sigma, x_start)
    backend = choose(x_start, t, signal, sigma).backend
    # The native kernel looks at t by itself, where it runs at all; the CUDA kernel answers NaN,
    # emulated or not.
    looks = x_start.numel() == 0 or backend not in ("native", "cuda")
    t = check_timesteps(t, x_start, rows, "x_start", look=looks)
    if noise is not None:
        if seed is not None:
            raise InputError("q_sample takes noise or seed, not both")
        check_like(noise, "noise", x_start, "x_start")
    elif seed is None:
        noise = draw_like(x_start)
    counters = Counters() if seed is None else _counters(x_start, seed, step, first_sample)

    if backend == "reference":
        if noise is None:
            noise = _drawn(x_start, counters)
        x_t = reference_q_sample(x_start, t, signal, sigma, noise)
        return x_t, noise if return_noise else None
    returns_drawn = noise is None and return_noise
    call = Arguments(x_start, noise, t, signal, sigma, counters, returns_drawn, backend)
    result, drawn = _kernel(call, dispatch.wants_gradient(x_start, noise))
    assert result is not None
    return result, (drawn if noise is None else noise) if return_noise else None


_TABLES = MissingGradient(
    "only it has gradients for the tables",
    "its kernels have no gradients for the tables; name 'reference', or None for the plan's choice",
)


def choose(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    **_: Any,
) -> Choice:
    """Which backend serves this call, and why (``fastdiff.explain``)."""
    tracked = sqrt_alphas_cumprod.requires_grad or sqrt_one_minus_alphas_cumprod.requires_grad
    return dispatch.choose(OPERATION, x_start, _TABLES if tracked else None)


OPERATION = dispatch.register("q_sample", choose, kernels=("native", "triton", "cuda"))


def _table_length(first: Tensor, second: Tensor, x_start: Tensor) -> int:
    check_float(first, "sqrt_alphas_cumprod")
    check_like(second, "sqrt_one_minus_alphas_cumprod", first, "sqrt_alphas_cumprod")
    shape = first.shape
    if len(shape) != 1 or shape[0] == 0:
        raise InputError(
            f"the coefficient tables must have shape (K,) with K >= 1, got {tuple(shape)}"
        )
    if first.device != x_start.device:
        raise InputError(
            f"the coefficient tables are on {first.device} but x_start is on {x_start.device}"
        )
    return shape[0]


def _counters(
    x_start: Tensor, seed: int | Tensor, step: int | Tensor, first_sample: int | Tensor
) -> Counters:
    """The checked counters; ``step`` stays the training step's number."""
    device = x_start.device
    seed = check_counter("seed", seed, 2**64, device)
    step = check_counter("step", step, 2**32 - TRAINING_STEP_BASE, device)
    return Counters(step, seed, check_first_sample(first_sample, x_start.shape[0], device))


def _drawn(x_start: Tensor, counters: Counters) -> Tensor:
    """The noise by itself, in x_start's own dtype and layout."""
    step, seed, first_sample = counters
    assert seed is not None
    return normal(
        tuple(x_start.shape),
        seed=seed,
        step=step + TRAINING_STEP_BASE if isinstance(step, Tensor) else training_step(step),
        first_sample=first_sample,
        out=torch.empty_like(x_start, requires_grad=False),
    )


# --- Launching --------------------------------------------------------------------------------


class Arguments(NamedTuple):
    x_start: Tensor
    noise: Maybe  # None: drawn where the counters have a seed, else zero
    t: Tensor
    signal: Tensor
    sigma: Tensor
    counters: Counters  # their step is the training step's number
    returns_drawn: bool
    backend: str


def _allocate(call: Arguments) -> tuple[Tensor, Maybe]:
    """x_t, and the noise where it is drawn and wanted."""
    drawn = torch.empty_like(call.x_start) if call.returns_drawn else None
    return torch.empty_like(call.x_start), drawn


def _launch(call: Arguments, x_t: Tensor, drawn: Maybe) -> bool | None:
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


_kernel = Kernel("q_sample", Arguments, _allocate, _launch, outputs=2, readable=_readable)


# --- Gradients: the operation is its own derivative ---------------------------------------------


def _setup(ctx: Any, call: Arguments, outputs: Outputs) -> None:
    ctx.save_for_backward(*call[2:5])
    ctx.noise_dtype = None if call.noise is None else call.noise.dtype
    ctx.backend = call.backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Maybe, ...]:
    t, signal, sigma = ctx.saved_tensors

    def scaled(grad: Tensor, by: Tensor, other: Tensor) -> Maybe:
        call = Arguments(grad, None, t, by, other, Counters(), False, ctx.backend)
        return _kernel(call, dispatch.wants_gradient(grad))[0]

    x_start = scaled(grad, signal, sigma) if ctx.needs_input_grad[0] else None
    noise = scaled(grad.to(ctx.noise_dtype), sigma, signal) if ctx.needs_input_grad[1] else None
    return x_start, noise, None, None, None


_kernel.differentiate(_setup, _backward, returns=2)
