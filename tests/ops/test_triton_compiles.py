"""How many Triton kernels a network compiles: few, and none anew for another batch."""

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import ops
from fastdiff.ops import dispatch

pytest.importorskip("triton")
from triton_tools import counting  # noqa: E402

MOST = 20  # of one network in one dtype, its sampler's step and its training's noising included
LAYOUTS = (torch.channels_last, torch.contiguous_format)


@pytest.fixture
def network(request, monkeypatch):
    """A preset without storage in a dtype and layout, for Triton's launchers to see."""
    name, dtype, layout = request.param
    with torch.device("meta"):
        network = fastdiff.UNet.from_preset(name).to(dtype=dtype, memory_format=layout)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # as on a GPU; without storage layouts are forgotten
            module.register_forward_hook(lambda _, __, out: out.to(memory_format=layout))
    monkeypatch.setattr(dispatch, "require", lambda *_: None)
    with fastdiff.backend("triton"):
        yield network


networks = pytest.mark.parametrize(
    "network",
    [
        (name, dtype, layout)
        for name in ("ddpm-cifar10", "iddpm-imagenet64")
        for dtype in (torch.bfloat16, torch.float32)
        for layout in LAYOUTS
    ],
    indirect=True,
    ids=str,
)


def launch(network, batch):
    """A forward of the network, a step of its sampler and the noising of its training."""
    weight = network.input_blocks[0][0].weight
    size = network.image_size
    x = torch.empty(batch, 3, size, size, dtype=weight.dtype, device="meta")
    t, number = (torch.zeros(n, dtype=torch.long, device="meta") for n in (batch, 1))
    output = network(x, t)
    process = fastdiff.create_diffusion(learn_sigma=output.shape[1] > 3)
    table = fastdiff.StepTable.from_process(process).to("meta")
    ops.posterior_step(x, output, table, number, seed=number, return_x_start=False)
    ops.q_sample(x, t, table.a, table.b, seed=number, step=number)
    return output


@networks
@torch.no_grad()
def test_a_network_compiles_few_kernels(network):
    with counting() as kernels:
        launch(network, 16)
        assert len(kernels) <= MOST, kernels
        kernels.clear()
        launch(network, 64)
        launch(network, 1)
    assert not kernels


@networks
def test_training_compiles_nothing_anew_for_another_batch(network):
    with counting() as kernels:
        launch(network, 16).sum().backward()
        assert "finish_kernel" in kernels
        kernels.clear()
        launch(network, 64).sum().backward()
    assert not kernels
