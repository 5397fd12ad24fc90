"""Every sampler step as one row of float32 coefficients, derived in float64.

For a Gaussian process q(x_t | x_0) = N(signal_t·x_0, noise_t²·I), each sampler step is

    x_0    = clip(a·x_t + b·output)
    x_prev = c·x_0 + d·x_t + o·output + e0·M0 + e1·M1 + e2·M2 + std·z,     z ~ N(0, I)
    std    = sigma·exp(½·(f·log_max + (1 − f)·log_min)),                   f = (v + 1) / 2
    M_slot ← k·x_0 + q·x_t

where v is the second half of the output's channels if the network learns the variance, and M0, M1
and M2 are tensors like x, in which methods of higher orders keep what later rows read: all are read
before one is written, and slot −1 writes none. A zero c, d, o, e, sigma, k or q
contributes nothing, whatever it multiplies. Variance-preserving (signal² + noise² = 1) and
variance-exploding (signal = 1) processes share the derivation. Sources: DDPM (Ho et al. 2020, eq.
6–7), Improved DDPM (Nichol & Dhariwal 2021, eq. 15), DDIM (Song et al. 2020, eq. 12 and 16),
DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095), v-prediction (Salimans & Ho 2022, appendix D).
Each method's columns stand in its own file beside this one.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
import torch

from fastdiff.errors import InputError
from fastdiff.methods import registry
from fastdiff.methods.levels import Columns, Float64Array, Levels, Source, is_learned
from fastdiff.methods.protocol import Process, noise_levels
from fastdiff.methods.rows import SLOTS, Row

Index = int | torch.Tensor  # of a row; a tensor of one element is read on its device

# The order of the packed tensor's columns: kernels read a row by these positions (68 bytes a row).
COLUMNS = (
    *("a", "b", "c", "d", "o", "e0", "e1", "e2", "sigma", "log_min", "log_max", "clip"),
    *("slot", "k", "q", "timesteps", "input_scale"),
)
DEFAULTS = dict.fromkeys(COLUMNS, 0.0) | {"clip": math.inf, "slot": -1.0, "input_scale": 1.0}


class _Column:
    """An attribute of StepTable that is the packed column of the same name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.index = COLUMNS.index(name)

    @overload
    def __get__(self, table: None, owner: type) -> "_Column": ...
    @overload
    def __get__(self, table: "StepTable", owner: type) -> torch.Tensor: ...
    def __get__(self, table: "StepTable | None", owner: type) -> "_Column | torch.Tensor":
        return self if table is None else table.packed[:, self.index]


@dataclass(frozen=True)
class StepTable:
    """K sampler steps in sampling order: row 0 is the noisiest, the last row arrives at x_0.

    ``packed`` is a float32 (K, 17) tensor whose columns are named in ``COLUMNS``; each is also an
    attribute, a (K,) view. ``clip`` is inf where x_0 is not clipped. ``timesteps`` is what the
    network is given and ``input_scale`` what x_t is multiplied by before the network sees it.
    ``method`` is what wrote the rows.

    What a program must know without reading the device: ``doubled_output``, the network returns 2C
    channels; ``learned_variance``, the second C of them set the standard deviation;
    ``scales_input``, some ``input_scale`` is not one; ``noisy_rows``, which rows draw noise;
    ``reading_rows``, which rows read memory, and ``slots_written``, where each writes, −1 being
    nowhere; ``slots``, how many tensors of memory there are; ``is_noisy``, whether any row draws
    noise; ``keeps_x_start``, memory is no more than the x_0 of the row before.

    Of a process's table also: ``levels``, (K, 2), the signal and noise of the x that each row
    reads; ``begins``, whether that x is a sample of the process, not a trial point within a step.
    """

    packed: torch.Tensor
    method: str
    doubled_output: bool
    learned_variance: bool
    scales_input: bool
    noisy_rows: tuple[bool, ...]
    reading_rows: tuple[bool, ...]
    slots_written: tuple[int, ...]
    slots: int
    keeps_x_start: bool
    levels: Float64Array | None = field(default=None, compare=False)
    begins: tuple[bool, ...] = ()
    # Not a cached property, which takes a lock in Python 3.11 that torch.compile cannot take.
    is_noisy: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_noisy", any(self.noisy_rows))

    a = _Column()
    b = _Column()
    c = _Column()
    d = _Column()
    o = _Column()
    e0 = _Column()
    e1 = _Column()
    e2 = _Column()
    sigma = _Column()
    log_min = _Column()
    log_max = _Column()
    clip = _Column()
    slot = _Column()
    k = _Column()
    q = _Column()
    timesteps = _Column()
    input_scale = _Column()

    @classmethod
    def from_process(
        cls,
        process: Process,
        *,
        method: str = "ddpm",
        eta: float | None = None,
        clip_denoised: bool = True,
        clipped_eps: bool = True,
        start: int = 0,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> "StepTable":
        """The table by which ``method`` samples a GaussianDiffusion or another Process.

        ``eta`` is the share of noise of methods that have one (DDIM: 0 deterministic, 1 the DDPM
        posterior's variance); None is the method's own default. ``clip_denoised`` clips x_0 to
        [−1, 1]. ``clipped_eps=True`` re-derives DDIM's ε from the clipped x_0, as the published
        code does; False leaves it as the network said, as diffusers does by default. ``start``
        leaves out so many of the noisiest steps, for a start from data noised to the level after
        them (image-to-image). ``dtype`` float64 is for arithmetic in float64, which no kernel does.
        ``options``: the method's own, as its file names them.
        Raises InputError for an unknown method, option or type, an ``eta`` the process does not
        allow, noise levels that do not rise, a ``start`` that is no step, and ε-prediction from a
        step without signal.
        """
        chosen = registry.find(method)
        accepted = chosen.accepted(options, eta=eta, clipped_eps=clipped_eps)
        source = Source.of(Levels.of(*noise_levels(process)), process)
        steps = len(source.a)
        source = source.last(steps - _checked_start(start, steps))
        made = chosen.columns(source, **accepted)
        written = _of_rows(made) if isinstance(made, list) else _by_step(source, made)
        columns, there, begins = written
        columns["clip"] = np.full(len(begins), 1.0 if clip_denoised else np.inf)
        rows = np.stack([columns[name] for name in COLUMNS], axis=1)
        table = cls._of(rows, method, is_learned(process.var_type))
        packed = torch.from_numpy(rows.copy()).to(dtype)
        return replace(table, packed=packed, levels=there, begins=begins)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Mapping[str, float]],
        *,
        method: str = "ddpm",
        doubled_output: bool = False,
    ) -> "StepTable":
        """Steps whose coefficients are known: another codebase's sampler, in its own arithmetic.

        Args:
            rows: K mappings in sampling order, from names in ``COLUMNS`` to numbers. What a row
                leaves out is 0, but ``clip`` inf, ``input_scale`` 1 and ``slot`` −1;
                ``timesteps`` has to be given.
            method: a registered name; "ddpm" with ``doubled_output`` means that ``log_min`` and
                ``log_max`` are used.
            doubled_output: the network returns 2C channels.

        Raises InputError for no rows, unknown names, numbers that are NaN and slots that are none.
        """
        registry.find(method)
        for i, row in enumerate(rows):
            unknown = sorted(set(row) - set(COLUMNS))
            if unknown or "timesteps" not in row:
                what = f"{unknown[0]!r} is no column" if unknown else "timesteps is missing"
                raise InputError(f"row {i}: {what}; expected {', '.join(COLUMNS)}")
        try:
            values = np.array([[float((DEFAULTS | dict(row))[n]) for n in COLUMNS] for row in rows])
        except (TypeError, ValueError) as error:
            raise InputError(f"rows hold what is no number: {error}") from None
        if not len(values) or np.isnan(values).any():
            raise InputError(f"{len(values)} rows, NaN in some; expected one or more of numbers")
        slots = values[:, COLUMNS.index("slot")]
        if not np.isin(slots, np.arange(-1, SLOTS)).all():
            raise InputError(f"slot is {slots.tolist()}; expected −1 (none) … {SLOTS - 1}")
        return cls._of(values, method, doubled_output)

    @classmethod
    def _of(cls, values: Float64Array, method: str, doubled_output: bool) -> "StepTable":
        """From (K, 17) values in sampling order."""
        packed = torch.from_numpy(values.astype(np.float32, order="C"))
        factors = packed[:, [COLUMNS.index(f"e{slot}") for slot in range(SLOTS)]].numpy()
        written = packed[:, COLUMNS.index("slot")].int().tolist()
        kept = packed[:, [COLUMNS.index("k"), COLUMNS.index("q")]].tolist()
        read = np.flatnonzero(factors.any(0)).tolist()
        slots = 1 + max([-1, *read, *written])
        return cls(
            packed=packed,
            method=method,
            doubled_output=doubled_output,
            learned_variance=doubled_output and registry.find(method).learned_variance,
            scales_input=bool((packed[:, COLUMNS.index("input_scale")] != 1).any()),
            noisy_rows=tuple((packed[:, COLUMNS.index("sigma")] != 0).tolist()),
            reading_rows=tuple((factors != 0).any(1).tolist()),
            slots_written=tuple(written),
            slots=slots,
            keeps_x_start=slots < 2
            and all(kept[i] == [1.0, 0.0] for i, slot in enumerate(written) if slot >= 0),
        )

    def __len__(self) -> int:
        return self.packed.shape[0]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def at(self, column: str, i: Index) -> torch.Tensor:
        """A column's value at row ``i``, where the table is: () for a number, else (1,)."""
        values = getattr(self, column)
        return values[i] if isinstance(i, int) else values.index_select(0, i)

    def to(self, device: torch.device | str) -> "StepTable":
        """The same table on ``device``."""
        return replace(self, packed=self.packed.to(device))


def _checked_start(start: int, steps: int) -> int:
    try:
        first = operator.index(start)
    except TypeError:
        raise InputError(f"start must be an integer, got {start!r}") from None
    if not 0 <= first < steps:
        raise InputError(f"start is {first}; the process has steps 0 … {steps - 1} to start from")
    return first


def _by_step(source: Source, own: Columns) -> tuple[Columns, Float64Array, tuple[bool, ...]]:
    """All columns of a method that has a row a step, in sampling order, the rows' levels, and that
    each begins a step; ``own``: the method's, t ascending."""
    steps = len(source.a)
    predicted = {name: getattr(source, name) for name in ("a", "b", "timesteps", "input_scale")}
    columns = {name: np.full(steps, value) for name, value in DEFAULTS.items()} | predicted | own
    for name, values in columns.items():
        if np.shape(values) != (steps,):
            raise InputError(
                f"{name} has shape {np.shape(values)}; expected ({steps},), one value a step"
            )
    there = np.array([(level.signal, level.noise) for level in source.steps])
    return {name: values[::-1] for name, values in columns.items()}, there, (True,) * steps


def _of_rows(rows: list[Row]) -> tuple[Columns, Float64Array, tuple[bool, ...]]:
    """The same of a method's Rows."""
    each = [DEFAULTS | row.columns() for row in rows]
    columns = {name: np.array([row[name] for row in each]) for name in COLUMNS}
    there = np.array([(row.at.signal, row.at.noise) for row in rows])
    return columns, there, tuple(row.begins for row in rows)
