"""q_sample: noise images to their timesteps, x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · noise."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.checks import check_float, check_like, check_timesteps, timestep_error
from fastdiff.errors import InputError
from fastdiff.ops import dispatch, layouts, native
from fastdiff.ops.counters import TRAINING_STEP_BASE, Counter, check_counters, noise_arguments
from fastdiff.ops.differentiable import Kernel, Outputs
from fastdiff.ops.dispatch import OPERATIONS, Choice, Operation
from fastdiff.ops.layouts import Maybe
from fastdiff.ops.normal import draw_at, draw_like, drawn_apart
from fastdiff.ops.q_sample.reference import q_sample as reference_q_sample

OP = "q_sample"


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
            x_start's dtype: what ``fastdiff.ops.normal`` draws on that device. Sample i of the
            batch takes the stream of sample ``first_sample + i`` at training step ``step``. Each of
            the three may be an int64 tensor of one element on x_start's device, which is read where
            the noise is drawn. With neither noise nor seed, torch.randn draws in logical order, so
            that channels_last changes no number.
        first_sample: with ``seed``, the number of the batch's first sample.
        step: with ``seed``, the training step.
        return_noise: False: the second result is None, and with ``seed`` no noise is written.

    Raises InputError for both noise and seed, a shape, dtype or device that does not fit, and, on
    the CPU, a t out of range. On other devices such a t gives NaN: reading it would stall them.
    """
    signal, sigma = sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod
    check_float(x_start, "x_start")
    backend = choose(x_start, t, signal, sigma).backend
    if noise is not None and seed is not None:
        raise InputError("q_sample takes noise or seed, not both")
    if seed is not None:
        steps = 2**32 - TRAINING_STEP_BASE
        step, seed, first_sample = check_counters(step, seed, first_sample, steps, x_start)
    else:
        noise = draw_like(x_start) if noise is None else noise
        step = first_sample = 0  # nothing counts
    returned = noise is None and return_noise
    call = Arguments(x_start, noise, t, signal, sigma, returned, backend, step, seed, first_sample)
    # The native kernel looks at t by itself, where it runs at all; those for GPUs answer NaN. What
    # is left on the CPU is Triton's interpreter.
    if backend == "reference" or (x_start.is_cpu and (backend == "triton" or not x_start.numel())):
        _check(call, look=True)
    if seed is not None and (backend == "reference" or drawn_apart(backend)):
        noise = draw_at((step, seed, first_sample), TRAINING_STEP_BASE, x_start)
        call = call._replace(noise=noise, seed=None)
    if backend == "reference":
        assert noise is not None
        x_t = reference_q_sample(x_start, t.long(), signal, sigma, noise)
    else:
        x_t, drawn = _kernel(call, dispatch.wants_gradient(x_start, noise))
        noise = drawn if noise is None else noise
    return x_t, noise if return_noise else None


def choose(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    **_: Any,
) -> Choice:
    """Which backend serves this call, and why (``fastdiff.explain``)."""
    tracked = dispatch.wants_gradient(sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod)
    missing = "only 'reference' has gradients for the tables" if tracked else ""
    return dispatch.choose(OPERATION, x_start, missing)


OPERATION = OPERATIONS[OP] = Operation(OP, ("native", "triton", "cuda"), choose)


class Arguments(NamedTuple):
    x_start: Tensor
    noise: Maybe  # None: drawn where the counters have a seed, else zero
    t: Tensor
    signal: Tensor
    sigma: Tensor
    returns_both: bool
    backend: str
    step: Counter = 0  # the training step's number
    seed: Counter | None = None
    first_sample: Counter = 0


def _check(call: Arguments, *, look: bool = False) -> None:
    """InputError for tensors that do not fit each other; ``look``: and for values of t."""
    x_start, noise, t, signal, sigma, *_ = call
    check_float(signal, "sqrt_alphas_cumprod")
    check_like(sigma, "sqrt_one_minus_alphas_cumprod", signal, "sqrt_alphas_cumprod")
    if signal.dim() != 1 or signal.shape[0] == 0 or signal.device != x_start.device:
        raise InputError(
            "the coefficient tables must have shape (K,) with K >= 1 on x_start's device "
            f"{x_start.device}, got {tuple(signal.shape)} on {signal.device}"
        )
    check_timesteps(t, x_start, signal.shape[0], "x_start", look=look)
    if noise is not None:
        check_like(noise, "noise", x_start, "x_start")


def _layout(call: Arguments) -> Any:
    x_t = torch.empty_like(call.x_start)
    operands = [call.x_start, x_t if call.noise is None else call.noise, x_t]
    return layouts.common_layout(operands, counted=call.seed is not None)


def _readable(call: Arguments) -> Arguments:
    """With copies of what no kernel reads as it stands."""
    signal, sigma = call.signal.float().contiguous(), call.sigma.float().contiguous()
    call = call._replace(t=call.t.long().contiguous(), signal=signal, sigma=sigma)
    return call if _layout(call) else layouts.dense(call)


def _plan(call: Arguments) -> Any:
    """What fills x_t, and the noise that is drawn, for calls like this one."""
    backend = call.backend
    shape, operands = _layout(call)
    described = (shape, call.signal.shape[0], *operands)
    if backend == "triton":
        from fastdiff.kernels.q_sample import launch_for

        return launch_for(*described, draws=call.seed is not None)
    plan = native.library().QSample(*described)
    launch = functools.partial(native.launch_on, OP, backend, plan)

    def fill(*given: Any) -> None:
        x_start, noise, t, signal, sigma, x_t, drawn, step, seed, first_sample = given
        draws = seed is not None
        tensors = (x_start, t, signal, sigma, drawn if draws else noise, x_t)
        numbers = noise_arguments(backend, step, seed, first_sample, TRAINING_STEP_BASE)
        bad = launch(tensors, draws, *numbers)
        if bad is not None and bad >= 0:
            raise timestep_error(int(t[bad]), signal.shape[0])

    return fill


_kernel = Kernel(OP, Arguments, layouts.one_or_two_like, _plan, _check, _readable, outputs=2)


# --- Gradients: the operation is its own derivative ---------------------------------------------


def _setup(ctx: Any, call: Arguments, outputs: Outputs) -> None:
    ctx.save_for_backward(*call[2:5])
    ctx.noise_dtype = None if call.noise is None else call.noise.dtype
    ctx.backend = call.backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Maybe, ...]:
    t, signal, sigma = ctx.saved_tensors

    def scaled(grad: Tensor, by: Tensor, other: Tensor) -> Maybe:
        call = Arguments(grad, None, t, by, other, False, ctx.backend)
        return _kernel(call, dispatch.wants_gradient(grad))[0]

    x_start = scaled(grad, signal, sigma) if ctx.needs_input_grad[0] else None
    noise = scaled(grad.to(ctx.noise_dtype), sigma, signal) if ctx.needs_input_grad[1] else None
    return x_start, noise, None, None, None


_kernel.differentiate(_setup, _backward)
