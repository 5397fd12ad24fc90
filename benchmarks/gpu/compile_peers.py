"""Fill the compilers' caches: the compiled peers, and our Triton kernels.

    python -m gpu.compile_peers --out FOLDER [--dry] [--budget SECONDS]

Meant to run beside others: what it measures is how long compiling takes. What does not fit into
its time is left for another run, and named in the report.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from gpu import device
from gpu.compilations import Compilation, keep_caches, wanted
from gpu.phase import Phase
from gpu.sampling import chosen, network
from harness.peers_sampling import fastdiff_sampling

KERNELS = "fastdiff's kernels"
NETWORK = "ddpm-cifar10"


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("compile_peers", __doc__, argv)
    keep_caches(phase)
    kernels = [Compilation(KERNELS, NETWORK, b) for b in ((2,) if phase.dry else (64, 1, 256))]
    peers = [one for one in wanted(phase) if not one.is_ready()]
    phase.plan(one.fields() for one in (*kernels, *peers))
    for one in kernels:
        compile_one(phase, one.fields(), partial(run_kernels, phase, NETWORK, one.batch))
    for one in peers:
        fields = one.fields()
        compiled = compile_one(phase, fields, partial(sample_once, phase, **fields))
        if compiled and not phase.dry:  # where nothing is compiled
            one.note()
    return phase.ended()


def compile_one(phase: Phase, fields: dict[str, Any], make: Callable[[], object]) -> bool:
    """Whether there was time for it, and it went well."""
    done = False
    if phase.time_left(**fields):
        with phase.attempt(**fields):
            start = time.perf_counter()
            make()
            device.wait(phase.device)
            phase.write(**fields, compile_s=time.perf_counter() - start)
            done = True
        device.release(phase.device)
    return done


def run_kernels(phase: Phase, name: str, batch: int) -> None:
    """One step, eagerly: a capture would only add its own time."""
    how = (network(phase, name), batch, torch.bfloat16, phase.device)
    fastdiff_sampling(*how, steps=1, capture=False)()


def sample_once(phase: Phase, contender: str, network: str, batch: int) -> None:
    chosen(phase, network, batch, [contender])[contender]().call()


if __name__ == "__main__":
    sys.exit(main())
