"""The Sampler against networks that torch.compile has compiled, in its default and best modes.

    python -m gpu.compiled --out FOLDER [--dry] [--budget SECONDS]

Both diffusers' network and ours on plain PyTorch operations, bfloat16 weights in channels_last, on
the caches that compile_peers filled. Batch 64 on both networks, then 256 while there is time; what
is not in the caches comes last, where there is the time to compile it.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from gpu.compilations import Compilation, keep_caches, wanted
from gpu.goals import OURS
from gpu.phase import Phase
from gpu.sampling import Case, chosen, network, peer, race_samplers, steps
from harness.peers_sampling import fastdiff_sampling

PROGRAM = f"{OURS}, executor=True"


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("compiled", __doc__, argv)
    keep_caches(phase)
    race_samplers(phase, list(cases(phase)))
    return phase.ended()


def cases(phase: Phase) -> Iterator[Case]:
    rivals: dict[tuple[str, int], list[Compilation]] = {}
    for one in wanted(phase):
        rivals.setdefault((one.network, one.batch), []).append(one)
    for (name, batch), members in rivals.items():
        takes = {one.contender: 0.0 if phase.dry else one.likely_s() for one in members}
        how = (network(phase, name), batch, torch.bfloat16, phase.device, steps(phase))
        program = partial(peer, partial(fastdiff_sampling, *how, executor=True))
        ours = {**chosen(phase, name, batch, [OURS]), PROGRAM: program}
        others = chosen(phase, name, batch, sorted(takes, key=lambda peer: takes[peer]))
        yield Case(name, batch, {**ours, **others}, takes=takes)


if __name__ == "__main__":
    sys.exit(main())
