"""A plan's steps launched one after the other: what a GPU runs, and a graph captures."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastdiff.models.execution.ahead import Ahead
from fastdiff.models.execution.bound import Kept
from fastdiff.models.execution.lowering import Slot, Step
from fastdiff.models.execution.plan import Plan


class Launched:
    """A plan's steps on memory of PyTorch's allocator, which a capture knows: a result is let go
    after its last reader. Nothing is read back, and nothing copied.

    ``weights``: as the plan wants them; ``taken``: as of Bound.
    """

    taken = 0

    def __init__(self, plan: Plan, weights: Sequence[Any]):
        self._held: dict[Slot | None, Any] = {None: None}
        self._held.update(zip(plan.weights.values(), weights, strict=True))
        self._inputs, self._output, self._kept = list(plan.inputs.values()), plan.output, plan.kept
        lasting = [plan.output, *plan.kept]
        self._steps = _released(plan.steps, lasting)
        self._shallow = _released([plan.steps[number] for number in plan.shallow], lasting)
        written = {slot for step in plan.steps for slot in step.writes}
        self._parts: dict[Slot | None, list[Slot]] = {}
        for slot in plan.parts - written:
            self._parts.setdefault(slot.whole, []).append(slot)

    def run(
        self, arguments: Sequence[Tensor], ahead: Ahead, kept: Kept = ()
    ) -> tuple[Tensor, Kept]:
        """As of Bound. Nothing ahead: a graph is the same for every timestep."""
        held = dict(self._held)
        held.update(zip(self._inputs, arguments, strict=True))
        held.update(zip(self._kept, kept, strict=bool(kept)))
        for step, last_needed in self._shallow if kept else self._steps:
            results = step.function(*[held[slot] for slot in step.reads], **step.options)
            results = results if isinstance(results, tuple) else (results,)
            for slot, result in zip(step.writes, results, strict=True):
                held[slot] = result
                for part in self._parts.get(slot, ()):
                    held[part] = part.part_of(result)
            del results, result
            for slot in last_needed:
                held.pop(slot, None)
        return held[self._output], kept or tuple(held[slot] for slot in self._kept)


def _released(steps: Sequence[Step], lasting: Sequence[Slot]) -> list[tuple[Step, list[Slot]]]:
    """Each step with the results that none after it needs, by all their names; what lasts is needed
    to the end."""
    last: dict[Slot, int] = {}
    names: dict[Slot, set[Slot]] = {}
    for number, step in enumerate(steps):
        for slot in (*step.reads, *step.writes):
            if slot is not None and slot.weight is None:
                whole = slot.whole or slot
                last[whole] = number
                names.setdefault(whole, {whole}).add(slot)
    for slot in lasting:
        last.pop(slot.whole or slot, None)
    found: list[list[Slot]] = [[] for _ in steps]
    for whole, number in last.items():
        found[number] += names[whole]
    return list(zip(steps, found, strict=True))
