"""What the multistep schedulers share: model outputs of the steps before, kept as diffusers does.

Their rows stand in blocks of K, one row a step and a block an order: which one a step takes depends
on how many were taken before it. In a row M0, M1 and M2 are what the last three calls kept, the
newest first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.diffusers.by_sigma import SigmaScheduler
from fastdiff.integrations.diffusers.fused import Plan, Rows, combine, is_readable
from fastdiff.methods.rows import SLOTS

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
Columns = dict[str, Any]  # names of a table's columns to (K,) or a number


class MultistepScheduler(SigmaScheduler):
    """A variance-preserving or a flow scheduler that reads up to three outputs before its own."""

    config: Any
    model_outputs: list[Any]
    lower_order_nums: int
    num_inference_steps: int | None
    _sigma_to_alpha_sigma_t: Any
    _columns: Callable[[], Columns | str]
    _rows_of: Callable[[Columns, torch.device], Rows]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α·x_0 + σ·noise at these timesteps, (N, ...); float32 inside whatever the dtype."""
        device = original_samples.device
        dtype = torch.float64 if original_samples.dtype == torch.float64 else torch.float32
        scales = self._sigma_to_alpha_sigma_t(self.sigmas.to(device, dtype))
        if self.begin_index is None:
            index = _indices(self.timesteps.to(device), timesteps.to(device))
        else:  # inpainting after the first step, image-to-image before it
            at = self.begin_index if self.step_index is None else self.step_index
            index = torch.full(timesteps.shape, at, device=device)
        return combine(original_samples, noise, index, *scales)

    def _remember(self, converted: Tensor, index: int) -> None:
        """What diffusers keeps of a step: the converted output, and how many were taken."""
        self.model_outputs.append(converted)
        del self.model_outputs[0]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index = index + 1

    def _row_by_order(self, rows: Rows, timestep: int | Tensor, sample: Tensor) -> Plan:
        """The row of this step, of rows in blocks of orders."""
        index = self._index(timestep)
        if isinstance(index, str):
            return index
        order = self._order(index, self.lower_order_nums)
        reason = self._lacks(order - 1, sample)
        row = index + (order - 1) * len(self.timesteps)
        return reason or rows.refusals[row] or (rows, row)

    def _rows_by_order(self) -> list[int]:
        """The rows that a run over all timesteps takes, of rows in blocks of orders."""
        steps = len(self.timesteps)
        return [index + (self._order(index, index) - 1) * steps for index in range(steps)]

    def _order(self, index: int, taken: int) -> int:
        """The order that diffusers takes this step with; ``taken``: how many steps before it."""
        order, left = self.config.solver_order, len(self.timesteps) - index
        lowers = self.config.lower_order_final and len(self.timesteps) < 15
        if order == 1 or taken < 1 or (left == 1 and (lowers or self._ends_first())):
            return 1
        if order == 2 or taken < 2 or (left == 2 and lowers):
            return 2
        return 3

    def _ends_first(self) -> bool:
        """Whether the last step is of the first order, however many there are."""
        return False

    def _make_rows(self, device: torch.device) -> Rows | str:
        columns = self._columns()
        return columns if isinstance(columns, str) else self._rows_of(columns, device)

    def _before(self, count: int) -> list[Any]:
        """The converted outputs of the last ``count`` steps, the newest first."""
        return self.model_outputs[::-1][:count]

    def _lacks(self, count: int, sample: Tensor) -> str | None:
        """Why ``count`` outputs before cannot be read, or None."""
        before = self._before(count)
        if len(before) < count or not all(is_readable(kept, sample) for kept in before):
            return "the model output before is missing, or unlike sample"
        return None


def x_start_columns(
    prediction_type: str, alpha: Tensor, sigma: Tensor, raw_sigma: Tensor
) -> Columns:
    """x_0 = a·x_t + b·output."""
    if prediction_type == "epsilon":
        return {"a": 1 / alpha, "b": -sigma / alpha}
    if prediction_type == "v_prediction":
        return {"a": alpha, "b": -sigma}
    if prediction_type == "flow_prediction":
        return {"a": 1.0, "b": -raw_sigma}
    return {"a": 0.0, "b": 1.0}  # sample


def in_x_start(columns: Columns, predicted: Columns) -> Columns:
    """Rows whose "x_0" is ε, or whatever else x_t and the output give, as rows whose x_0 is x_0,
    which keep the other. ``predicted``: x_0's a and b."""
    b, before = (torch.as_tensor(of["b"]).double() for of in (predicted, columns))
    k = before / b
    q = columns["a"] - predicted["a"] * k
    c = columns["c"].double()
    return columns | predicted | {"c": c * k, "d": columns["d"] + c * q, "k": k, "q": q}


def in_blocks(blocks: list[Columns], steps: int) -> Columns:
    """Columns of ``steps`` rows each, one block under the other; the last names all columns."""
    return {
        name: torch.cat([torch.as_tensor(block.get(name, 0.0)).expand(steps) for block in blocks])
        for name in blocks[-1]
    }


def chosen_rows(columns: Columns, rows: list[int]) -> Columns:
    """These rows in this order."""
    return {
        name: value[rows] if isinstance(value, Tensor) else value for name, value in columns.items()
    }


def kept_in_turns(columns: Columns, steps: int, *, all_but: int | None = None) -> Columns:
    """Rows for a Sampler, which keeps the same tensors through all steps: the n-th row that keeps
    x_0, or its k and q, does so in slot n mod L, and a later one finds it there. ``all_but``: the
    row that keeps nothing."""
    factors = [torch.as_tensor(columns.get(f"e{j}", 0.0)).expand(steps) for j in range(SLOTS)]
    length = max([1, *(j + 1 for j, factor in enumerate(factors) if factor.any())])
    row = torch.arange(steps)
    keeps = row != (-1 if all_but is None else all_but)
    kept = keeps.cumsum(0) - keeps.long()  # how many rows before have kept something
    turned = torch.zeros(length, steps, dtype=torch.float64)
    for j in range(length):
        turned[(kept - 1 - j) % length, row] = factors[j].double()
    slots = {f"e{slot}": turned[slot] if slot < length else 0.0 for slot in range(SLOTS)}
    return {"k": 1.0} | columns | slots | {"slot": torch.where(keeps, kept % length, -1)}


def _indices(schedule: Tensor, timesteps: Tensor) -> Tensor:
    """Of each timestep (N,) its place in the schedule (K,), without waiting for the device.

    As diffusers has it: the second place of those that occur more than once, and the last for
    those that do not occur.
    """
    equal = schedule == timesteps.reshape(-1, 1)  # (N, K)
    seen = equal.cumsum(1)
    place = torch.where(seen[:, -1:] > 1, equal & (seen == 2), equal).int().argmax(1)
    return torch.where(seen[:, -1] == 0, len(schedule) - 1, place)
