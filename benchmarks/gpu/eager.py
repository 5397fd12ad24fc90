"""The Sampler against diffusers as it comes: one image at a time, then a large batch.

python -m gpu.eager --out FOLDER [--dry] [--budget SECONDS]
"""

import sys
from collections.abc import Sequence

from gpu.phase import Phase
from gpu.sampling import STEPS, chosen, race_samplers, write_matmul_rate
from harness.peers_sampling import EAGER

CASES = (
    ("ddpm-cifar10", 1),
    ("iddpm-imagenet64", 1),
    ("ddpm-cifar10", 64),
    ("iddpm-imagenet64", 64),
)
STEPS_ALONE = 20  # a call's own cost is then little beside that of its steps
CONTENDERS = (
    "fastdiff bfloat16",
    EAGER,
    "diffusers bfloat16",
    "diffusers bfloat16 channels_last",
    "fastdiff float32",
)


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("eager", __doc__, argv)
    write_matmul_rate(phase)
    for name, batch in (("ddpm-cifar10", 1),) if phase.dry else CASES:
        count = STEPS_ALONE if batch == 1 else STEPS
        makers = chosen(phase, name, batch, list(CONTENDERS), count)
        race_samplers(phase, name, batch, makers, count)
    return phase.ended()


if __name__ == "__main__":
    sys.exit(main())
