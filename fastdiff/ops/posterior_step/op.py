"""posterior_step: one sampler step (DDPM, DDIM, DPM-Solver++) from one row of a StepTable."""

from typing import Any

import torch

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.methods.table import COLUMNS, StepTable
from fastdiff.ops import backends
from fastdiff.ops.backends import Choice
from fastdiff.ops.elementwise import split_counter, split_first_sample
from fastdiff.ops.normal import op as rng
from fastdiff.ops.posterior_step import reference as reference
from fastdiff.ops.posterior_step.launch import kind_of_call, know, known_calls, reads, step_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def posterior_step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    table: StepTable,
    step: int | torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    first_sample: int | torch.Tensor = 0,
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
        noise: (N, C, ...) standard normal. Or give ``seed``: sample i then draws the counter-based
            noise of sample ``first_sample + i`` at this step; both are ints, or int64 tensors of
            one element on the device. A row that draws no noise needs neither noise nor seed, and
            ignores what it is given; a ``step`` tensor counts as any row.
        prev_x_start: pred_x_start of the row before; DPM-Solver++ needs it (a first row does not
            read it, so a ``step`` tensor may start from zeros).
        guidance_scale: s in unconditional + s·(conditional − unconditional), a number or a tensor
            of one element; a learned variance is the conditional half's.
        return_x_start: False: the second result is None and is never written.

    Gradients are the reference's alone. Raises InputError for shapes, dtypes, devices or a ``step``
    that do not fit. Equations: fastdiff/methods/table.py.
    """
    key: tuple | None = None
    if backends.nobody_listens():
        # What was checked and planned once is neither checked nor planned again.
        key = kind_of_call(
            x_t, model_output, table, step, noise, seed, first_sample, prev_x_start, guidance_scale
        )
        known = None if key is None else known_calls.get(key)
        if known is not None:
            return known.run(
                x_t,
                model_output,
                table.packed,
                step,
                noise,
                seed,
                first_sample,
                prev_x_start,
                guidance_scale,
                return_x_start,
            )
    check_tensors(x_t, model_output, table, guidance_scale)
    _check_step(step, table, x_t.device)
    noisy, multistep = reads(table, step)
    _check_extras(x_t, noisy, multistep, noise, seed, prev_x_start)
    number, seed_tensor = split_counter("seed", seed if noisy else None, 2**64, x_t.device)
    first, first_tensor = split_first_sample(first_sample, len(x_t), x_t.device)
    backend, _ = _choose(x_t, model_output, noise, prev_x_start)
    # The native kernel looks at a step tensor by itself, where it runs at all; those for GPUs
    # answer NaN, emulated or not.
    if backend == "reference" or x_t.numel() == 0:
        _look_at_step(step, table)

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
        first,
        first_tensor,
        prev_x_start if multistep else None,
        guidance_scale if scale_tensor is None else None,
        scale_tensor,
        backend,
    )
    x_prev, x_start = result if return_x_start else (result, None)
    if key is not None:
        arguments = (noise, seed, prev_x_start, guidance_scale)
        know(key, x_t, model_output, table, step, *arguments, backend)
    return x_prev, x_start


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
    if backends.transforms():
        return backends.under_transforms("posterior_step"), backends.TRANSFORMS_REASON
    name = backends.named()
    device, dtype = x_t.device, x_t.dtype
    tracked = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x_t, *others)
    )
    if name is None:
        if tracked:
            return "reference", "only it is differentiable, and a gradient is wanted"
        of_call = (device, dtype, "posterior_step")
        return backends.default(*of_call), backends.default_reason(*of_call)
    if tracked and name != "reference":
        raise InputError(
            f"posterior_step: the backend {name!r} was named, but its kernel has no gradients and "
            "an input requires grad; use torch.no_grad(), or name 'reference'"
        )
    return backends.require("posterior_step", name, device, dtype), backends.NAMED_REASON


# --- The reference ----------------------------------------------------------------------------


def _reference(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    table: StepTable,
    step: int | torch.Tensor,
    noise: torch.Tensor | None,
    seed: int | torch.Tensor | None,
    first_sample: int | torch.Tensor,
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
        values = table.packed.index_select(0, step.reshape(1))[0]
    return dict(zip(COLUMNS, values.unbind(), strict=True))


def _counter_step(step: int | torch.Tensor) -> int | torch.Tensor:
    """The generator's numbering of the row, computed where ``step`` is."""
    if isinstance(step, int):
        return rng.sampling_step(step)
    return step.long() + rng.sampling_step(0)


# --- Checks -----------------------------------------------------------------------------------


def check_tensors(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    table: StepTable,
    guidance_scale: float | torch.Tensor | None,
) -> None:
    """InputError for tensors that do not fit each other."""
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
        raise step_error(step, len(table))


def _look_at_step(step: int | torch.Tensor, table: StepTable) -> None:
    """InputError for a step tensor on the CPU that names no row; elsewhere looking would stall."""
    if not isinstance(step, torch.Tensor) or step.device.type != "cpu":
        return
    if not torch.compiler.is_compiling() and not 0 <= int(step) < len(table):
        raise step_error(int(step), len(table))


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
