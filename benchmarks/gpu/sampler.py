"""A captured step of the Sampler: norms by Triton and by CUDA, with and without cuDNN's search, and
the network as a program.

    python -m gpu.sampler --out FOLDER [--dry] [--budget SECONDS]

On DDPM's CIFAR-10 network in bfloat16. The CUDA norms are those of ``fastdiff.backend("cuda")``;
attention, which has no CUDA C++ kernel, runs as the plan has it in both.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from gpu.phase import Phase
from gpu.sampling import Case, network, peer, race_samplers, steps
from harness.peers_sampling import fastdiff_sampling
from harness.timing import Contender

NETWORK = "ddpm-cifar10"
BATCHES = (64, 1, 256)
# How cuDNN is kept from its search, which a capture turns on, and what asks for it.
SEARCH = {"off": "deterministic", "on": "benchmark"}


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("sampler", __doc__, argv)
    batches = (2,) if phase.dry else BATCHES
    race_samplers(phase, [Case(NETWORK, b, dict(contenders(phase, b))) for b in batches])
    return phase.ended()


def contenders(phase: Phase, batch: int) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """The plan's norms are Triton's until CUDA's are measured faster."""
    how = (network(phase, NETWORK), batch, torch.bfloat16, phase.device, steps(phase))
    for norms, backend in (("plan", None), ("cuda", "reference" if phase.dry else "cuda")):
        for search, switch in SEARCH.items():
            make = partial(fastdiff_sampling, *how, cudnn=switch)
            yield f"fastdiff, {norms}, cudnn.benchmark {search}", partial(peer, make, backend)
    make = partial(fastdiff_sampling, *how, cudnn=SEARCH["on"], executor=True)
    yield "fastdiff, plan, cudnn.benchmark on, executor=True", partial(peer, make)


if __name__ == "__main__":
    sys.exit(main())
