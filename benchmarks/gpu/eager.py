"""The Sampler against diffusers as it comes: one image at a time, then a large batch.

python -m gpu.eager --out FOLDER [--dry] [--budget SECONDS]
"""

import sys
from collections.abc import Iterator, Sequence

from gpu.phase import Phase
from gpu.sampling import STEPS, Case, chosen, race_samplers
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
    race_samplers(phase, list(cases(phase)))
    return phase.ended()


def cases(phase: Phase) -> Iterator[Case]:
    for name, batch in (("ddpm-cifar10", 1),) if phase.dry else CASES:
        count = STEPS_ALONE if batch == 1 else STEPS
        yield Case(name, batch, chosen(phase, name, batch, list(CONTENDERS), count), count)


if __name__ == "__main__":
    sys.exit(main())
