"""Training steps as CUDA graphs beside eager ones: a small batch, where launches decide, and a
large one.

python -m gpu.training --out FOLDER [--dry] [--budget SECONDS]
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu.phase import Phase, race
from harness.timing import Contender
from harness.training import trainer_of

CASES = (("digits", 64), ("ddpm-cifar10", 8), ("ddpm-cifar10", 128))
GRAPHS = {"eager": "off", "graph": "on"}


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("training", __doc__, argv)
    cases = (("digits", 2),) if phase.dry else CASES
    phase.plan(
        {"contender": name, "network": preset, "batch": batch}
        for preset, batch in cases
        for name in GRAPHS
    )
    for preset, batch in cases:
        race_steps(phase, preset, batch)
    return phase.ended()


def race_steps(phase: Phase, preset: str, batch: int) -> None:
    # A dry run has no graphs, and takes its steps eagerly.
    how = {name: "auto" if phase.dry else graph for name, graph in GRAPHS.items()}
    makers: dict[str, Callable[[], Contender]] = {
        name: partial(steps, phase, preset, batch, graph) for name, graph in how.items()
    }

    def figures(contender: str, seconds: float) -> dict[str, Any]:
        return {"step_ms": 1e3 * seconds, "images_per_s": batch / seconds}

    race(phase, makers, figures, network=preset, batch=batch)


def steps(phase: Phase, preset: str, batch: int, graph: str) -> Contender:
    """The trainer's own, in bfloat16; those that capture are taken before."""
    dtype = "float32" if phase.dry else "bfloat16"
    trainer = trainer_of(preset, batch, Path(phase.out) / "run", dtype=dtype, graph=graph)
    for _ in range(1 if phase.dry else 3):
        trainer._train_step()
    return Contender("", trainer._train_step, None, capturable=False)


if __name__ == "__main__":
    sys.exit(main())
