"""A program's steps and where in memory their results stand, each only as long as it is read."""

from collections.abc import Mapping, Sequence

from torch import nn

from fastdiff.models.execution.lowering import Lowering, Slot, Step

ALIGNMENT = 64


class Plan:
    """The steps for one set of shapes and one dtype.

    ``weights``: what the steps read, and in which slot; ``inputs``: the arguments' slots by name;
    ``places``: where results and arguments stand in ``nbytes`` of memory; ``parts``: those that are
    columns of others, or stand there; ``peak``: the most bytes of results that are alive at a time;
    ``captured``: as of the lowering; ``names``: of the network's modules. ``early``: how many of
    the steps, the first ones, depend on nothing but the timesteps; ``ahead``: their results that
    other steps read. ``kept``: as of the lowering, of networks that are cut in two; ``shallow``:
    the numbers of the steps that are to be run where another call's are there.
    """

    def __init__(self, lowered: Lowering, names: Mapping[nn.Module, str]):
        self.names, self.captured = names, lowered.captured
        self.dtype, self.layout = lowered.program.dtype, lowered.layout
        self.weights, self.inputs, self.output = lowered.weights, lowered.inputs, lowered.output
        early, others = _sorted(lowered.steps, lowered.inputs.get("timesteps"))
        self.steps, self.early = early + others, len(early)
        self.kept = lowered.kept
        self.shallow = _needed(self.steps, self.output, self.kept)
        read = {slot.whole or slot for step in others for slot in step.reads if slot is not None}
        self.ahead = [slot for step in early for slot in step.writes if slot in read]
        touched = [slot for step in self.steps for slot in (*step.writes, *step.reads)]
        self.parts = {slot for slot in touched if slot is not None and slot.whole is not None}
        alive = self._alive()
        given = set(self.inputs.values())
        results = [(span, slot) for slot, span in alive.items() if slot not in given]
        self.peak = max(
            sum(slot.nbytes for (first, last), slot in results if first <= number <= last)
            for number in range(len(self.steps))
        )
        self.places, self.nbytes = _placed(alive)

    def _alive(self) -> dict[Slot, tuple[int, int]]:
        """The first and the last step that need each result; arguments are there from before."""
        alive = {slot: (-1, -1) for slot in self.inputs.values()}
        for number, step in enumerate(self.steps):
            for slot in (*step.writes, *step.reads):
                if slot is None or slot.weight is not None:
                    continue
                whole = slot.whole or slot
                first, _ = alive.get(whole, (number, number))
                alive[whole] = first, number
        output = self.output.whole or self.output
        alive[output] = alive[output][0], len(self.steps)
        for slot in self.kept:  # or given before the first step
            alive[slot.whole or slot] = -1, len(self.steps)
        return alive


def _sorted(steps: Sequence[Step], timesteps: Slot | None) -> tuple[list[Step], list[Step]]:
    """Those that depend on nothing but the timesteps, and the others; each in their order."""
    known: set[Slot | None] = {timesteps}
    early: list[Step] = []
    for step in steps:
        reads = [slot for slot in step.reads if slot is not None and slot.weight is None]
        if reads and known.issuperset(reads):
            early.append(step)
            known.update(step.writes)
    return early, [step for step in steps if step not in early]


def _needed(steps: Sequence[Step], output: Slot, kept: Sequence[Slot]) -> list[int]:
    """The numbers of those that the output depends on beside what is kept."""
    there = {slot.whole or slot for slot in kept}
    needed = {output.whole or output}
    found: list[int] = []
    for number, step in reversed(list(enumerate(steps))):
        if any(slot and (slot.whole or slot) in needed for slot in step.writes):
            found.append(number)
            needed |= {slot.whole or slot for slot in step.reads if slot} - there
    return found[::-1]


def _placed(alive: Mapping[Slot, tuple[int, int]]) -> tuple[dict[Slot, int], int]:
    """Starts in memory so that what is alive at one time does not overlap, and its size: the
    largest first, each at the first gap that takes it (Pisarchyk & Lee 2020, arXiv:2001.03288,
    "greedy by size")."""
    starts: dict[Slot, int] = {}
    size = 0
    for slot in sorted(alive, key=lambda slot: -slot.nbytes):
        first, last = alive[slot]
        beside = sorted(
            (start, start + other.nbytes)
            for other, start in starts.items()
            if first <= alive[other][1] and alive[other][0] <= last
        )
        at = 0
        for start, end in beside:
            if at + slot.nbytes <= start:
                break
            at = max(at, -(-end // ALIGNMENT) * ALIGNMENT)
        starts[slot] = at
        size = max(size, at + slot.nbytes)
    return starts, size
