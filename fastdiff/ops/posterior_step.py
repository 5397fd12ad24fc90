"""posterior_step: one sampler step (DDPM, DDIM, DPM-Solver++) from one row of a StepTable."""

from typing import Any

import torch

from fastdiff import backends, native, rng
from fastdiff._checks import is_finite
from fastdiff.backends import Choice
from fastdiff.errors import InputError
from fastdiff.ops._elementwise import common_layout, remember, signed, split_counter, word
from fastdiff.reference import posterior_step as reference
from fastdiff.step_table import COLUMNS, StepTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def posterior_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    table: StepTable,
    step: int | torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    first_sample: int = 0,
    prev_x_start: torch.Tensor | None = None,
    guidance_scale: float | torch.Tensor | None = None,
    return_x_start: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply row ``step`` of ``table`` and return (x_prev, pred_x_start), both like ``x_t``.

    Args:
        x_t: (N, C, ...) in float32, bfloat16 or float16; the arithmetic is float32.
        model_output: (N, C, ...), or (N, 2C, ...) where the process learns its variance. With
            guidance the batch is 2N: the conditional half first, then the unconditional.
        table: rows of coefficients, on the device of ``x_t``.
        step: the row, 0 being the noisiest: an int, or an integer tensor of one element on the
            device, which is read where the step is computed.
        noise: (N, C, ...) standard normal. Or give ``seed`` (an int, or an int64 tensor of one
            element on the device): sample i then draws the counter-based noise of sample
            ``first_sample + i`` at this step. A row that draws no noise needs neither, and ignores
            what it is given; a ``step`` tensor counts as any row.
        prev_x_start: pred_x_start of the row before; DPM-Solver++ needs it (a first row does not
            read it, so a ``step`` tensor may start from zeros).
        guidance_scale: s in unconditional + s·(conditional − unconditional), a number or a tensor
            of one element; a learned variance is the conditional half's.
        return_x_start: False: the second result is None and is never written.

    Gradients are the reference's alone. Raises InputError for shapes, dtypes, devices or a ``step``
    that do not fit. Equations: fastdiff/step_table.py.
    """
    _check_tensors(x_t, model_output, table, guidance_scale)
    _check_step(step, table, x_t.device)
    noisy = _any_row(table.noisy_rows, step)
    multistep = _any_row(table.multistep_rows, step)
    _check_extras(x_t, noisy, multistep, noise, seed, prev_x_start)
    number, seed_tensor = split_counter("seed", seed if noisy else None, 2**64, x_t.device)
    first_sample = rng.check_counter("first_sample", first_sample, 2**64 - max(len(x_t) - 1, 0))
    backend, _ = _choose(x_t, model_output, noise, prev_x_start)

    if backend == "reference":
        return _reference(
            x_t,
            model_output,
            table,
            step,
            noise if noisy else None,
            seed if noisy else None,
            first_sample,
            prev_x_start if multistep else None,
            guidance_scale,
            return_x_start,
        )
    step_tensor = step if isinstance(step, torch.Tensor) else None
    scale_tensor = guidance_scale if isinstance(guidance_scale, torch.Tensor) else None
    operator = (
        torch.ops.fastdiff.posterior_step if return_x_start else torch.ops.fastdiff.posterior_x_prev
    )
    result = operator(
        x_t,
        model_output,
        table.packed,
        table.learned_variance,
        0 if step_tensor is not None else step,
        step_tensor,
        noise if noisy else None,
        number,
        seed_tensor,
        signed(first_sample),
        prev_x_start if multistep else None,
        guidance_scale if scale_tensor is None else None,
        scale_tensor,
        backend,
    )
    return result if return_x_start else (result, None)


def choose(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    table: StepTable,
    step: int | torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    prev_x_start: torch.Tensor | None = None,
    **_: Any,
) -> Choice:
    """What the plan picks for this call (``fastdiff.explain``)."""
    return Choice("posterior_step", *_choose(x_t, model_output, noise, prev_x_start))


def _choose(x_t: torch.Tensor, *others: torch.Tensor | None) -> tuple[str, str]:
    """(backend, reason)."""
    name = backends.named()
    device_type, dtype = x_t.device.type, x_t.dtype
    tracked = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x_t, *others)
    )
    if name is None:
        if tracked:
            return "reference", "only it is differentiable, and an input requires grad"
        return backends.default(device_type, dtype), backends.default_reason(device_type, dtype)
    if tracked and name != "reference":
        raise InputError(
            f"posterior_step: the backend {name!r} was named, but its kernel has no gradients and "
            "an input requires grad; use torch.no_grad(), or name 'reference'"
        )
    return backends.require("posterior_step", name, device_type, dtype), "named"


# --- The reference ----------------------------------------------------------------------------


def _reference(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    table: StepTable,
    step: int | torch.Tensor,
    noise: torch.Tensor | None,
    seed: int | torch.Tensor | None,
    first_sample: int,
    prev_x_start: torch.Tensor | None,
    guidance_scale: float | torch.Tensor | None,
    return_x_start: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if seed is not None:
        noise = rng.normal(
            x_t.shape,
            seed=seed,
            step=_counter_step(step),
            first_sample=first_sample,
            device=x_t.device,
        )
    output, variance_output = _split_output(model_output, x_t.shape[1], table, guidance_scale)
    x_prev, x_start = reference.posterior_step(
        x_t.float(),
        output,
        _row(table, step),
        variance_output=variance_output,
        z=None if noise is None else noise.float(),
        x_start_before=None if prev_x_start is None else prev_x_start.float(),
    )
    return x_prev.to(x_t.dtype), x_start.to(x_t.dtype) if return_x_start else None


def _split_output(
    model_output: torch.Tensor,
    channels: int,
    table: StepTable,
    guidance_scale: float | torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The float32 mean output and, where the table reads it, the variance output."""
    output = model_output[:, :channels].float()
    if guidance_scale is not None:
        output = reference.guide(output, guidance_scale)
    if not table.learned_variance:
        return output, None
    return output, model_output[: output.shape[0], channels:].float()


def _row(table: StepTable, step: int | torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(step, int):
        values = table.packed[step]
    else:  # a gather on the device: no synchronisation
        if step.device.type == "cpu" and not 0 <= int(step) < len(table):
            raise _step_error(int(step), len(table))
        values = table.packed.index_select(0, step.reshape(1))[0]
    return dict(zip(COLUMNS, values.unbind(), strict=True))


def _counter_step(step: int | torch.Tensor) -> int | torch.Tensor:
    """The generator's numbering of the row, computed where ``step`` is."""
    if isinstance(step, int):
        return rng.sampling_step(step)
    return step.long() + rng.sampling_step(0)


def _any_row(rows: tuple[bool, ...], step: int | torch.Tensor) -> bool:
    return rows[step] if isinstance(step, int) else any(rows)


# --- Checks -----------------------------------------------------------------------------------


def _check_tensors(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    table: StepTable,
    guidance_scale: float | torch.Tensor | None,
) -> None:
    for name, tensor in (("x_t", x_t), ("model_output", model_output)):
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{name} is a {type(tensor).__name__}; expected a tensor")
        if tensor.dtype not in DTYPES:
            raise InputError(f"{name} is {tensor.dtype}; expected float32, bfloat16 or float16")
    if not isinstance(table, StepTable):
        raise InputError(f"table is a {type(table).__name__}; expected a StepTable")
    if x_t.ndim < 2:
        raise InputError(f"x_t has shape {tuple(x_t.shape)}; expected (N, C, ...)")
    batch, channels, *size = x_t.shape
    batch *= 1 if guidance_scale is None else 2
    channels *= 2 if table.doubled_output else 1
    if tuple(model_output.shape) != (batch, channels, *size):
        why = [
            *(["two halves of the batch for guidance"] if guidance_scale is not None else []),
            *(["2C channels for the learned variance"] if table.doubled_output else []),
        ]
        raise InputError(
            f"model_output has shape {tuple(model_output.shape)}; expected "
            f"{(batch, channels, *size)} for x_t of shape {tuple(x_t.shape)}"
            + (f" ({' and '.join(why)})" if why else "")
        )
    for name, device in (("model_output", model_output.device), ("table", table.device)):
        if device != x_t.device:
            raise InputError(f"{name} is on {device}, x_t on {x_t.device}; move one to the other")
    if isinstance(guidance_scale, torch.Tensor):
        if guidance_scale.numel() != 1 or guidance_scale.device != x_t.device:
            raise InputError(
                f"guidance_scale is a tensor of shape {tuple(guidance_scale.shape)} on "
                f"{guidance_scale.device}; expected one element on {x_t.device}"
            )
    elif guidance_scale is not None and not is_finite(guidance_scale):
        raise InputError(f"guidance_scale is {guidance_scale!r}; expected a finite number")


def _check_step(step: int | torch.Tensor, table: StepTable, device: torch.device) -> None:
    if isinstance(step, torch.Tensor):
        if step.numel() != 1 or step.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"step is a {step.dtype} tensor of shape {tuple(step.shape)}; "
                "expected one int32 or int64 element"
            )
        if step.device != device:
            raise InputError(f"step is on {step.device}, x_t on {device}; move one to the other")
        return  # its value is read where the step is computed
    if not isinstance(step, int) or isinstance(step, bool):
        raise InputError(f"step is {step!r}; expected an int or an integer tensor of one element")
    if not 0 <= step < len(table):
        raise _step_error(step, len(table))


def _step_error(step: int, rows: int) -> InputError:
    return InputError(f"step is {step}; the table has rows 0 … {rows - 1}")


def _check_extras(
    x_t: torch.Tensor,
    noisy: bool,
    multistep: bool,
    noise: torch.Tensor | None,
    seed: int | torch.Tensor | None,
    prev_x_start: torch.Tensor | None,
) -> None:
    if noise is not None and seed is not None:
        raise InputError("noise and seed are both given; expected one of them")
    if noisy and noise is None and seed is None:
        raise InputError("this step draws noise; give noise=, or seed= to have it drawn")
    if multistep and prev_x_start is None:
        raise InputError(
            "this step is a second-order multistep one; give prev_x_start=, the pred_x_start that "
            "the step before returned"
        )
    for name, tensor in (("noise", noise), ("prev_x_start", prev_x_start)):
        if tensor is not None and (tensor.shape != x_t.shape or tensor.device != x_t.device):
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)} on {tensor.device}; "
                f"expected {tuple(x_t.shape)} on {x_t.device}, like x_t"
            )


# --- The operators: (x_prev, pred_x_start), or x_prev alone -----------------------------------

_ARGUMENTS = (
    "(Tensor x_t, Tensor model_output, Tensor packed, bool learned_variance, int step, "
    "Tensor? step_tensor, Tensor? noise, int? seed, Tensor? seed_tensor, int first_sample, "
    "Tensor? prev_x_start, float? guidance_scale, Tensor? guidance_tensor, str backend)"
)
_lib = torch.library.Library("fastdiff", "FRAGMENT")


def _x_prev_and_x_start(x_t: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x_start = torch.empty_like(x_t)
    return _run(x_t, *arguments, x_start), x_start


def _x_prev(*arguments: Any) -> torch.Tensor:
    return _run(*arguments, None)


def _run(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    packed: torch.Tensor,
    learned_variance: bool,
    step: int,
    step_tensor: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: int | None,
    seed_tensor: torch.Tensor | None,
    first_sample: int,
    prev_x_start: torch.Tensor | None,
    guidance_scale: float | None,
    guidance_tensor: torch.Tensor | None,
    backend: str,
    x_start: torch.Tensor | None,
) -> torch.Tensor:
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
    plan = _plan(
        x_t, model_output, noise, prev_x_start, x_prev, x_start, len(packed), shape, backend
    )
    if plan is None:  # strides that (channels, spatial) cannot say: through contiguous copies
        dense = [
            None if v is None else v.contiguous()
            for v in (x_t, model_output, noise, prev_x_start, x_start)
        ]
        result = _run(
            dense[0],
            dense[1],
            packed,
            learned_variance,
            step,
            step_tensor,
            dense[2],
            seed,
            seed_tensor,
            first_sample,
            dense[3],
            guidance_scale,
            guidance_tensor,
            backend,
            dense[4],
        )
        if x_start is not None and dense[4] is not x_start:
            x_start.copy_(dense[4])
        return x_prev.copy_(result)
    if backend == "triton":
        from fastdiff.kernels import posterior_step as kernels

        kernels.launch(
            plan,
            (x_t, model_output, packed, noise, prev_x_start, x_prev, x_start),
            step if step_tensor is None else step_tensor,
            seed if seed_tensor is None else seed_tensor,
            first_sample,
            guidance_scale if guidance_tensor is None else guidance_tensor,
        )
        return x_prev
    served = native.library().posterior_step_cpu(
        plan,
        x_t.data_ptr(),
        model_output.data_ptr(),
        packed.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        0 if prev_x_start is None else prev_x_start.data_ptr(),
        x_prev.data_ptr(),
        0 if x_start is None else x_start.data_ptr(),
        step,
        0 if step_tensor is None else step_tensor.data_ptr(),
        step_tensor is not None and step_tensor.dtype == torch.int64,
        guidance_scale or 0.0,
        0 if guidance_tensor is None else guidance_tensor.data_ptr(),
        draws,
        word(int(seed_tensor) if seed_tensor is not None else seed or 0, 64),
        rng.sampling_step(0),
        word(first_sample, 64),
        torch.get_num_threads(),
    )
    if not served:
        raise _step_error(step if step_tensor is None else int(step_tensor), len(packed))
    return x_prev


_plans: dict[tuple, Any] = {}


def _plan(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    noise: torch.Tensor | None,
    prev_x_start: torch.Tensor | None,
    x_prev: torch.Tensor,
    x_start: torch.Tensor | None,
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


def _fake_both(x_t: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x_t), torch.empty_like(x_t)


def _fake_x_prev(x_t: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x_t)


for _name, _returns, _impl, _fake in (
    ("posterior_step", "(Tensor, Tensor)", _x_prev_and_x_start, _fake_both),
    ("posterior_x_prev", "Tensor", _x_prev, _fake_x_prev),
):
    _lib.define(f"{_name}{_ARGUMENTS} -> {_returns}")
    for _key in ("CPU", "CUDA"):
        _lib.impl(_name, _impl, _key)
    torch.library.register_fake(f"fastdiff::{_name}", _fake, lib=_lib)
