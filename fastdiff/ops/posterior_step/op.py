"""posterior_step: one sampler step (DDPM, DDIM, DPM-Solver++) from one row of a StepTable."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.methods.table import COLUMNS, StepTable
from fastdiff.ops import dispatch
from fastdiff.ops.counters import Counters, check_counter, check_first_sample, sampling_step
from fastdiff.ops.dispatch import Choice
from fastdiff.ops.normal import normal
from fastdiff.ops.posterior_step import reference as reference
from fastdiff.ops.posterior_step.launch import Arguments, kernel, step_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def posterior_step(
    x_t: Tensor,
    model_output: Tensor,
    table: StepTable,
    step: int | Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int | Tensor = 0,
    prev_x_start: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    return_x_start: bool = True,
) -> tuple[Tensor, Tensor | None]:
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
    check_tensors(x_t, model_output, table, guidance_scale)
    _check_step(step, table, x_t.device)
    noisy, multistep = _reads(table, step)
    _check_extras(x_t, noisy, multistep, noise, seed, prev_x_start)
    if seed is not None:
        seed = check_counter("seed", seed, 2**64, x_t.device) if noisy else None
    first_sample = check_first_sample(first_sample, x_t.shape[0], x_t.device)
    counters = Counters(step, seed, first_sample)
    backend = _choose(x_t, model_output, noise, prev_x_start).backend
    noise = noise if noisy else None
    prev_x_start = prev_x_start if multistep else None
    # The native kernel looks at a step tensor by itself, where it runs at all; those for GPUs
    # answer NaN, emulated or not.
    if backend == "reference" or x_t.numel() == 0:
        _look_at_step(step, table)

    if backend == "reference":
        arguments = (table, counters, noise, prev_x_start, guidance_scale)
        x_prev, x_start = _reference(x_t, model_output, *arguments)
        return x_prev, x_start if return_x_start else None
    by_tensor = guidance_scale is not None and isinstance(guidance_scale, Tensor)
    scale: Any = None if guidance_scale is None or by_tensor else float(guidance_scale)
    guidance: Any = guidance_scale if by_tensor else None
    tensors = (x_t, model_output, table.packed, noise, prev_x_start, guidance)
    variance = table.learned_variance
    result, predicted = kernel(
        Arguments(*tensors, scale, variance, counters, return_x_start, backend)
    )
    assert result is not None
    return result, predicted if return_x_start else None


def choose(
    x_t: Tensor,
    model_output: Tensor,
    *_: Any,
    noise: Tensor | None = None,
    prev_x_start: Tensor | None = None,
    **__: Any,
) -> Choice:
    """Which backend serves this call, and why (``fastdiff.explain``)."""
    return _choose(x_t, model_output, noise, prev_x_start)


OPERATION = dispatch.register("posterior_step", choose, kernels=("native", "triton", "cuda"))


def _choose(x_t: Tensor, *others: Tensor | None) -> Choice:
    wanted = dispatch.wants_gradient(x_t, *others)
    return dispatch.choose(OPERATION, x_t, dispatch.NOT_DIFFERENTIABLE if wanted else None)


def _reads(table: StepTable, step: int | Tensor) -> tuple[bool, bool]:
    """Whether the step draws noise and reads prev_x_start; a tensor counts as any row."""
    if isinstance(step, int):
        return table.noisy_rows[step], table.multistep_rows[step]
    return table.is_noisy, table.is_multistep


def _reference(
    x_t: Tensor,
    model_output: Tensor,
    table: StepTable,
    counters: Counters,
    noise: Tensor | None,
    before: Tensor | None,
    guidance_scale: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    step, seed, first = counters
    if isinstance(step, Tensor):  # a gather on the device: no synchronisation
        row, step = table.packed.index_select(0, step.reshape(1))[0], step.long()
    else:
        row = table.packed[step]
    if seed is not None:
        counted = step + sampling_step(0)
        noise = normal(x_t.shape, seed=seed, step=counted, first_sample=first, device=x_t.device)
    n, channels = x_t.shape[:2]
    output = model_output[:, :channels].float()
    x_prev, x_start = reference.posterior_step(
        x_t.float(),
        output if guidance_scale is None else reference.guide(output, guidance_scale),
        dict(zip(COLUMNS, row.unbind(), strict=True)),
        variance_output=model_output[:n, channels:].float() if table.learned_variance else None,
        z=None if noise is None else noise.float(),
        x_start_before=None if before is None else before.float(),
    )
    return x_prev.to(x_t.dtype), x_start.to(x_t.dtype)


# --- Checks -----------------------------------------------------------------------------------


def check_tensors(
    x_t: Tensor,
    model_output: Tensor,
    table: StepTable,
    guidance_scale: float | Tensor | None,
) -> None:
    """InputError for tensors that do not fit each other."""
    for name, tensor in (("x_t", x_t), ("model_output", model_output)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is a {type(tensor).__name__}; expected a tensor")
        if tensor.dtype not in DTYPES:
            raise InputError(f"{name} is {tensor.dtype}; expected float32, bfloat16 or float16")
    if not isinstance(table, StepTable):
        raise InputError(f"table is a {type(table).__name__}; expected a StepTable")
    expected = tuple(x_t.shape)
    if len(expected) < 2:
        raise InputError(f"x_t has shape {expected}; expected (N, C, ...)")
    if guidance_scale is not None:
        expected = (2 * expected[0], *expected[1:])
    if table.doubled_output:
        expected = (expected[0], 2 * expected[1], *expected[2:])
    if model_output.shape != expected:
        why = [
            *(["two halves of the batch for guidance"] if guidance_scale is not None else []),
            *(["2C channels for the learned variance"] if table.doubled_output else []),
        ]
        raise InputError(
            f"model_output has shape {tuple(model_output.shape)}; expected "
            f"{expected} for x_t of shape {tuple(x_t.shape)}"
            + (f" ({' and '.join(why)})" if why else "")
        )
    where = x_t.device
    for name, device in (("model_output", model_output.device), ("table", table.packed.device)):
        if device != where:
            raise InputError(f"{name} is on {device}, x_t on {where}; move one to the other")
    if guidance_scale is None:
        return
    if isinstance(guidance_scale, Tensor):
        if guidance_scale.numel() != 1 or guidance_scale.device != x_t.device:
            raise InputError(
                f"guidance_scale is a tensor of shape {tuple(guidance_scale.shape)} on "
                f"{guidance_scale.device}; expected one element on {x_t.device}"
            )
    elif not is_finite(guidance_scale):
        raise InputError(f"guidance_scale is {guidance_scale!r}; expected a finite number")


def _check_step(step: int | Tensor, table: StepTable, device: torch.device) -> None:
    if type(step) is int and 0 <= step < len(table.noisy_rows):
        return
    if isinstance(step, Tensor):
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


def _look_at_step(step: int | Tensor, table: StepTable) -> None:
    """InputError for a step tensor on the CPU that names no row; elsewhere looking would stall."""
    if not isinstance(step, Tensor) or step.device.type != "cpu":
        return
    if not torch.compiler.is_compiling() and not 0 <= int(step) < len(table):
        raise step_error(int(step), len(table))


def _check_extras(
    x_t: Tensor,
    noisy: bool,
    multistep: bool,
    noise: Tensor | None,
    seed: int | Tensor | None,
    prev_x_start: Tensor | None,
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
