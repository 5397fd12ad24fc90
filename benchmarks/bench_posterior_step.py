"""One DDPM step after the network, against improved-diffusion's p_mean_variance and p_sample.

Floor: reads x_t and the output (twice as wide where it holds the variance), writes x_prev: 3 passes
or 4; one more where the predicted x_0 is returned. With memory, a third-order multistep row against
the same in PyTorch: two slots read and one written, 6 passes.
"""

from functools import partial

import pytest
import torch

import fastdiff
from conftest import Case
from fastdiff.ops.dispatch import OPERATIONS
from harness import contenders, floors
from harness.peers_eager import Process
from harness.timing import Contender, Inputs, normal

STEP = 500  # a row that draws noise
FLOPS = {"fixed": 9, "learned": 15}  # per element, the noise apart


@pytest.mark.parametrize("x_start", [True, False], ids=["with x_0", "x_prev alone"])
@pytest.mark.parametrize("variance", ["fixed", "learned"])
def test_posterior_step(
    race, device, compiles, image, batch_of_device, dtype, layout, variance, x_start
):
    batch, learned = batch_of_device, variance == "learned"
    diffusion = fastdiff.create_diffusion(steps=1000, learn_sigma=learned)
    table = fastdiff.StepTable.from_process(diffusion).to(device)
    t = torch.full((batch,), len(table) - 1 - STEP, device=device)
    published, on_device = Process(learned), Process(learned, device)

    def ours(x_t, output, call=fastdiff.ops.posterior_step):
        return call(x_t, output, table, STEP, seed=1, return_x_start=x_start)

    def inputs() -> Inputs:
        image_like = partial(normal, dtype=dtype, device=device, layout=layout)
        channels = image.channels * (2 if learned else 1)
        return (
            image_like(batch, image.channels, image.size, image.size),
            image_like(batch, channels, image.size, image.size, offset=1),
        )

    first = inputs()
    case = Case(
        "posterior_step",
        str(image),
        dtype,
        batch,
        variant=f"{variance}, {'with x_0' if x_start else 'x_prev alone'}",
        layout=layout,
        size_bytes=floors.posterior_step(*first, learned=learned, returns_x_start=x_start),
        flops=first[0].numel() * FLOPS[variance],
    )
    choose = partial(ours, *first, OPERATIONS["posterior_step"].choose)
    plan, others, reason = contenders.of_operation(ours, choose, first[0])
    eager = Contender("eager", lambda x, output: published.p_sample(x, output, t), capturable=False)
    peers = [*others, eager, contenders.copy()]
    if device.type == "cuda":  # the same, without copies from the host: as fast as eager can be
        peers.append(Contender("eager, device tables", lambda x, o: on_device.p_sample(x, o, t)))
    if compiles(image, batch):
        peers.append(contenders.compiled(lambda x, o: on_device.p_sample(x, o, t)))
    race(case, plan, peers, first, inputs, reason=reason)


# DPM-Solver++(3M)'s terms: x_0 and the two before it, of which the older makes room for it.
ROW = {"a": 1.25, "b": -0.75, "clip": 1.0, "c": 0.5, "d": 0.75, "e0": -0.375, "e1": 0.125}
KEPT = {"slot": 1.0, "k": 1.0, "timesteps": 0.0}


def third_order(x: torch.Tensor, output: torch.Tensor, last: torch.Tensor, older: torch.Tensor):
    """x_prev, and the x_0 that a list of the last ones takes in: nothing is copied for it."""
    x_start = (ROW["a"] * x + ROW["b"] * output).clamp(-1, 1)
    x_prev = ROW["c"] * x_start + ROW["d"] * x + ROW["e0"] * last + ROW["e1"] * older
    return x_prev, x_start


def test_posterior_step_with_memory(race, device, compiles, image, batch_of_device, dtype, layout):
    batch = batch_of_device
    table = fastdiff.StepTable.from_rows([ROW | KEPT]).to(device)

    def ours(x_t, output, *memory, call=fastdiff.ops.posterior_step):
        return call(x_t, output, table, 0, memory=memory, return_x_start=False)

    def inputs() -> Inputs:
        shape = (batch, image.channels, image.size, image.size)
        image_like = partial(normal, *shape, dtype=dtype, device=device, layout=layout)
        return tuple(image_like(offset=i) for i in range(4))

    first = inputs()
    moved = floors.posterior_step(
        *first[:2], memory=first[2:], kept=first[3], returns_x_start=False
    )
    case = Case(
        "posterior_step", str(image), dtype, batch, variant="memory, third order", layout=layout,
        size_bytes=moved, flops=first[0].numel() * 13,
    )  # fmt: skip
    choose = partial(ours, *first, call=OPERATIONS["posterior_step"].choose)
    plan, others, reason = contenders.of_operation(ours, choose, first[0])
    peers = [*others, Contender("eager", third_order), contenders.copy()]
    if compiles(image, batch):
        peers.append(contenders.compiled(third_order))
    race(case, plan, peers, first, inputs, reason=reason)
