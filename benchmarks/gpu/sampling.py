"""Samplers raced on one network: what the phases sampler, compiled and eager have in common.

A contender's row has ms per step, the share of the matrix product's rate that its convolutions and
products reach, and the PSNR of its images against the float32 peer's.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fastdiff.ops.dispatch import OPERATIONS
from gpu.phase import Phase, race
from harness import peers_sampling as peers
from harness.timing import Contender, matmul_tflops

STEPS = 10
Makers = Mapping[str, Callable[[], Contender]]


def network(phase: Phase, name: str) -> str:
    """``name``, or what stands for it in a dry run."""
    return "tiny" if phase.dry else name


def steps(phase: Phase) -> int:
    return 2 if phase.dry else STEPS


def modes(phase: Phase) -> peers.Modes:
    """torch.compile's; a dry run has the same names, and compiles nothing: that takes minutes."""
    if not phase.dry:
        return peers.MODES["cuda"]
    return {name: {"disable": True} for name in peers.MODES["cuda"]}


def peer(make: Callable[[], Callable[[], Any]], backend: str | None = None) -> Contender:
    """Its steps are launched, or replayed, as they are: no graph is made around them."""
    return Contender("", make(), backend, capturable=False)


def chosen(phase: Phase, name: str, batch: int, wanted: list[str]) -> Makers:
    """Of harness.peers_sampling's contenders those that are wanted."""
    made = peers.contenders(network(phase, name), batch, phase.device, steps(phase), modes(phase))
    return {one: partial(peer, made[one]) for one in wanted}


def race_samplers(phase: Phase, name: str, batch: int, makers: Makers) -> None:
    fields = {"network": name, "batch": batch}
    with phase.attempt(contender="float32 reference", **fields):
        who, reference = peers.reference_images(network(phase, name), phase.device, steps(phase))
        flops = peers.network_flops(network(phase, name), batch)

        def figures(contender: str, seconds: float) -> dict[str, Any]:
            step = seconds / steps(phase)
            return {"ms_per_step": 1e3 * step, "tflops": flops / step / 1e12}

        def describe(contender: Contender) -> dict[str, Any]:
            psnr = peers.psnr_db(contender.call(), reference)
            return {"psnr_db": psnr, "psnr_against": who, "norms": norms(phase)}

        race(phase, makers, figures, describe=describe, steps=steps(phase), **fields)


def norms(phase: Phase) -> str:
    """The backend of fastdiff's norms, with what is named now."""
    x, row = torch.zeros(1, 32, 2, 2, device=phase.device), torch.zeros(32, device=phase.device)
    return OPERATIONS["group_norm_silu"].choose(x, 32, row, row).backend


def write_matmul_rate(phase: Phase) -> None:
    """A row: what a large product reaches here, in the dtype of the samplers' convolutions."""
    dtype = torch.float32 if phase.dry else torch.bfloat16
    with phase.attempt(ceiling="matmul"):
        phase.write(ceiling="matmul", matmul_tflops=matmul_tflops(phase.device, dtype))
