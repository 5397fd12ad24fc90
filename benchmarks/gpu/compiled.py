"""The Sampler against networks that torch.compile has compiled, in its default and best modes.

    python -m gpu.compiled --out FOLDER [--dry] [--budget SECONDS]

Both diffusers' network and ours on plain PyTorch operations, bfloat16 weights in channels_last, on
the caches that compile_peers filled. Batch 64 on both networks, then 256 while there is time.
"""

import sys
from collections.abc import Sequence

from gpu.phase import Phase
from gpu.sampling import chosen, modes, race_samplers, write_matmul_rate

CASES = (
    ("ddpm-cifar10", 64),
    ("iddpm-imagenet64", 64),
    ("ddpm-cifar10", 256),
    ("iddpm-imagenet64", 256),
)
PEERS = ("plain", "diffusers")  # the first needs no package


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("compiled", __doc__, argv)
    write_matmul_rate(phase)
    for name, batch in (("ddpm-cifar10", 2),) if phase.dry else CASES:
        rivals = [f"{peer} bfloat16 {mode}" for mode in modes(phase) for peer in PEERS]
        makers = chosen(phase, name, batch, ["fastdiff bfloat16", *rivals])
        race_samplers(phase, name, batch, makers)
    return phase.ended()


if __name__ == "__main__":
    sys.exit(main())
