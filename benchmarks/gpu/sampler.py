"""A captured step of the Sampler: norms by Triton and by CUDA, with and without cuDNN's search.

    python -m gpu.sampler --out FOLDER [--dry] [--budget SECONDS]

On DDPM's CIFAR-10 network in bfloat16. The CUDA norms are those of ``fastdiff.backend("cuda")``;
attention, which has no CUDA C++ kernel, runs as the plan has it in both.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from gpu.phase import Phase
from gpu.sampling import network, peer, race_samplers, steps, write_matmul_rate
from harness.peers_sampling import fastdiff_sampling, switched

NETWORK = "ddpm-cifar10"
BATCHES = (64, 1, 256)
# How cuDNN is kept from its search, which a capture turns on, and what asks for it.
SEARCH = {"off": "deterministic", "on": "benchmark"}


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("sampler", __doc__, argv)
    write_matmul_rate(phase)
    for batch in (2, 1) if phase.dry else BATCHES:
        race_samplers(phase, NETWORK, batch, dict(contenders(phase, batch)))
    return phase.ended()


def contenders(phase: Phase, batch: int) -> Iterator[tuple[str, Callable]]:
    """The plan's norms are Triton's until CUDA's are measured faster."""
    for norms, backend in (("plan", None), ("cuda", "reference" if phase.dry else "cuda")):
        for search, attribute in SEARCH.items():
            make = partial(sampling, phase, batch, attribute)
            yield f"fastdiff, {norms}, cudnn.benchmark {search}", partial(peer, make, backend)


def sampling(phase: Phase, batch: int, attribute: str) -> Callable[[], torch.Tensor]:
    name = network(phase, NETWORK)
    sample = fastdiff_sampling(name, batch, torch.bfloat16, phase.device, steps(phase))

    def switched_sample() -> torch.Tensor:
        with switched((torch.backends.cudnn,), attribute, True):
            return sample()

    return switched_sample


if __name__ == "__main__":
    sys.exit(main())
