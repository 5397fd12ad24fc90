"""Every sampler step as one row of float32 coefficients, derived in float64.

For a Gaussian process q(x_t | x_0) = N(signal_t·x_0, noise_t²·I), each first-order sampler step is

    x_0    = clip(a·x_t + b·output)
    x_prev = c·x_0 + d·x_t + o·output + e·x_0_before + std·z,     z ~ N(0, I)
    std    = sigma·exp(½·(f·log_max + (1 − f)·log_min)),          f = (v + 1) / 2

where v is the second half of the output's channels if the network learns the variance, and
x_0_before is the x_0 of the row before. A zero c, d, o, e or sigma contributes nothing,
whatever it multiplies. Variance-preserving (signal² + noise² = 1) and variance-exploding
(signal = 1) processes share the derivation. Sources: DDPM (Ho et al. 2020, eq. 6–7), Improved
DDPM (Nichol & Dhariwal 2021, eq. 15), DDIM (Song et al. 2020, eq. 12 and 16), DPM-Solver++(2M)
and its SDE form (Lu et al. 2022, arXiv:2211.01095), v-prediction (Salimans & Ho 2022, appendix D).
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
from fastdiff.methods.levels import Float64Array, Levels, Source, is_learned
from fastdiff.methods.protocol import Process, noise_levels

Index = int | torch.Tensor  # of a row; a tensor of one element is read on its device

# The order of the packed tensor's columns: kernels read a row by these positions (48 bytes a row).
COLUMNS = (
    *("a", "b", "c", "d", "o", "e", "sigma", "log_min", "log_max", "clip"),
    *("timesteps", "input_scale"),
)


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

    ``packed`` is a float32 (K, 12) tensor whose columns are named in ``COLUMNS``; each is also an
    attribute, a (K,) view. ``clip`` is inf where x_0 is not clipped. ``timesteps`` is what the
    network is given and ``input_scale`` what x_t is multiplied by before the network sees it.
    ``method`` is what wrote the rows.

    What a program must know without reading the device: ``doubled_output``, the network returns 2C
    channels; ``learned_variance``, the second C of them set the standard deviation;
    ``scales_input``, some ``input_scale`` is not one; ``noisy_rows``, which rows draw noise;
    ``multistep_rows``, which rows read the x_0 of the row before; ``is_noisy`` and
    ``is_multistep``, whether any does.
    """

    packed: torch.Tensor
    method: str
    doubled_output: bool
    learned_variance: bool
    scales_input: bool
    noisy_rows: tuple[bool, ...]
    multistep_rows: tuple[bool, ...]
    # Not cached properties, which take a lock in Python 3.11 that torch.compile cannot take.
    is_noisy: bool = field(init=False)
    is_multistep: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_noisy", any(self.noisy_rows))
        object.__setattr__(self, "is_multistep", any(self.multistep_rows))

    a = _Column()
    b = _Column()
    c = _Column()
    d = _Column()
    o = _Column()
    e = _Column()
    sigma = _Column()
    log_min = _Column()
    log_max = _Column()
    clip = _Column()
    timesteps = _Column()
    input_scale = _Column()

    @classmethod
    def from_process(
        cls,
        process: Process,
        *,
        method: str = "ddpm",
        eta: float = 0.0,
        clip_denoised: bool = True,
        clipped_eps: bool = True,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> "StepTable":
        """The table by which ``method`` samples a GaussianDiffusion or another Process.

        ``eta`` is DDIM's (0 deterministic, 1 the DDPM posterior's variance). ``clip_denoised``
        clips x_0 to [−1, 1]. ``clipped_eps=True`` re-derives DDIM's ε from the clipped x_0, as the
        published code does; False leaves it as the network said, as diffusers does by default.
        ``dtype`` float64 is for arithmetic in float64, which no kernel does. ``options``: of a
        method of your own.
        Raises InputError for an unknown method, option or type, an ``eta`` the process does not
        allow, noise levels that do not rise, and ε-prediction from a step without signal.
        """
        chosen = registry.find(method)
        given = options if eta == 0.0 else {**options, "eta": eta}
        for name, value in given.items():
            if name not in chosen.options:
                owners = " or ".join(map(repr, registry.taking(name))) or "none that there is"
                raise InputError(f"{name}={value} belongs to method {owners}, not to {method!r}")
        shared = {"eta": eta, "clipped_eps": clipped_eps}
        options |= {name: shared[name] for name in shared.keys() & chosen.options}
        levels = Levels.of(*noise_levels(process))
        source = Source.of(levels, process)
        steps = len(levels.signal)
        columns = dict.fromkeys(COLUMNS, np.zeros(steps)) | {
            "a": source.a,
            "b": source.b,
            "clip": np.full(steps, 1.0 if clip_denoised else np.inf),
            "timesteps": process.model_timesteps,
            "input_scale": process.input_scale,
        }
        columns |= chosen.columns(source, **options)
        for name, values in columns.items():
            if np.shape(values) != (steps,):
                raise InputError(
                    f"{name} has shape {np.shape(values)}; expected ({steps},), one value a step"
                )
        rows = np.stack([columns[name] for name in COLUMNS], axis=1)[::-1]
        table = cls._of(rows, method, is_learned(process.var_type))
        return replace(table, packed=torch.from_numpy(rows.copy()).to(dtype))

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
                leaves out is 0, but ``clip`` inf and ``input_scale`` 1; ``timesteps`` has to be
                given.
            method: a registered name; "ddpm" with ``doubled_output`` means that ``log_min`` and
                ``log_max`` are used.
            doubled_output: the network returns 2C channels.

        Raises InputError for no rows, unknown names, and numbers that are NaN.
        """
        registry.find(method)
        defaults = dict.fromkeys(COLUMNS, 0.0) | {"clip": math.inf, "input_scale": 1.0}
        for i, row in enumerate(rows):
            unknown = sorted(set(row) - set(COLUMNS))
            if unknown or "timesteps" not in row:
                what = f"{unknown[0]!r} is no column" if unknown else "timesteps is missing"
                raise InputError(f"row {i}: {what}; expected {', '.join(COLUMNS)}")
        values = np.array([[float((defaults | dict(row))[n]) for n in COLUMNS] for row in rows])
        if not len(values) or np.isnan(values).any():
            raise InputError(f"{len(values)} rows, NaN in some; expected one or more of numbers")
        return cls._of(values, method, doubled_output)

    @classmethod
    def _of(cls, values: Float64Array, method: str, doubled_output: bool) -> "StepTable":
        """From (K, 12) values in sampling order."""
        packed = torch.from_numpy(values.astype(np.float32, order="C"))
        return cls(
            packed=packed,
            method=method,
            doubled_output=doubled_output,
            learned_variance=doubled_output and registry.find(method).learned_variance,
            scales_input=bool((packed[:, COLUMNS.index("input_scale")] != 1).any()),
            noisy_rows=tuple((packed[:, COLUMNS.index("sigma")] != 0).tolist()),
            multistep_rows=tuple((packed[:, COLUMNS.index("e")] != 0).tolist()),
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

    def rows(self, chosen: Sequence[int], *, timesteps: torch.Tensor) -> "StepTable":
        """These rows in this order, with other ``timesteps`` (K,) for the network."""
        packed = self.packed[list(chosen)].clone()
        packed[:, COLUMNS.index("timesteps")] = timesteps.to(packed)
        return replace(
            self,
            packed=packed,
            noisy_rows=tuple(self.noisy_rows[i] for i in chosen),
            multistep_rows=tuple(self.multistep_rows[i] for i in chosen),
        )

    def starting_at(self, row: int) -> "StepTable":
        """The rows from ``row`` on, for a start from an x_t that is noised data (image-to-image).

        Row ``row`` becomes row 0. There is no x_0 of the row before it, so it takes that method's
        first-order form: c + e in place of c, and no e. Raises InputError unless ``row`` is an
        integer in 0 … K − 1.
        """
        try:
            first = operator.index(row)
        except TypeError:
            raise InputError(f"row must be an integer, got {row!r}") from None
        if not 0 <= first < len(self):
            raise InputError(f"row is {first}; the table has rows 0 … {len(self) - 1}")
        packed = self.packed[first:].clone()
        c, e = COLUMNS.index("c"), COLUMNS.index("e")
        packed[0, c] += packed[0, e]
        packed[0, e] = 0
        return replace(
            self,
            packed=packed,
            noisy_rows=self.noisy_rows[first:],
            multistep_rows=(False, *self.multistep_rows[first + 1 :]),
        )
