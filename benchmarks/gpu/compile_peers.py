"""Fill the compilers' caches: the compiled peers, and our Triton kernels.

    python -m gpu.compile_peers --out FOLDER [--dry] [--budget SECONDS]

Meant to run beside others: what it measures is how long compiling takes. Inductor's cache is
$TORCHINDUCTOR_CACHE_DIR or FOLDER/../cache, so that the phase compiled finds everything there.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from gpu import compiled, device
from gpu.phase import Phase
from gpu.sampling import chosen, modes, network
from harness.peers_sampling import fastdiff_sampling


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("compile_peers", __doc__, argv)
    keep_caches(phase)
    for fields, make in work(phase):
        if not phase.time_left(**fields):
            break
        with phase.attempt(**fields):
            start = time.perf_counter()
            make()
            device.wait(phase.device)
            phase.write(**fields, compile_s=time.perf_counter() - start)
        device.release(phase.device)
    return phase.ended()


def keep_caches(phase: Phase) -> None:
    cache = phase.out.absolute().parent / "cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))


def work(phase: Phase) -> Iterator[tuple[dict, Callable[[], object]]]:
    """What is compiled, first what is wanted first."""
    cases = (("ddpm-cifar10", 2),) if phase.dry else compiled.CASES
    for batch in (2,) if phase.dry else (64, 1, 256):
        fields = {"contender": "fastdiff's kernels", "network": "ddpm-cifar10", "batch": batch}
        yield fields, partial(run_kernels, phase, "ddpm-cifar10", batch)
    for name, batch in cases:
        for mode in modes(phase):
            for peer in compiled.PEERS:
                contender = f"{peer} bfloat16 {mode}"
                fields = {"contender": contender, "network": name, "batch": batch}
                yield fields, partial(sample_once, phase, name, batch, contender)


def run_kernels(phase: Phase, name: str, batch: int) -> None:
    """One step, eagerly: a capture would only add its own time."""
    how = (network(phase, name), batch, torch.bfloat16, phase.device)
    fastdiff_sampling(*how, steps=1, capture=False)()


def sample_once(phase: Phase, name: str, batch: int, contender: str) -> None:
    chosen(phase, name, batch, [contender])[contender]().call()


if __name__ == "__main__":
    sys.exit(main())
