"""What depends on the timestep alone, computed for many steps of a sampler's call at once.

The weights that this reads, a tenth of a network's, are then read once for them all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastdiff.models.execution.lowering import Slot
from fastdiff.models.execution.plan import Plan

MOST_ROWS = 256  # timesteps at a time: 7 MB for DDPM's CIFAR-10 network


class Ahead:
    """``timesteps``: those that are to come, one after the other; they may be fewer or others than
    what comes."""

    def __init__(self, timesteps: Sequence[float] = ()):
        self.timesteps = list(dict.fromkeys(timesteps))
        self._numbers = {timestep: i for i, timestep in enumerate(self.timesteps)}
        self._made: dict[Plan, tuple[int, int, list[Tensor]]] = {}

    def rows(
        self, plan: Plan, held: Mapping[Any, Any], taken: int, timesteps: Tensor
    ) -> list[Tensor] | None:
        """What ``plan.ahead`` are at the timestep that (N,) all have, a row (1, C) each; None where
        they differ, or it is not known. ``held``: the values of the weights' slots, as they were
        the time that is numbered ``taken``."""
        if len(self._numbers) < 2 or not len(timesteps) or not plan.ahead:
            return None
        number = self._numbers.get(timesteps[0].item())
        if number is None or (len(timesteps) > 1 and bool((timesteps != timesteps[0]).any())):
            return None
        first = number - number % MOST_ROWS
        found = self._made.get(plan)
        if found is None or found[:2] != (taken, first):
            chosen = timesteps.new_tensor(self.timesteps[first : first + MOST_ROWS])
            found = self._made[plan] = taken, first, _computed(plan, held, chosen)
        return [rows[number - first : number - first + 1] for rows in found[2]]


def _computed(plan: Plan, held: Mapping[Any, Any], timesteps: Tensor) -> list[Tensor]:
    values: dict[Slot | None, Any] = {**held, plan.inputs["timesteps"]: timesteps}
    for step in plan.steps[: plan.early]:
        reads = [values[slot] for slot in step.reads]
        values[step.writes[0]] = step.function(*reads, **step.options)
    return [values[slot] for slot in plan.ahead]
