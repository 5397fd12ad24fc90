"""The samplers that accelerated objects of improved-diffusion's family keep, and their graphs."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from fastdiff.integrations.improved_diffusion import accelerate
from improved_diffusion_tools import CODEBASES, LOOPS, SHAPE, Network, drawn


@pytest.mark.seconds
@pytest.mark.parametrize("loop", LOOPS)
def test_one_graph_serves_every_call(made, loop):
    stock, network = CODEBASES["guided"].diffusion(), Network().eval()
    fast = accelerate(stock, capture=True)
    for kwargs in ({}, {"clip_denoised": False}, {"noise": torch.ones(SHAPE)}):
        expected, state = drawn(getattr(stock, loop), network, SHAPE, **kwargs)
        for _ in range(2):
            sample, fast_state = drawn(getattr(fast, loop), network, SHAPE, **kwargs)
            torch.testing.assert_close(sample, expected, atol=1e-3, rtol=1e-3)
            assert torch.equal(fast_state, state)
    assert made() == 1
    with torch.no_grad():
        network.scale.mul_(0.5)  # an optimizer's step between two calls
    expected, _ = drawn(getattr(stock, loop), network, SHAPE)
    sample, _ = drawn(getattr(fast, loop), network, SHAPE)
    torch.testing.assert_close(sample, expected, atol=1e-3, rtol=1e-3)
    assert made() == 1


def test_a_method_s_graph_is_kept_too(made):
    stock, network = CODEBASES["guided"].diffusion(), Network().eval()
    fast = accelerate(stock, capture=True)
    for _ in range(2):
        fast.p_sample_loop(network.forward, SHAPE)
    assert made() == 1


@pytest.mark.seconds
def test_samplers_live_as_long_as_their_model():
    fast, network = accelerate(CODEBASES["improved"].diffusion()), Network()
    fast.p_sample_loop(network, SHAPE)
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


@pytest.mark.seconds
def test_a_model_keeps_a_few_samplers_only():
    network = Network().eval()
    made = [accelerate(CODEBASES["improved"].diffusion()) for _ in range(6)]
    for fast in made:
        fast.p_sample_loop(network, (1, 3, 2, 2))
    processes = [weakref.ref(fast.process) for fast in made]
    del made, fast
    gc.collect()
    assert sum(process() is not None for process in processes) == 4


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_a_model_have_samplers_of_their_own(copied):
    stock, network = CODEBASES["improved"].diffusion(), Network().eval()
    fast = accelerate(stock)
    fast.p_sample_loop(network, SHAPE)
    other = copied(network)
    other._parameters = {"scale": nn.Parameter(torch.zeros(1, 3, 1, 1))}
    sample, _ = drawn(fast.p_sample_loop, other, SHAPE)
    torch.testing.assert_close(sample, drawn(stock.p_sample_loop, other, SHAPE)[0])


def test_a_model_that_sampled_is_saved_without_its_samplers():
    network = Network().eval()
    before = len(pickle.dumps(network))
    accelerate(CODEBASES["improved"].diffusion()).p_sample_loop(network, SHAPE)
    network.given.clear()
    data = pickle.dumps(network)
    assert b"fastdiff.sampl" not in data and len(data) < before + 100
    assert list(network.state_dict()) == ["scale"]


def test_copies_of_the_accelerated_object():
    fast = accelerate(CODEBASES["improved"].diffusion(), dtype=torch.bfloat16)
    for other in (copy.copy(fast), copy.deepcopy(fast)):
        assert other.options == fast.options
        expected, _ = drawn(fast.p_sample_loop, Network(), SHAPE)
        torch.testing.assert_close(drawn(other.p_sample_loop, Network(), SHAPE)[0], expected)


def test_dtype_and_layout_reach_the_network():
    seen = []

    class Watched(nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            seen.append((out.dtype, x.is_contiguous(memory_format=torch.channels_last)))
            return out

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = Watched(3, 3, 3, padding=1)

        def forward(self, x, t):
            return self.conv(x)

    network = Net().eval()
    fast = accelerate(CODEBASES["improved"].diffusion(), dtype=torch.bfloat16, channels_last=True)
    sample = fast.p_sample_loop(network, SHAPE)
    assert set(seen) == {(torch.bfloat16, True)} and sample.dtype == torch.float32
    expected, _ = drawn(CODEBASES["improved"].diffusion().p_sample_loop, network, SHAPE)
    torch.testing.assert_close(
        drawn(fast.p_sample_loop, network, SHAPE)[0], expected, atol=0.1, rtol=0
    )
