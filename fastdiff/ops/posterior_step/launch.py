"""posterior_step's operators, (x_prev, pred_x_start) and x_prev alone, and their launch plans."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.methods.table import StepTable
from fastdiff.ops import backends, native
from fastdiff.ops.elementwise import common_layout, contiguous_like, described, is_checked_counter
from fastdiff.ops.normal import op as rng
from fastdiff.ops.plans import remember

_ARGUMENTS = (
    "(Tensor x_t, Tensor model_output, Tensor packed, bool learned_variance, int step, "
    "Tensor? step_tensor, Tensor? noise, int? seed, Tensor? seed_tensor, int first_sample, "
    "Tensor? first_sample_tensor, Tensor? prev_x_start, float? guidance_scale, "
    "Tensor? guidance_tensor, str backend)"
)
FIRST_COUNTER_STEP = rng.sampling_step(0)

_lib = torch.library.Library("fastdiff", "FRAGMENT")


def _x_prev_and_x_start(x_t: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    x_start = torch.empty_like(x_t)
    return _run(x_start, x_t, *arguments), x_start


def _x_prev(*arguments: Any) -> Tensor:
    return _run(None, *arguments)


def _run(
    x_start: Tensor | None,
    x_t: Tensor,
    model_output: Tensor,
    packed: Tensor,
    learned_variance: bool,
    step: int,
    step_tensor: Tensor | None,
    noise: Tensor | None,
    seed: int | None,
    seed_tensor: Tensor | None,
    first_sample: int,
    first_sample_tensor: Tensor | None,
    prev_x_start: Tensor | None,
    guidance_scale: float | None,
    guidance_tensor: Tensor | None,
    backend: str,
) -> Tensor:
    x_prev = torch.empty_like(x_t)
    if x_t.numel() == 0:
        return x_prev
    guided = guidance_scale is not None or guidance_tensor is not None
    draws = seed is not None or seed_tensor is not None
    if noise is not None and noise.dtype not in native.DTYPE_CODES:
        noise = noise.float()
    if prev_x_start is not None and prev_x_start.dtype not in native.DTYPE_CODES:
        prev_x_start = prev_x_start.float()
    if guidance_tensor is not None and guidance_tensor.dtype != torch.float32:
        guidance_tensor = guidance_tensor.float()
    if not packed.is_contiguous():
        packed = packed.contiguous()
    shape = (learned_variance, guided, draws)
    plan = plan_of(
        x_t, model_output, noise, prev_x_start, x_prev, x_start, len(packed), shape, backend
    )
    if plan is None:  # strides that (channels, spatial) cannot say: through contiguous copies
        copied = contiguous_like(x_start)
        result = _run(
            copied,
            x_t.contiguous(),
            model_output.contiguous(),
            packed,
            learned_variance,
            step,
            step_tensor,
            None if noise is None else noise.contiguous(),
            seed,
            seed_tensor,
            first_sample,
            first_sample_tensor,
            None if prev_x_start is None else prev_x_start.contiguous(),
            guidance_scale,
            guidance_tensor,
            backend,
        )
        if x_start is not None and copied is not None:
            x_start.copy_(copied)
        return x_prev.copy_(result)
    tensors = (x_t, model_output, packed, noise, prev_x_start, x_prev, x_start)
    row = step if step_tensor is None else step_tensor
    scale = guidance_scale if guidance_tensor is None else guidance_tensor
    if backend == "triton":
        from fastdiff.kernels import posterior_step as kernels

        drawn_seed = seed if seed_tensor is None else seed_tensor
        first = first_sample if first_sample_tensor is None else first_sample_tensor
        with backends.device_of(x_t):
            kernels.launch(plan, tensors, row, drawn_seed, first, scale)
        return x_prev
    drawn_seed = seed_tensor if seed is None else rng.low_bits(seed, 64)
    first = rng.low_bits(first_sample, 64) if first_sample_tensor is None else first_sample_tensor
    _call(backend, plan, *tensors, row, drawn_seed, first, scale)
    return x_prev


def _call(
    backend: str,
    plan: Any,
    x_t: Tensor,
    model_output: Tensor,
    packed: Tensor,
    noise: Tensor | None,
    prev_x_start: Tensor | None,
    x_prev: Tensor,
    x_start: Tensor | None,
    step: int | Tensor,
    seed: int | Tensor | None,
    first_sample: int | Tensor,
    guidance_scale: float | Tensor | None,
) -> None:
    """The native kernel or CUDA's, on tensors that are as the plan says; numbers are not
    negative."""
    row, row_address = rng.value_or_address(step)
    scale, scale_address = 0.0, 0
    if isinstance(guidance_scale, Tensor):
        scale_address = guidance_scale.data_ptr()
    elif guidance_scale is not None:
        scale = guidance_scale
    arguments = (
        plan,
        x_t.data_ptr(),
        model_output.data_ptr(),
        packed.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        0 if prev_x_start is None else prev_x_start.data_ptr(),
        x_prev.data_ptr(),
        0 if x_start is None else x_start.data_ptr(),
        row,
        row_address,
        isinstance(step, Tensor) and step.dtype == torch.int64,
        scale,
        scale_address,
        seed is not None,
    )
    if backend == "cuda":
        seed, seed_address = rng.value_or_address(0 if seed is None else seed)
        first_sample, first_sample_address = rng.value_or_address(first_sample)
        device = x_t.device
        with backends.device_of(x_t):
            native.library().posterior_step_cuda(
                *arguments,
                seed,
                seed_address,
                FIRST_COUNTER_STEP,
                first_sample,
                first_sample_address,
                native.multiprocessors(device),
                native.cuda_stream(device),
            )
        return
    served = native.library().posterior_step_cpu(
        *arguments,
        rng.low_bits(seed, 64) if isinstance(seed, Tensor) else seed or 0,
        FIRST_COUNTER_STEP,
        rng.low_bits(first_sample, 64),
        torch.get_num_threads(),
    )
    if not served:
        raise step_error(int(step), len(packed))


_plans: dict[tuple, Any] = {}


def plan_of(
    x_t: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    prev_x_start: Tensor | None,
    x_prev: Tensor,
    x_start: Tensor | None,
    rows: int,
    uses: tuple[bool, bool, bool],
    backend: str,
) -> Any:
    """The kernel's description of these layouts, or None where there is none."""
    key = (
        x_t.shape,
        x_t.stride(),
        x_t.dtype,
        model_output.stride(),
        model_output.dtype,
        None if noise is None else (noise.stride(), noise.dtype),
        None if prev_x_start is None else (prev_x_start.stride(), prev_x_start.dtype),
        rows,
        uses,
        backend,
    )
    if key in _plans:
        return _plans[key]
    learned_variance, guided, draws = uses
    batch, channels = x_t.shape[:2]
    output = model_output[:batch, :channels]
    operands = [x_t, output, *(x_t if v is None else v for v in (noise, prev_x_start)), x_prev]
    operands.append(x_prev if x_start is None else x_start)
    common = common_layout(operands, counted=draws)
    if common is None:
        return remember(_plans, key, None)
    shape, layouts = common
    offsets = (
        channels * model_output.stride(1) if learned_variance else -1,
        batch * model_output.stride(0) if guided else -1,
    )
    arguments = (shape, rows, *layouts[:2], *offsets, *layouts[2:])
    if backend == "triton":
        return remember(_plans, key, arguments)
    return remember(_plans, key, native.library().PosteriorStep(*arguments))


def _fake_both(x_t: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_t), torch.empty_like(x_t)


def _fake_x_prev(x_t: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_t)


for _name, _returns, _impl, _fake in (
    ("posterior_step", "(Tensor, Tensor)", _x_prev_and_x_start, _fake_both),
    ("posterior_x_prev", "Tensor", _x_prev, _fake_x_prev),
):
    _lib.define(f"{_name}{_ARGUMENTS} -> {_returns}")
    for _key in ("CPU", "CUDA"):
        _lib.impl(_name, _impl, _key)
    torch.library.register_fake(f"fastdiff::{_name}", _fake, lib=_lib)


def reads(table: StepTable, step: int | Tensor) -> tuple[bool, bool]:
    """Whether the step draws noise and reads prev_x_start; a tensor counts as any row."""
    if isinstance(step, int):
        return table.noisy_rows[step], table.multistep_rows[step]
    return table.is_noisy, table.is_multistep


# --- Calls like those before ------------------------------------------------------------------


class _Known(NamedTuple):
    """A backend, its plan, and which of the arguments it reads."""

    backend: str
    plan: Any
    noisy: bool
    multistep: bool

    def run(
        self,
        x_t: Tensor,
        model_output: Tensor,
        packed: Tensor,
        step: int | Tensor,
        noise: Tensor | None,
        seed: Any,
        first_sample: Any,
        prev_x_start: Tensor | None,
        guidance_scale: Any,
        return_x_start: bool,
    ) -> tuple[Tensor, Tensor | None]:
        x_prev = torch.empty_like(x_t)
        x_start = torch.empty_like(x_t) if return_x_start else None
        noise = noise if self.noisy else None
        before = prev_x_start if self.multistep else None
        tensors = (x_t, model_output, packed, noise, before, x_prev, x_start)
        seed = seed if self.noisy else None
        _call(self.backend, self.plan, *tensors, step, seed, first_sample, guidance_scale)
        return x_prev, x_start


known_calls: dict[tuple, _Known] = {}


def kind_of_call(
    x_t: Tensor,
    model_output: Tensor,
    table: StepTable,
    step: int | Tensor,
    noise: Tensor | None,
    seed: int | Tensor | None,
    first_sample: int | Tensor,
    prev_x_start: Tensor | None,
    guidance_scale: float | Tensor | None,
) -> tuple | None:
    """All that the checks and the plan of a call depend on; None for calls that are not kept."""
    if type(table) is not StepTable or not is_checked_counter(first_sample, 2**63):
        return None
    if not (seed is None or is_checked_counter(seed, 2**64)):
        return None
    at: tuple | None
    if type(step) is int:
        if not 0 <= step < len(table.noisy_rows):
            return None
        at = (table.noisy_rows[step], table.multistep_rows[step])
    else:
        at = (described(step), table.is_noisy, table.is_multistep)
    scale: tuple | type | bool
    if type(guidance_scale) is float:
        if not math.isfinite(guidance_scale):
            return None
        scale = True
    else:
        scale = described(guidance_scale)
    return (
        *map(described, (x_t, model_output, table.packed, noise, prev_x_start)),
        at,
        described(seed),
        described(first_sample),
        scale,
        table.doubled_output,
        table.learned_variance,
        backends.named(),
    )


def know(
    key: tuple,
    x_t: Tensor,
    model_output: Tensor,
    table: StepTable,
    step: int | Tensor,
    noise: Tensor | None,
    seed: int | Tensor | None,
    prev_x_start: Tensor | None,
    guidance_scale: float | Tensor | None,
    backend: str,
) -> None:
    """Keep the plan of a call that needs nothing beside the kernel; Triton keeps its own."""
    if backend == "triton":
        return
    noisy, multistep = reads(table, step)
    noise = noise if noisy else None
    prev_x_start = prev_x_start if multistep else None
    extras = [v for v in (noise, prev_x_start, step, guidance_scale) if type(v) is Tensor]
    as_the_kernel_reads = (
        all(type(v) is Tensor for v in (x_t, model_output, table.packed))
        and not any(v.requires_grad for v in (x_t, model_output, *extras))
        and table.packed.is_contiguous()
        and all(v is None or v.dtype in native.DTYPE_CODES for v in (noise, prev_x_start))
        and (not isinstance(guidance_scale, Tensor) or guidance_scale.dtype == torch.float32)
        and (guidance_scale is None or isinstance(guidance_scale, float | Tensor))
    )
    if not as_the_kernel_reads or x_t.numel() == 0:
        return
    uses = (table.learned_variance, guidance_scale is not None, noisy and seed is not None)
    operands = (x_t, model_output, noise, prev_x_start, torch.empty_like(x_t), None)
    plan = plan_of(*operands, len(table), uses, backend)
    if plan is not None:
        remember(known_calls, key, _Known(backend, plan, noisy, multistep))


def step_error(step: int, rows: int) -> InputError:
    return InputError(f"step is {step}; the table has rows 0 … {rows - 1}")
