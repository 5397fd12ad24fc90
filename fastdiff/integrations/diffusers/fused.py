"""What all schedulers share: rows of coefficients in place of the stock step's arithmetic."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastdiff.methods.table import StepTable
from fastdiff.ops.posterior_step.op import DTYPES, posterior_step
from fastdiff.ops.q_sample.op import q_sample

MOST_TABLES = 8  # of one scheduler: its etas, devices, and set_timesteps of late
NOT_SET = "set_timesteps has not been called"


@dataclass(frozen=True, slots=True)
class Rows:
    """A step per row of ``table``, on the samples' device.

    ``refusals`` says of each row why the stock step has to take it, None where the table does;
    ``draws``, whether the stock step draws noise there (a row may give that noise no weight).
    ``x_start_is_output``: the network predicts x_0. ``kept``: the tensors that the rows were made
    from; alive as long as these are, their ids are nobody else's.
    """

    table: StepTable
    refusals: list[str | None]
    draws: list[bool]
    x_start_is_output: bool
    kept: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        columns: Mapping[str, Tensor | float],
        device: torch.device,
        *,
        kept: tuple[Tensor, ...],
        draws: bool | list[bool] = False,
        x_start_is_output: bool = False,
        doubled_output: bool = False,
        **own: Any,
    ) -> Self:
        """The rows with these (K,) columns. ``draws``: of each, or of all; ``own``: what a kind of
        rows has beside."""
        table, refusals = make_table(columns, device, doubled_output=doubled_output)
        return cls(
            table=table,
            refusals=refusals,
            draws=draws if isinstance(draws, list) else [draws] * len(refusals),
            x_start_is_output=x_start_is_output,
            kept=kept,
            **own,
        )


R = TypeVar("R", bound=Rows)

# A table and the row to apply, or why the stock step is to be taken.
Plan: TypeAlias = tuple[Rows, int] | str


class FusedScheduler:
    """Keeps the rows made last, and passes for the stock scheduler when it is saved.

    In front of a diffusers scheduler among a class's bases.
    """

    _rows_made: dict[Hashable, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "FusedScheduler":
        self = super().__new__(cls)
        self._rows_made = {}
        if cls.__module__.startswith("fastdiff."):
            # A pipeline saves (library, class name); it reads the library from the object.
            stock = next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))
            self.__module__ = stock.__module__
        return self

    def __getstate__(self) -> dict[str, Any]:
        """All but the rows, whose keys are ids of this process's tensors."""
        return self.__dict__ | {"_rows_made": {}}

    def why_stock(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, **options: Any
    ) -> str | None:
        """Why ``step``, called like this, would take diffusers' own step; None: it is fused.

        Stock are dynamic thresholding, coefficients that are not finite (ε from a sample without
        signal), DDPM's variance types "learned" and "fixed_large_log", DPM-Solver's algorithms
        "dpmsolver" and "sde-dpmsolver", Euler's churn, orders above the third, UniPC's ``solver_p``
        and its corrector of a sample that is not the one its last step returned, dtypes other than
        float32, bfloat16 and float16, shapes that broadcast, timesteps that are not in
        ``timesteps``, torch.compile, and whatever diffusers refuses.
        """
        plan = self._plan(model_output, timestep, sample, **options)
        return plan if isinstance(plan, str) else None

    def _plan(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, **options: Any
    ) -> Plan:
        raise NotImplementedError

    def _rows(self, key: Hashable, make: Callable[[], R | str]) -> R | str:
        rows: R | str | None = self._rows_made.get(key)
        if rows is None:
            if len(self._rows_made) >= MOST_TABLES:
                self._rows_made.clear()
            rows = self._rows_made[key] = make()
        return rows


def version(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as it counts."""
    return 0 if tensor.is_inference() else getattr(tensor, "_version", 0)


def make_table(
    columns: Mapping[str, Tensor | float], device: torch.device, *, doubled_output: bool = False
) -> tuple[StepTable, list[str | None]]:
    """The table with these (K,) columns, and of each row why it cannot be used, or None."""
    timesteps = columns["timesteps"]
    assert isinstance(timesteps, Tensor)
    size = timesteps.shape
    values = torch.stack(
        [torch.as_tensor(column).to(torch.float32).expand(size) for column in columns.values()], 1
    )
    names = list(columns)
    finite = values.isfinite()
    if "clip" in columns:
        finite[:, names.index("clip")] = True
    refusals = [
        None
        if all(row)
        else f"at timestep {t:g} the coefficient {names[row.index(False)]} is not finite"
        for row, t in zip(finite.tolist(), timesteps.tolist(), strict=True)
    ]
    usable = torch.where(finite, values, 0.0).tolist()
    rows = [dict(zip(names, row, strict=True)) for row in usable]
    return StepTable.from_rows(rows, doubled_output=doubled_output).to(device), refusals


def misfit(model_output: Tensor, sample: Tensor, *, doubled: bool = False) -> str | None:
    """Why the kernel does not take these tensors, or None; ``doubled``: the output has 2C channels,
    which the caller has looked at."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if model_output.shape != sample.shape and not doubled:
        return f"model_output has shape {tuple(model_output.shape)}, sample {tuple(sample.shape)}"
    if sample.ndim < 2:
        return f"sample has shape {tuple(sample.shape)}, not (N, C, ...)"
    for tensor in (sample, model_output):
        if tensor.dtype not in DTYPES:
            return f"{tensor.dtype} is not float32, bfloat16 or float16"
    if model_output.device != sample.device:
        return f"model_output is on {model_output.device}, sample on {sample.device}"
    return None


def noise_misfit(noise: Tensor, sample: Tensor, model_output: Tensor) -> str | None:
    """Why the kernel does not take a caller's noise, or None."""
    if noise.shape != sample.shape:
        return f"variance_noise has shape {tuple(noise.shape)}, sample {tuple(sample.shape)}"
    if noise.dtype != model_output.dtype or noise.device != sample.device:
        return f"variance_noise is {noise.dtype} on {noise.device}, unlike model_output"
    return None


def is_readable(kept: Any, sample: Tensor) -> bool:
    """Whether the kernel reads what an earlier step kept beside this sample."""
    return (
        isinstance(kept, Tensor)
        and (kept.shape, kept.device) == (sample.shape, sample.device)
        and kept.dtype in DTYPES
    )


def _writable(kept: Tensor) -> Tensor:
    """A tensor that the operator may write to, as it may to each slot: no expanded one, nor a leaf
    of a user's gradients."""
    return kept.clone() if kept.requires_grad or 0 in kept.stride() else kept


def apply(
    rows: Rows,
    row: int,
    model_output: Tensor,
    sample: Tensor,
    *,
    noise: Tensor | None = None,
    memory: Sequence[Tensor] = (),
    return_x_start: bool = True,
) -> tuple[Tensor, Tensor]:
    """(x_prev, x_start) by one row, in the dtypes that the stock step's arithmetic would give.

    ``memory``: what the row reads or writes, the first tensors of the table's slots. x_start is
    x_prev where it is not returned.
    """
    mixed = sample.dtype != model_output.dtype
    if mixed:
        sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
    table = rows.table
    slots = before = None
    if table.reading_rows[row] and table.keeps_x_start:
        (before,) = memory
    elif table.reading_rows[row] or table.slots_written[row] >= 0:
        slots = [_writable(kept) for kept in memory]
        slots += slots[-1:] * (table.slots - len(slots))
    x_prev, x_start = posterior_step(
        sample,
        model_output,
        table,
        row,
        noise=noise,
        memory=slots,
        prev_x_start=before,
        return_x_start=return_x_start,
    )
    if x_start is None:
        return x_prev, x_prev
    if mixed and rows.x_start_is_output:
        x_start = x_start.to(model_output.dtype)
    return x_prev, x_start


def combine(
    first: Tensor, second: Tensor, index: Tensor, first_scale: Tensor, second_scale: Tensor
) -> Tensor:
    """first_scale[index]·first + second_scale[index]·second, a sample (N, ...) per index (N,).

    The scales are (K,). What has one sample, or one index, serves all of them; an index counts
    from the end if it is negative, as diffusers' trailing timesteps may be.
    """
    index = index.flatten().to(first.device)
    shape = torch.broadcast_shapes((len(index), *[1] * (first.ndim - 1)), first.shape, second.shape)
    return q_sample(
        first.to(torch.promote_types(first.dtype, second.dtype)).expand(shape),
        torch.where(index < 0, index + len(first_scale), index).expand(shape[0]),
        first_scale,
        second_scale,
        noise=second.expand(shape),
        return_noise=False,
    )[0]
