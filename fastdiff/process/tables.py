"""Float64 tables over a process's K steps, and what is gathered from them on any device."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.checks import check_float, check_timesteps
from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array

TimestepMap = Sequence[float] | npt.NDArray[Any]


class Tables:
    """Float64 (K,) tables by name, cast and copied once to each device they are read on."""

    def __init__(self, tables: dict[str, Float64Array]):
        self.tables = tables
        self.num_timesteps = len(next(iter(tables.values())))
        self.copies: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def at(self, t: Tensor, x: Tensor, x_name: str = "x") -> "TablesAt":
        """The tables at each sample's t, after checking t; every gather broadcasts over x."""
        check_float(x, x_name)
        return self.at_checked(check_timesteps(t, x, self.num_timesteps, x_name), x)

    def at_checked(self, t: Tensor, x: Tensor) -> "TablesAt":
        """``at`` for a t that was checked."""
        return TablesAt(self.on(x), t, x)

    def on(self, x: Tensor) -> dict[str, Tensor]:
        """Every table on x's device: (K + 1,), the last row NaN."""
        key = (x.device, arithmetic_dtype(x))
        if key not in self.copies:
            # A tensor made in inference mode could never take part in training later.
            with torch.inference_mode(False):
                self.copies[key] = {
                    name: torch.from_numpy(np.append(table, np.nan)).to(*key)
                    for name, table in self.tables.items()
                }
        return self.copies[key]

    def __getstate__(self) -> dict:
        """Copies and pickles leave the device's tensors behind: they are a cache."""
        return self.__dict__ | {"copies": {}}


class TablesAt:
    """``at[name]``: the table at each sample's timestep, (N, 1, ...) to broadcast over x."""

    def __init__(self, tables: dict[str, Tensor], t: Tensor, x: Tensor):
        self.tables = tables
        self.dtype = arithmetic_dtype(x)
        self.shape = (-1,) + (1,) * (x.dim() - 1)
        # -1 wraps to the last row, which holds NaN, and so does K: one kernel guards every gather.
        self.rows = t.long().clamp(-1, len(next(iter(tables.values()))) - 1)

    def __getitem__(self, name: str) -> Tensor:
        return self.tables[name][self.rows].view(self.shape)


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """What a process computes in: float32, or float64 for float64 samples."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_timestep_map(
    timestep_map: TimestepMap | None,
    original_num_steps: int | None,
    num_timesteps: int,
) -> tuple[npt.NDArray[Any], int]:
    """(K,) steps of the unstrided process and its length; by default every step of K.

    int64, or float64 where levels between the steps are given. Raises InputError unless there is
    one number per step and they ascend within that length.
    """
    if timestep_map is None:
        timestep_map = np.arange(num_timesteps)
    try:
        steps = np.array(timestep_map)
    except (TypeError, ValueError):  # ragged
        raise InputError(
            f"timestep_map must hold one number per step, got {timestep_map!r}"
        ) from None
    if steps.shape != (num_timesteps,) or not steps.size or steps.dtype.kind not in "iuf":
        raise InputError(
            f"timestep_map must hold one number per step, {num_timesteps} in all, "
            f"got {steps.dtype} of shape {steps.shape}"
        )
    try:
        original = math.ceil(steps[-1]) + 1 if original_num_steps is None else original_num_steps
        original = operator.index(original)
    except TypeError:
        raise InputError(
            f"original_num_steps must be an integer, got {original_num_steps!r}"
        ) from None
    ascends = steps[0] >= 0 and (np.diff(steps) > 0).all() and steps[-1] <= original - 1
    if not ascends:
        raise InputError(
            f"timestep_map must ascend within 0 … {original - 1} (original_num_steps - 1)"
        )
    return steps.astype(np.float64 if steps.dtype.kind == "f" else np.int64), original
