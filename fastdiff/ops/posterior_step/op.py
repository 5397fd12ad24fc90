"""posterior_step: one sampler step (DDPM, DDIM, DPM-Solver++) from one row of a StepTable."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.methods.rows import SLOTS
from fastdiff.methods.table import StepTable
from fastdiff.ops import counters, dispatch, layouts, native
from fastdiff.ops.backends import KERNEL_DTYPES as DTYPES
from fastdiff.ops.checks import check_tensor, refusal
from fastdiff.ops.counters import Counter, arguments, value_or_address
from fastdiff.ops.differentiable import Kernel, Written
from fastdiff.ops.dispatch import OPERATIONS, Choice, Operation
from fastdiff.ops.layouts import Maybe
from fastdiff.ops.normal import draw_at, drawn_apart
from fastdiff.ops.posterior_step import reference

OP = "posterior_step"
FIRST_COUNTER_STEP = counters.sampling_step(0)


def posterior_step(
    x_t: Tensor,
    model_output: Tensor,
    table: StepTable,
    step: int | Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int | Tensor = 0,
    memory: Sequence[Tensor] | None = None,
    prev_x_start: Tensor | None = None,
    unconditional: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    output_scale: Tensor | None = None,
    return_x_start: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Apply row ``step`` of ``table`` and return (x_prev, pred_x_start), both like ``x_t``.

    Args:
        x_t: (N, C, ...) in float32, bfloat16 or float16; the arithmetic is float32.
        model_output: (N, C, ...), or (N, 2C, ...) where the process learns its variance. With
            guidance the batch is 2N: the conditional half first, then the unconditional, unless
            ``unconditional`` is that.
        table: rows of coefficients, on the device of ``x_t``.
        step: the row, 0 being the noisiest: an int, or an integer tensor of one element on the
            device, which is read where the step is computed.
        noise: (N, C, ...) standard normal. Or give ``seed``: sample i then draws the counter-based
            noise of sample ``first_sample + i`` at this step; both are ints, or int64 tensors of
            one element on the device. A row that draws no noise needs neither noise nor seed, and
            ignores what it is given; a ``step`` tensor counts as any row.
        memory: ``table.slots`` tensors like ``x_t``, M0, M1, …, which the row reads and of which it
            writes one in place. What they hold before the first row counts for nothing.
        prev_x_start: in place of ``memory`` where that is no more than pred_x_start of the row
            before (``table.keeps_x_start``), which is only read. A first row does not read it, so a
            ``step`` tensor may start from zeros.
        unconditional: the network's answers without the condition, or those of a worse network
            (autoguidance, Karras et al. 2024, arXiv:2406.02507): (N, C, ...), or (N, 2C, ...) of
            which the first C channels count.
        guidance_scale: s in unconditional + s·(conditional − unconditional), a number or a tensor
            of one element; a learned variance is the conditional half's.
        output_scale: (N,), what each sample's output is multiplied by after guidance: rescaled
            guidance (Lin et al. 2023, arXiv:2305.08891, eq. 15–16).
        return_x_start: False: the second result is None and is never written.

    Gradients are the reference's alone. Raises InputError for shapes, dtypes, devices or a ``step``
    that do not fit. Equations: fastdiff/methods/table.py.
    """
    _check_images("x_t", x_t)
    if not isinstance(table, StepTable):
        raise refusal(OP, "table", table, "a StepTable")
    noisy, reads = _what_is_read(step, table, x_t)
    if noise is not None and seed is not None:
        raise InputError(f"{OP}: noise and seed are both given; expected one of them")
    if noisy and noise is None and seed is None:
        raise InputError(f"{OP}: this step draws noise; give noise=, or seed= to have it drawn")
    slots = _slots(memory, prev_x_start, table, step, reads, x_t)
    if noise is not None and not noisy:
        check_tensor(OP, "noise", noise, x_t, x_t.shape)
    if prev_x_start is not None and not reads:
        check_tensor(OP, "prev_x_start", prev_x_start, x_t, x_t.shape)
    given = (noise, prev_x_start, *slots, unconditional, guidance_scale, output_scale)
    backend = choose(x_t, model_output, *given).backend
    noise, prev_x_start = noise if noisy else None, prev_x_start if reads else None
    seed = counters.check_seed(seed, x_t) if noisy else None
    first_sample = counters.check_first_sample(first_sample, x_t)
    if seed is not None and (backend == "reference" or drawn_apart(backend)):
        drawn = (step, seed, first_sample)
        noise, seed = draw_at(drawn, FIRST_COUNTER_STEP, x_t, torch.float32), None
    # The native kernel looks at a step tensor by itself, where it runs at all; those for GPUs
    # answer NaN, emulated or not: looking would stall.
    if (backend == "reference" or x_t.numel() == 0) and isinstance(step, Tensor) and step.is_cpu:
        if not torch.compiler.is_compiling() and not 0 <= int(step) < len(table):
            raise step_error(int(step), len(table))

    guidance, scale = None, None
    if guidance_scale is not None:  # first, as isinstance(None, Tensor) is slow
        if isinstance(guidance_scale, Tensor):
            guidance = guidance_scale
        elif is_finite(guidance_scale):
            scale = float(guidance_scale)
        else:
            raise InputError(
                f"{OP}: guidance_scale is {guidance_scale!r}; expected a finite number"
            )
    call = Arguments(
        x_t, model_output, table.packed, noise, prev_x_start, *slots,
        unconditional, guidance, output_scale, scale,
        table.doubled_output, table.learned_variance, return_x_start, backend,
        step, seed, first_sample,
    )  # fmt: skip
    if backend == "reference":
        _check(call)
    x_prev, x_start = reference.of_call(call) if backend == "reference" else _kernel(call)
    return x_prev, x_start if return_x_start else None


def choose(
    x_t: Tensor, *others: Any, memory: Sequence[Tensor] | None = None, **named: Any
) -> Choice:
    """Which backend serves this call, and why (``fastdiff.explain``)."""
    wanted = dispatch.wants_gradient(x_t, *others, *(memory or ()), *named.values())
    return dispatch.choose(OPERATION, x_t, dispatch.NO_GRADIENTS if wanted else "")


OPERATION = OPERATIONS[OP] = Operation(OP, ("native", "triton", "cuda"), choose)


def _slots(
    memory: Sequence[Tensor] | None,
    prev_x_start: Tensor | None,
    table: StepTable,
    step: int | Tensor,
    reads: bool,
    x_t: Tensor,
) -> tuple[Maybe, Maybe, Maybe]:
    """M0, M1 and M2 as far as the table has them and the step reads or writes memory."""
    none, count = (None, None, None), table.slots
    if not count and memory is None and prev_x_start is None:
        return none
    if prev_x_start is not None:
        if memory is not None:
            raise InputError(f"{OP}: memory and prev_x_start are both given; expected one of them")
        if not table.keeps_x_start:
            raise InputError(
                f"{OP}: prev_x_start is given, but this table's rows keep more than that; give "
                f"memory=, {count} tensors like x_t"
            )
        return none
    writes = isinstance(step, Tensor) or table.slots_written[step] >= 0
    if memory is None:
        if reads and table.keeps_x_start:
            raise InputError(
                f"{OP}: this step is a second-order multistep one; give prev_x_start=, the "
                "pred_x_start that the step before returned, or memory="
            )
        if reads or (writes and not table.keeps_x_start):
            raise InputError(
                f"{OP}: this step reads or keeps what other steps use; give memory=, {count} "
                "tensors like x_t, the same ones at every step"
            )
        return none
    if len(memory) != count:
        raise InputError(f"{OP}: memory has {len(memory)} tensors; expected the table's {count}")
    if not (reads or writes):
        for slot, tensor in enumerate(memory):
            _check_slot(slot, tensor, x_t)
        return none
    m0, m1, m2 = (*memory, *none)[:SLOTS]
    return m0, m1, m2


def _check_slot(slot: int, tensor: Tensor, x_t: Tensor) -> None:
    """A tensor that can be written: no two of its elements are one in memory."""
    name = f"memory[{slot}]"
    check_tensor(OP, name, tensor, x_t, x_t.shape)
    if tensor.dtype not in DTYPES:
        raise refusal(OP, name, tensor, "float32, bfloat16 or float16")
    repeated = any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if repeated:
        raise InputError(f"{OP}: {name} is expanded; expected a tensor that can be written")


def check_tensors(
    x_t: Tensor,
    output: Tensor,
    packed: Tensor,
    doubled: bool,
    guidance: float | Tensor | None,
    unconditional: Maybe = None,
) -> None:
    """InputError for tensors that do not fit each other."""
    _check_images("model_output", output)
    n, channels, *spatial = x_t.shape
    guided = guidance is not None and unconditional is None
    expected = (2 * n if guided else n, 2 * channels if doubled else channels, *spatial)
    if output.shape != expected:
        why = "; two halves of the batch for guidance" if guided else ""
        why += "; 2C channels for the learned variance" if doubled else ""
        fits = f"{expected} for x_t of shape {tuple(x_t.shape)}{why}"
        raise refusal(OP, "model_output", output, fits)
    for name, tensor in (("model_output", output), ("table", packed)):
        if tensor.device != x_t.device:
            raise refusal(OP, name, tensor, f"it on {x_t.device}, where x_t is")
    if isinstance(guidance, Tensor) and (guidance.numel() != 1 or guidance.device != x_t.device):
        raise refusal(OP, "guidance_scale", guidance, f"one element on {x_t.device}")
    if unconditional is not None:
        if guidance is None:
            raise InputError(f"{OP}: unconditional is given; give guidance_scale= too")
        either = (n, channels, *spatial), (n, 2 * channels, *spatial)
        check_tensor(OP, "unconditional", unconditional, x_t, *either)


def _check(call: "Arguments") -> None:
    x_t = call.x_t
    check_tensors(
        x_t, call.model_output, call.packed, call.doubled_output, call.guidance, call.unconditional
    )
    for slot, held in enumerate(call.memory):
        _check_slot(slot, held, x_t)
    if call.output_scale is not None:
        check_tensor(OP, "output_scale", call.output_scale, x_t, x_t.shape[:1])
    for name, tensor in (("noise", call.noise), ("prev_x_start", call.prev_x_start)):
        if tensor is not None:
            check_tensor(OP, name, tensor, x_t, x_t.shape)


def _check_images(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.dim() < 2:
        raise refusal(OP, name, tensor, "(N, C, ...) in float32, bfloat16 or float16")


def _what_is_read(step: int | Tensor, table: StepTable, x_t: Tensor) -> tuple[bool, bool]:
    """Whether a step, which is checked, draws noise and reads prev_x_start."""
    if isinstance(step, Tensor):  # its value is read where the step is computed: any row
        integer = step.dtype in (torch.int32, torch.int64)
        if step.numel() != 1 or not integer or step.device != x_t.device:
            raise refusal(OP, "step", step, f"one int32 or int64 element on {x_t.device}")
        return table.is_noisy, table.slots > 0
    if not isinstance(step, int) or isinstance(step, bool):
        raise InputError(f"{OP}: step is {step!r}; expected an int or a tensor of one element")
    if not 0 <= step < len(table.noisy_rows):
        raise step_error(step, len(table))
    return table.noisy_rows[step], table.reading_rows[step]


def step_error(step: int, rows: int) -> InputError:
    return InputError(f"step is {step}; the table has rows 0 … {rows - 1}")


class Arguments(NamedTuple):
    x_t: Tensor
    model_output: Tensor
    packed: Tensor  # the table's
    noise: Maybe
    prev_x_start: Maybe
    memory0: Written
    memory1: Written
    memory2: Written
    unconditional: Maybe
    guidance_tensor: Maybe
    output_scale: Maybe
    guidance_scale: float | None  # where no tensor says it
    doubled_output: bool  # the network returns 2C channels
    learned_variance: bool
    returns_both: bool
    backend: str
    step: Counter  # the table's row
    seed: Counter | None
    first_sample: Counter

    @property
    def guidance(self) -> float | Tensor | None:
        return self.guidance_scale if self.guidance_tensor is None else self.guidance_tensor

    @property
    def memory(self) -> tuple[Tensor, ...]:
        return tuple(v for v in (self.memory0, self.memory1, self.memory2) if v is not None)


def _layout(call: Arguments) -> Any:
    """Of x_t, the output, what is given besides (of x_t where it is not), x_prev and x_start."""
    batch, channels = call.x_t.shape[:2]
    x_prev = torch.empty_like(call.x_t)
    unconditional = None if call.unconditional is None else call.unconditional[:, :channels]
    before = call.memory0 if call.prev_x_start is None else call.prev_x_start
    given = (unconditional, call.noise, before, call.memory1, call.memory2)
    others = (call.x_t if v is None else v for v in given)
    operands = [call.x_t, call.model_output[:batch, :channels], *others, x_prev, x_prev]
    return layouts.common_layout(operands, counted=call.seed is not None)


def _readable(call: Arguments) -> Arguments:
    """With copies of what no kernel reads as it stands."""
    guidance = None if call.guidance_tensor is None else call.guidance_tensor.float()
    scale = None if call.output_scale is None else call.output_scale.float().contiguous()
    call = call._replace(
        packed=call.packed.contiguous(), guidance_tensor=guidance, output_scale=scale
    )
    return call if _layout(call) else layouts.dense(call)


def _plan(call: Arguments) -> Any:
    """What fills x_prev and x_start for calls like this one."""
    backend, rows, scale = call.backend, call.packed.shape[0], call.guidance_scale or 0.0
    shape, (x_t, output, *others) = _layout(call)
    n, channels = call.x_t.shape[:2]
    variance = channels * call.model_output.stride(1) if call.learned_variance else -1
    guided = call.guidance is not None
    halves = guided and call.unconditional is None
    unconditional = n * call.model_output.stride(0) if halves else -1
    described = (shape, rows, x_t, output, variance, unconditional, *others)
    keeps, draws = len(call.memory) > 0, call.seed is not None
    if backend == "triton":
        from fastdiff.kernels.posterior_step import launch_for

        options = {"guided": guided, "guidance": scale, "draws": draws, "keeps": keeps}
        launched = launch_for(*described, **options)

        def fill_by_triton(
            x_t: Tensor, output: Tensor, packed: Tensor, noise: Maybe, before: Maybe, m0: Maybe,
            *others: Any,
        ) -> None:  # fmt: skip
            launched(x_t, output, packed, noise, m0 if before is None else before, *others)

        return fill_by_triton

    plan = native.library().PosteriorStep(*described)
    launch = functools.partial(native.launch_on, OP, backend, plan)

    def fill(*given: Any) -> None:
        x_t, output, packed, noise, before, m0, *others, step, seed, first_sample = given
        tensors = (x_t, output, packed, noise, m0 if before is None else before, *others)
        wide_step = isinstance(step, Tensor) and step.dtype == torch.int64
        row = (keeps, *value_or_address(step), wide_step, scale, draws)
        noise = *arguments(backend, seed), FIRST_COUNTER_STEP, *arguments(backend, first_sample)
        if launch(tensors, *row, *noise) is False:
            raise step_error(int(step), rows)

    return fill


_kernel = Kernel(OP, Arguments, layouts.one_or_two_like, _plan, _check, _readable, outputs=2)
