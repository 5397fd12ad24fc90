"""Samplers raced on one network: what the phases sampler, compiled and eager have in common.

A contender's row has ms per step, the share of the matrix product's rate that its convolutions and
products reach, and the PSNR of its images against the float32 peer's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastdiff.ops.dispatch import OPERATIONS
from gpu import device
from gpu.phase import Phase, race
from harness import peers_sampling as peers
from harness.timing import Contender, matmul_tflops

STEPS = 10
Makers = Mapping[str, Callable[[], Contender]]


def network(phase: Phase, name: str) -> str:
    """``name``, or what stands for it in a dry run."""
    return "tiny" if phase.dry else name


def steps(phase: Phase, at_most: int = STEPS) -> int:
    return 2 if phase.dry else at_most


def modes(phase: Phase) -> peers.Modes:
    """torch.compile's; a dry run has the same names, and compiles nothing: that takes minutes."""
    if not phase.dry:
        return peers.MODES["cuda"]
    return {name: {"disable": True} for name in peers.MODES["cuda"]}


def peer(make: Callable[[], Callable[[], Any]], backend: str | None = None) -> Contender:
    """Its steps are launched, or replayed, as they are: no graph is made around them."""
    return Contender("", make(), backend, capturable=False)


def chosen(phase: Phase, name: str, batch: int, wanted: list[str], at_most: int = STEPS) -> Makers:
    """Of harness.peers_sampling's contenders those that are wanted."""
    count = steps(phase, at_most)
    made = peers.contenders(network(phase, name), batch, phase.device, count, modes(phase))
    return {one: partial(peer, made[one]) for one in wanted}


@dataclass(frozen=True)
class Case:
    """What is raced on a network at a batch. ``takes``: the seconds to make a contender, if it
    takes many."""

    network: str
    batch: int
    makers: Makers
    at_most: int = STEPS  # steps
    takes: Mapping[str, float] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        return {"network": self.network, "batch": self.batch}


def race_samplers(phase: Phase, cases: Sequence[Case]) -> None:
    write_matmul_rate(phase)
    phase.plan({"contender": name, **case.fields()} for case in cases for name in case.makers)
    for case in cases:
        if phase.time_left(**case.fields()):
            race_case(phase, case)


def race_case(phase: Phase, case: Case) -> None:
    fields, batch = case.fields(), case.batch
    count, tried = steps(phase, case.at_most), network(phase, case.network)
    flops = peers.network_flops(tried, batch)
    compared: dict[str, torch.Tensor] = {}  # by who made them
    with phase.attempt(contender="float32 reference", **fields):
        compared = dict([peers.reference_images(tried, phase.device, count)])

    def figures(contender: str, seconds: float) -> dict[str, Any]:
        step = seconds / count
        return {"ms_per_step": 1e3 * step, "tflops": flops / step / 1e12}

    def describe(contender: Contender) -> dict[str, Any]:
        known: dict[str, Any] = {"peak_gib": device.peak_gib(phase.device)}
        images = contender.call()
        for who, reference in compared.items():
            known |= {"psnr_db": peers.psnr_db(images, reference), "psnr_against": who}
        if isinstance(contender.call, peers.Sampling):
            sampler = contender.call.sampler
            known |= {"norms": norms(phase), "ran": sampler.explain()}
            known["seconds_of_a_call"] = sampler.stats.seconds
        return known

    how = {"describe": describe, "takes": case.takes, "steps": count}
    race(phase, case.makers, figures, **how, **fields)


def norms(phase: Phase) -> str:
    """The backend of fastdiff's norms, with what is named now."""
    x, row = torch.zeros(1, 32, 2, 2, device=phase.device), torch.zeros(32, device=phase.device)
    return OPERATIONS["group_norm_silu"].choose(x, 32, row, row).backend


def write_matmul_rate(phase: Phase) -> None:
    """A row: what a large product reaches here, in the dtype of the samplers' convolutions."""
    dtype = torch.float32 if phase.dry else torch.bfloat16
    with phase.attempt(ceiling="matmul"):
        phase.write(ceiling="matmul", matmul_tflops=matmul_tflops(phase.device, dtype))
