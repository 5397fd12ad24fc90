"""q_sample's operators, their gradients and launch plans."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, native
from fastdiff.ops.elementwise import common_layout, contiguous_like, is_checked_counter
from fastdiff.ops.normal import op as rng
from fastdiff.ops.plans import remember

# Each of two: x_t alone, or x_t and the noise that was drawn for it. The first of a pair has an
# autograd formula; eager calls that need none take the second, whose dispatch is half as long.

# The numbers and tensors of seed, step and first sample; a tensor counts in place of its number.
Counters = tuple[int | None, Tensor | None, int, Tensor | None, int, Tensor | None]

_ARGUMENTS = (
    "(Tensor x_start, Tensor t, Tensor signal, Tensor sigma, Tensor? noise, "
    "int? seed, Tensor? seed_tensor, int step, Tensor? step_tensor, int first_sample, "
    "Tensor? first_sample_tensor, str backend)"
)
_lib = torch.library.Library("fastdiff", "FRAGMENT")


def launch(
    x_start: Tensor,
    t: Tensor,
    signal: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: int | None,
    seed_tensor: Tensor | None,
    step: int,
    step_tensor: Tensor | None,
    first_sample: int,
    first_sample_tensor: Tensor | None,
    returns_drawn: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    arguments = (x_start, t, signal, sigma, noise)
    counters = (seed, seed_tensor, step, step_tensor, first_sample, first_sample_tensor)
    if torch.compiler.is_compiling():
        if returns_drawn:
            return torch.ops.fastdiff.q_sample_drawn(*arguments, *counters, backend)
        return (torch.ops.fastdiff.q_sample(*arguments, *counters, backend),)
    if torch.is_grad_enabled() and (
        x_start.requires_grad or (noise is not None and noise.requires_grad)
    ):
        if returns_drawn:
            return _QSampleDrawn.apply(*arguments, *counters, backend)
        return (_QSample.apply(*arguments, *counters, backend),)
    if returns_drawn:
        return torch.ops.fastdiff.q_sample_drawn_inference(*arguments, *counters, backend)
    return (torch.ops.fastdiff.q_sample_inference(*arguments, *counters, backend),)


def _x_t(*arguments: Any) -> Tensor:
    return _run(None, *arguments)


def _x_t_and_noise(x_start: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    noise = torch.empty_like(x_start)
    return _run(noise, x_start, *arguments), noise


def _run(
    drawn: Tensor | None,
    x_start: Tensor,
    t: Tensor,
    signal: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: int | None,
    seed_tensor: Tensor | None,
    step: int,
    step_tensor: Tensor | None,
    first_sample: int,
    first_sample_tensor: Tensor | None,
    backend: str,
) -> Tensor:
    """x_t; the noise is ``noise``, drawn where there is a seed (and written to ``drawn``), or 0."""
    x_t = torch.empty_like(x_start)
    if x_start.numel() == 0:
        return x_t
    counts = seed is not None or seed_tensor is not None
    if noise is not None and noise.dtype not in native.DTYPE_CODES:
        noise = noise.float()
    written = drawn if counts else noise
    t = t.contiguous()
    if signal.dtype != torch.float32 or not signal.is_contiguous():
        signal = signal.float().contiguous()
    if sigma.dtype != torch.float32 or not sigma.is_contiguous():
        sigma = sigma.float().contiguous()
    plan = _plan(x_start, written, x_t, len(signal), counts, backend)
    if plan is None:  # strides that (channels, spatial) cannot say: through contiguous copies
        given = None if noise is None else noise.contiguous()
        copied = contiguous_like(drawn)
        counters = (seed, seed_tensor, step, step_tensor, first_sample, first_sample_tensor)
        dense = x_start.contiguous()
        result = _run(copied, dense, t, signal, sigma, given, *counters, backend)
        if drawn is not None and copied is not None:
            drawn.copy_(copied)
        return x_t.copy_(result)
    tensors = (x_start, t, signal, sigma, written, x_t)
    counted_step = step if step_tensor is None else step_tensor
    if backend == "triton":
        from fastdiff.kernels import q_sample as kernels

        drawn_seed = seed if seed_tensor is None else seed_tensor
        first = first_sample if first_sample_tensor is None else first_sample_tensor
        with backends.device_of(x_start):
            kernels.launch(plan, tensors, counts, drawn_seed, counted_step, first)
        return x_t
    drawn_seed = seed_tensor if seed is None else rng.low_bits(seed, 64)
    first = rng.low_bits(first_sample, 64) if first_sample_tensor is None else first_sample_tensor
    _call(backend, plan, *tensors, drawn_seed, counted_step, first)
    return x_t


def _call(
    backend: str,
    plan: Any,
    x_start: Tensor,
    t: Tensor,
    signal: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    x_t: Tensor,
    seed: int | Tensor | None,
    step: int | Tensor,
    first_sample: int | Tensor,
) -> None:
    """The native kernel or CUDA's. With a seed it writes the noise, without it reads it; numbers
    are not negative."""
    arguments = (
        plan,
        x_start.data_ptr(),
        t.data_ptr(),
        signal.data_ptr(),
        sigma.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        x_t.data_ptr(),
        seed is not None,
    )
    if backend == "cuda":
        seed, seed_address = rng.value_or_address(0 if seed is None else seed)
        step, step_address = rng.value_or_address(step)
        first_sample, first_sample_address = rng.value_or_address(first_sample)
        device = x_start.device
        with backends.device_of(x_start):
            native.library().q_sample_cuda(
                *arguments,
                seed,
                seed_address,
                (step + rng.TRAINING_STEP_BASE) & 0xFFFFFFFF,
                step_address,
                first_sample,
                first_sample_address,
                native.multiprocessors(device),
                native.cuda_stream(device),
            )
        return
    bad = native.library().q_sample_cpu(
        *arguments,
        rng.low_bits(seed, 64) if isinstance(seed, Tensor) else seed or 0,
        (int(step) + rng.TRAINING_STEP_BASE) & 0xFFFFFFFF,
        rng.low_bits(first_sample, 64),
        torch.get_num_threads(),
    )
    if bad >= 0:
        raise InputError(
            f"t must lie in 0 … {len(signal) - 1} for a process of {len(signal)} steps, "
            f"got {int(t[bad])}"
        )


# Backends and plans of calls that needed nothing beside the kernel, by all that they depend on.
known_plans: dict[tuple, tuple[str, Any]] = {}


def know(
    key: tuple,
    x_start: Tensor,
    t: Tensor,
    signal: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    x_t: Tensor,
    counted: bool,
    backend: str,
) -> None:
    """Keep the plan of a call that needs nothing beside the kernel; Triton keeps its own."""
    if backend == "triton":
        return
    inputs = [x_start, t, signal, sigma] + ([] if noise is None else [noise])
    as_the_kernel_reads = (
        all(type(v) is Tensor and not v.requires_grad for v in inputs)
        and t.dtype == torch.int64
        and signal.dtype == sigma.dtype == torch.float32
        and all(v.is_contiguous() for v in (t, signal, sigma))
        and (noise is None or noise.dtype in native.DTYPE_CODES)
    )
    if as_the_kernel_reads and x_start.numel():
        plan = _plan(x_start, noise, x_t, len(signal), counted, backend)
        if plan is not None:
            remember(known_plans, key, (backend, plan))


def are_known_counters(seed: Any, step: Any, first_sample: Any) -> bool:
    return (
        is_checked_counter(seed, 2**64)
        and is_checked_counter(step, 2**31)
        and is_checked_counter(first_sample, 2**63)
    )


def new_x_t(
    known: tuple[str, Any],
    x_start: Tensor,
    t: Tensor,
    signal: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Any,
    step: Any,
    first_sample: Any,
    return_noise: bool,
) -> tuple[Tensor, Tensor | None]:
    x_t = torch.empty_like(x_start)
    if seed is not None and return_noise:
        noise = torch.empty_like(x_start)
    counters = (None, 0, 0) if seed is None else (seed, step, first_sample)
    _call(*known, x_start, t, signal, sigma, noise, x_t, *counters)
    return x_t, noise if return_noise else None


_plans: dict[tuple, Any] = {}


def _plan(
    x_start: Tensor, noise: Tensor | None, x_t: Tensor, rows: int, counted: bool, backend: str
) -> Any:
    """The kernel's description of these layouts, or None where there is none."""
    given = None if noise is None else (noise.stride(), noise.dtype)
    key = (x_start.shape, x_start.stride(), x_start.dtype, given, rows, counted, backend)
    if key in _plans:
        return _plans[key]
    operands = [x_start, x_t, x_start if noise is None else noise]
    common = common_layout(operands, counted=counted)
    if common is None:
        return remember(_plans, key, None)
    shape, (first, last, middle) = common
    if backend == "triton":
        return remember(_plans, key, (shape, rows, first, middle, last))
    plan = native.library().QSample(shape, rows, first, middle, last)
    return remember(_plans, key, plan)


# --- Gradients: x_t is linear in x_start and noise, so the operator is its own derivative. -------


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    x_start, t, signal, sigma, noise = inputs[:5]
    ctx.save_for_backward(t, signal, sigma)
    ctx.noise_dtype = None if noise is None else noise.dtype
    ctx.backend = inputs[-1]
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    t, signal, sigma = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 12
    none = (None, None, None, 0, None, 0, None, False, ctx.backend)
    if ctx.needs_input_grad[0]:
        grads[0] = launch(grad, t, signal, sigma, *none)[0]
    if ctx.needs_input_grad[4]:
        grads[4] = launch(grad.to(ctx.noise_dtype), t, sigma, signal, *none)[0]
    return tuple(grads)


class _QSample(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return torch.ops.fastdiff.q_sample_inference(*arguments)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


class _QSampleDrawn(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.fastdiff.q_sample_drawn_inference(*arguments)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


def _fake_x_t(x_start: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_start)


def _fake_both(x_start: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_start), torch.empty_like(x_start)


for _name, _returns, _impl, _fake in (
    ("q_sample", "Tensor", _x_t, _fake_x_t),
    ("q_sample_drawn", "(Tensor, Tensor)", _x_t_and_noise, _fake_both),
):
    for _suffix in ("", "_inference"):
        _lib.define(f"{_name}{_suffix}{_ARGUMENTS} -> {_returns}")
        for _key in ("CPU", "CUDA"):
            _lib.impl(f"{_name}{_suffix}", _impl, _key)
        torch.library.register_fake(f"fastdiff::{_name}{_suffix}", _fake, lib=_lib)
    torch.library.register_autograd(
        f"fastdiff::{_name}", _backward, setup_context=_setup_context, lib=_lib
    )
