"""A program's steps bound to places: which values a step reads and writes, and when they end."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from fastdiff.models.execution.lowering import Lowering, Slot, Step

Values = list[Any]


class Plan:
    """The steps for one set of shapes and one dtype.

    ``weights``: what ``run`` is to be given, in this order; ``peak``: the most bytes of results
    that are alive at a time; ``names``: of the network's modules.
    """

    def __init__(self, lowered: Lowering, names: Mapping[nn.Module, str]):
        self.names = names
        self.steps, self.dtype, self.layout = lowered.steps, lowered.program.dtype, lowered.layout
        self.weights = list(lowered.weights)
        self.inputs = lowered.inputs
        written = [slot for step in self.steps for slot in step.writes if slot is not None]
        # One place more than the weights: nothing, for what a step does without.
        order = [None, *lowered.weights.values(), *self.inputs.values(), *written]
        self._place: dict[Slot | None, int] = {slot: place for place, slot in enumerate(order)}
        self._output = self._place[lowered.output]
        ends = self._ends(written, lowered.output)
        self.peak = self._peak(ends)
        self._run = [
            (self._bound(step), [self._place[slot] for slot in ended])
            for step, ended in zip(self.steps, ends, strict=True)
        ]

    def run(self, weights: Sequence[Any], inputs: Sequence[Tensor]) -> Tensor:
        """The result for the arguments, in the order of ``inputs``."""
        values: Values = [None, *weights, *inputs]
        values += [None] * (len(self._place) - len(values))
        for step, ended in self._run:
            step(values)
            for place in ended:
                values[place] = None
        return values[self._output]

    def _ends(self, written: Sequence[Slot], output: Slot) -> list[list[Slot]]:
        """After each step, the results that no later one reads."""
        last: dict[Slot, int] = {}
        for number, step in enumerate(self.steps):
            last.update((slot, number) for slot in (*step.writes, *step.reads) if slot is not None)
        ends: list[list[Slot]] = [[] for _ in self.steps]
        for slot in written:
            if slot is not output:
                ends[last[slot]].append(slot)
        return ends

    def _peak(self, ends: Sequence[Sequence[Slot]]) -> int:
        alive = peak = 0
        for step, ended in zip(self.steps, ends, strict=True):
            alive += sum(slot.nbytes for slot in step.writes if slot is not None)
            peak = max(peak, alive)
            alive -= sum(slot.nbytes for slot in ended)
        return peak

    def _bound(self, step: Step) -> Callable[[Values], None]:
        """The step on a call's values: a function, its places and its options, looked up once."""
        reads = [self._place[slot] for slot in step.reads]
        writes = [self._place[slot] for slot in step.writes]
        function = partial(step.function, **step.options) if step.options else step.function
        # Of one place itemgetter answers the value itself, of a slice of one a list.
        single = slice(reads[0], reads[0] + 1)
        get = itemgetter(*reads) if len(reads) > 1 else itemgetter(single)
        target, *others = writes

        def run_for_one(values: Values) -> None:
            values[target] = function(*get(values))

        def run_for_several(values: Values) -> None:
            for place, result in zip(writes, function(*get(values)), strict=True):
                values[place] = result

        return run_for_several if others else run_for_one
