"""q_sample with its own noise, against randn and the published arithmetic.

Floor: reads x_0 and writes x_t, 2 passes; 3 where the noise is returned too.
"""

from functools import partial

import pytest
import torch

import fastdiff
from conftest import Case
from fastdiff.ops.explain import CHOOSERS
from harness import contenders, floors
from harness.peers_eager import Process
from harness.timing import Contender, Inputs, normal

FLOPS = 3  # per element; drawing the noise is integer arithmetic for the most part


@pytest.mark.parametrize("return_noise", [True, False], ids=["with noise", "x_t alone"])
def test_q_sample(race, device, compiles, image, batch_of_device, dtype, layout, return_noise):
    batch = batch_of_device
    process = Process(device=device)
    t = torch.linspace(0, 999, batch, device=device).long()
    tables = (process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod)

    def ours(x_start, call=fastdiff.ops.q_sample):
        return call(x_start, t, *tables, seed=1, return_noise=return_noise)

    def eager(x_start):
        return process.q_sample(x_start, t)

    def inputs() -> Inputs:
        return (
            normal(
                *(batch, image.channels, image.size, image.size),
                dtype=dtype,
                device=device,
                layout=layout,
            ),
        )

    first = inputs()
    case = Case(
        "q_sample",
        str(image),
        dtype,
        batch,
        variant="with noise" if return_noise else "x_t alone",
        layout=layout,
        size_bytes=floors.q_sample(first[0], returns_drawn=return_noise),
        flops=first[0].numel() * FLOPS,
    )
    choose = partial(ours, first[0], CHOOSERS["q_sample"])
    plan, others, reason = contenders.of_operation(ours, choose, first[0])
    peers = [*others, Contender("eager", eager), contenders.copy()]
    if compiles(image, batch):
        peers.append(contenders.compiled(eager))
    race(case, plan, peers, first, inputs, reason=reason)
