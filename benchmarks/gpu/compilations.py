"""Which peers torch.compile is given, the most telling first, and which of them the caches hold.

max-autotune takes minutes for a network, and a run has room for two or three. So the batch comes
first that the goal is stated for; then our own network on plain operations, which needs no package
and has the arithmetic of diffusers'; of a network the default mode, which takes a third of the
time. A note in Inductor's cache says what was compiled: the next run goes on after it, and the one
that measures begins none that it cannot end. (Where a network's code has changed since, its graph
is compiled again, from kernels that are tuned already.)
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu import lines
from gpu.phase import Phase
from gpu.sampling import modes

BATCHES = (64, 256)
PEERS = ("plain", "diffusers")
NETWORKS = ("ddpm-cifar10", "iddpm-imagenet64")
LIKELY_S = {"compiled": 60.0, "max-autotune": 200.0}  # by mode; guessed, until a GPU has said


@dataclass(frozen=True)
class Compilation:
    """One, by the names that its contender's rows have."""

    contender: str
    network: str
    batch: int

    def fields(self) -> dict[str, str | int]:
        return asdict(self)

    def is_ready(self) -> bool:
        """Whether it was compiled with these versions for this device."""
        known = {**lines.stamp(), **self.fields()}.items()
        return any(known <= row.items() for row in lines.read(cache()))

    def note(self) -> None:
        lines.write(cache(), "compile_peers", **self.fields())

    def likely_s(self) -> float:
        """What making the contender takes before its first step."""
        mode = self.contender.rpartition(" ")[2]
        return 0.0 if self.is_ready() else LIKELY_S[mode]


def wanted(phase: Phase) -> Iterator[Compilation]:
    for batch in (2,) if phase.dry else BATCHES:
        for peer in PEERS:
            for network in NETWORKS[:1] if phase.dry else NETWORKS:
                for mode in modes(phase):
                    yield Compilation(f"{peer} bfloat16 {mode}", network, batch)


def keep_caches(phase: Phase) -> None:
    """Where the environment names none, beside the run's own folder."""
    kept = phase.out.absolute().parent / "cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(kept / "triton"))


def cache() -> Path:
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder
