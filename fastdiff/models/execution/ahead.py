"""What depends on the timestep alone, computed for many steps of a sampler's call at once.

The weights that this reads, a tenth of a network's, are then read once for them all. Always as many
rows are computed together, so that a row is the same to the bit whatever stands beside it: a call
gives what it gives beside calls with other timesteps.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastdiff.models.execution.lowering import Slot
from fastdiff.models.execution.plan import Plan

ROWS = 32  # timesteps at a time
MOST_BLOCKS = 8  # of so many rows: 7 MB for DDPM's CIFAR-10 network


class Ahead:
    """``timesteps``: those that are to come; they may be fewer or others than what comes."""

    def __init__(self, timesteps: Sequence[float] = ()):
        self.timesteps = list(dict.fromkeys(timesteps))
        self._numbers = {timestep: i for i, timestep in enumerate(self.timesteps)}
        self._made: OrderedDict[tuple[Plan, int, int], list[Tensor]] = OrderedDict()

    def rows(
        self, plan: Plan, held: Mapping[Any, Any], taken: int, timesteps: Tensor
    ) -> list[Tensor] | None:
        """What ``plan.ahead`` are at the timestep that (N,) all have, a row (1, C) each; None where
        they differ, or it is not known. ``held``: the values of the weights' slots, as they were
        the time that is numbered ``taken``."""
        if not self._numbers or not len(timesteps) or not plan.ahead:
            return None
        number = self._numbers.get(timesteps[0].item())
        if number is None or (len(timesteps) > 1 and bool((timesteps != timesteps[0]).any())):
            return None
        block, row = divmod(number, ROWS)
        key = plan, taken, block
        found = self._made.get(key)
        if found is None:
            chosen = self.timesteps[block * ROWS :][:ROWS]
            filled = chosen + chosen[-1:] * (ROWS - len(chosen))
            found = self._made[key] = _computed(plan, held, timesteps.new_tensor(filled))
            while len(self._made) > MOST_BLOCKS:
                self._made.popitem(last=False)
        return [rows[row : row + 1] for rows in found]


def _computed(plan: Plan, held: Mapping[Any, Any], timesteps: Tensor) -> list[Tensor]:
    values: dict[Slot | None, Any] = {**held, plan.inputs["timesteps"]: timesteps}
    for step in plan.steps[: plan.early]:
        reads = [values[slot] for slot in step.reads]
        values[step.writes[0]] = step.function(*reads, **step.options)
    return [values[slot] for slot in plan.ahead]
