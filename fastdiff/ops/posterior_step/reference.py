"""One sampler step as the step table's equations write it (see fastdiff/methods/table.py)."""

from collections.abc import Sequence
from typing import Any

import torch

from fastdiff.methods.table import COLUMNS


def posterior_step(
    x_t: torch.Tensor,
    output: torch.Tensor,
    row: dict[str, torch.Tensor],
    *,
    variance_output: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    memory: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_prev, x_start) from x_t and the network's output, all (N, C, ...) in float32.

    ``row`` maps the table's column names to scalars. ``z`` is N(0, I), ``memory`` M0, M1 and M2 as
    far as there are; without them their terms are left out.
    """
    x_start = (row["a"] * x_t + row["b"] * output).clamp(-row["clip"], row["clip"])
    std = row["sigma"]
    if variance_output is not None:
        std = std * torch.exp(0.5 * log_variance(variance_output, row["log_min"], row["log_max"]))
    x_prev = _times(row["c"], x_start) + _times(row["d"], x_t) + _times(row["o"], output)
    for slot, kept in enumerate(memory):
        x_prev = x_prev + _times(row[f"e{slot}"], kept)
    if z is not None:
        x_prev = x_prev + torch.where(row["sigma"] != 0, std * z, 0.0)
    return x_prev, x_start


def keep(
    x_t: torch.Tensor,
    x_start: torch.Tensor,
    row: dict[str, torch.Tensor],
    memory: Sequence[torch.Tensor],
) -> None:
    """M_slot ← k·x_0 + q·x_t, in place; slot −1 is none of them."""
    kept = _times(row["k"], x_start) + _times(row["q"], x_t)
    for slot, tensor in enumerate(memory):
        tensor.copy_(torch.where(row["slot"] == slot, kept.to(tensor.dtype), tensor))


def of_call(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_prev, x_start) of a call's record (``Arguments`` of op.py), in the dtype of x_t;
    ``call.memory`` is written in place, ``call.prev_x_start`` only read."""
    x_t, packed, noise, before = call.x_t, call.packed, call.noise, call.prev_x_start
    step = call.step
    if isinstance(step, torch.Tensor):  # a gather on the device: no synchronisation
        row = packed.index_select(0, step.reshape(1))[0]
    else:
        row = packed[step]
    n, channels = x_t.shape[:2]
    output = guided_output(call)
    variance = call.model_output[:n, channels:].float() if call.learned_variance else None
    columns = dict(zip(COLUMNS, row.unbind(), strict=True))
    x_prev, x_start = posterior_step(
        x_t.float(),
        output,
        columns,
        variance_output=variance,
        z=None if noise is None else noise.float(),
        memory=[kept.float() for kept in (call.memory if before is None else [before])],
    )
    keep(x_t.float(), x_start, columns, call.memory)
    return x_prev.to(x_t.dtype), x_start.to(x_t.dtype)


def guided_output(call: Any) -> torch.Tensor:
    """What the network says of each sample, (N, C, ...) in float32: guided, and scaled."""
    x_t, scale = call.x_t, call.output_scale
    channels = x_t.shape[1]
    output = call.model_output[:, :channels].float()
    if call.guidance is not None:
        if call.unconditional is None:
            output, unconditional = output.chunk(2)
        else:
            unconditional = call.unconditional[:, :channels].float()
        output = guide(output, unconditional, call.guidance)
    return output if scale is None else scale.float().view(-1, *(1,) * (x_t.dim() - 1)) * output


def log_variance(
    v: torch.Tensor, log_min: torch.Tensor | float, log_max: torch.Tensor | float
) -> torch.Tensor:
    """v in [−1, 1] spans log_min … log_max; not clamped (Nichol & Dhariwal 2021, eq. 15)."""
    fraction = (v + 1) / 2
    return fraction * log_max + (1 - fraction) * log_min


def _times(coefficient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """coefficient·value, where a zero coefficient gives 0 even for a value that is not finite."""
    return torch.where(coefficient != 0, coefficient * value, 0.0)


def guide(
    conditional: torch.Tensor, unconditional: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022), (N, ...) each."""
    return unconditional + scale * (conditional - unconditional)
