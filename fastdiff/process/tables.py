"""Float64 tables over a process's K steps, and what is gathered from them on any device."""

import operator
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.checks import check_float, check_timesteps
from fastdiff.errors import InputError

FloatArray = npt.NDArray[np.float64]


class ProcessTables:
    """Base of the processes: named float64 (K,) tables, cast and copied once per device."""

    num_timesteps: int

    def __init__(self) -> None:
        self._device_tables: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def _named_tables(self) -> dict[str, FloatArray]:
        """Float64 (K,) tables by the names that methods gather them under."""
        raise NotImplementedError

    def _at(self, t: Tensor, x: Tensor, x_name: str = "x") -> "TablesAt":
        """The tables at each sample's t, after checking t; every gather broadcasts over x."""
        check_float(x, x_name)
        t = check_timesteps(t, x, self.num_timesteps, x_name)
        return TablesAt(self._tables(x), t, x)

    def _tables(self, x: Tensor) -> dict[str, Tensor]:
        """Every table on x's device, copied there once: (K + 1,), the last row NaN."""
        key = (x.device, arithmetic_dtype(x))
        if key not in self._device_tables:
            self._device_tables[key] = to_device(self._named_tables(), *key)
        return self._device_tables[key]

    def __getstate__(self) -> dict:
        """Copies and pickles leave the device tables behind: they are a cache."""
        return self.__dict__ | {"_device_tables": {}}


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


def to_device(
    tables: dict[str, FloatArray], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Each float64 (K,) table as a (K + 1,) tensor whose last row is NaN."""
    # A tensor made in inference mode could never take part in training later.
    with torch.inference_mode(False):
        return {
            name: torch.from_numpy(np.append(table, np.nan)).to(device, dtype)
            for name, table in tables.items()
        }


def check_timestep_map(
    timestep_map: Sequence[int] | npt.NDArray[np.int64] | None,
    original_num_steps: int | None,
    num_timesteps: int,
) -> tuple[npt.NDArray[np.int64], int]:
    """(K,) int64 steps of the unstrided process and its length; by default every step of K.

    Raises InputError unless there is one integer per step and they ascend within that length.
    """
    if timestep_map is None:
        timestep_map = np.arange(num_timesteps)
    try:
        steps = np.array(timestep_map)
    except (TypeError, ValueError):  # ragged
        raise InputError(
            f"timestep_map must hold one integer per step, got {timestep_map!r}"
        ) from None
    if steps.shape != (num_timesteps,) or steps.dtype.kind not in "iu":
        raise InputError(
            f"timestep_map must hold one integer per step, {num_timesteps} in all, "
            f"got {steps.dtype} of shape {steps.shape}"
        )
    try:
        original = int(steps[-1]) + 1 if original_num_steps is None else original_num_steps
        original = operator.index(original)
    except TypeError:
        raise InputError(
            f"original_num_steps must be an integer, got {original_num_steps!r}"
        ) from None
    if steps[0] < 0 or (np.diff(steps) <= 0).any() or steps[-1] >= original:
        raise InputError(
            f"timestep_map must ascend within 0 … {original - 1} (original_num_steps - 1)"
        )
    return steps.astype(np.int64), original
