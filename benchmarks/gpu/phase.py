"""What the measuring scripts share: a budget of seconds, rows that are written at once, and rounds.

A contender that raises has a row that says so, and the others go on.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff.errors import first_line
from fastdiff.ops import backends
from gpu import device, lines
from harness.timing import Contender, Inputs, turn_type

ROUNDS = 3


@dataclass
class Phase:
    """One script's run. ``failures``: contenders that raised."""

    name: str
    out: Path
    dry: bool
    device: torch.device
    deadline: float
    failures: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, name: str, doc: str | None, argv: Sequence[str] | None) -> "Phase":
        start = time.monotonic()
        given = lines.arguments(doc, argv)
        # What the imports left is there for good: looking through it between two races took longer
        # than the races.
        gc.collect()
        gc.freeze()
        return cls(name, given.out, given.dry, device.chosen(given.dry), start + given.budget)

    def write(self, **fields: Any) -> None:
        lines.write(self.out, self.name, dry=self.dry, **fields)

    def plan(self, cases: Iterable[Mapping[str, Any]]) -> None:
        """Write down what is to be measured: of what a cut or a crash then keeps from it, the
        report knows all the same."""
        self.write(planned=list(cases))

    def time_left(self, likely_s: float = 0.0, **fields: Any) -> bool:
        """False when the budget is spent, or too little of it is left for what likely takes so
        long: a row then says so of what ``fields`` name."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.write(**fields, skipped="the phase's time is over")
        elif left < likely_s:
            why = f"to make it takes some {likely_s:.0f} s, and {left:.0f} s are left"
            self.write(**fields, skipped=why)
        return left > likely_s

    @contextmanager
    def attempt(self, **fields: Any) -> Iterator[None]:
        """What raises inside becomes a row, and the script goes on. A package that is not installed
        is no failure."""
        try:
            yield
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name in lines.PACKAGES:
                self.write(**fields, skipped=f"{error.name} is not installed")
                return
            what = f"{type(error).__name__}: {first_line(error)}"
            print(f"{self.name}: {fields}: {what}", flush=True)
            self.failures.append(what)
            self.write(**fields, error=what)

    def ended(self) -> int:
        """The script's exit status."""
        return 1 if self.failures else 0


def race(
    phase: Phase,
    makers: Mapping[str, Callable[[], Contender]],
    figures: Callable[[str, float], dict[str, Any]],
    *,
    inputs: Sequence[Inputs] = ((),),
    describe: Callable[[Contender], dict[str, Any]] = lambda contender: {},
    rounds: int = ROUNDS,
    takes: Mapping[str, float] | None = None,
    **fields: Any,
) -> None:
    """Time contenders turn by turn: a row of each turn as soon as it is taken.

    ``figures`` of (contender, seconds per call) and ``describe``, asked once outside of the timing,
    go into the rows beside ``fields``. Round 0 is taken as contenders are made; the rest alternate.
    ``takes``: the seconds that it takes to make a contender, where these are many.
    """
    before, takes = backends.named(), takes or {}
    turns, described = {}, {}

    def write(name: str, number: int, turn: Any, seconds: float) -> None:
        phase.write(
            contender=name,
            round=number,
            seconds=seconds,
            timed_by=turn.how,
            **figures(name, seconds),
            **described[name],
            **fields,
        )

    try:
        for name, make in makers.items():
            if not phase.time_left(takes.get(name, 0.0), contender=name, **fields):
                continue
            with phase.attempt(contender=name, **fields):
                contender = make()
                turn = turn_type(phase.device)(contender, list(inputs))
                with fastdiff.backend(contender.backend):
                    described[name] = describe(contender)
                write(name, 0, turn, turn.estimate)
                turns[name] = turn
        for number in range(1, rounds):
            for name in list(turns):
                if not phase.time_left(contender=name, round=number, **fields):
                    return
                turn = turns.pop(name)
                with phase.attempt(contender=name, **fields):
                    write(name, number, turn, turn())
                    turns[name] = turn  # not one that has raised
    finally:
        turns.clear()
        fastdiff.set_backend(before)
        device.release(phase.device)
