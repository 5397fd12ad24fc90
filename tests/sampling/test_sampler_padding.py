"""Convolutions of few channels padded to eight: what a GPU runs in half precision, on the CPU."""

import pytest
import torch
from torch import nn

from capture_tools import assert_equal, pair
from fastdiff.sampling.network import execution, packing, padding
from fastdiff.sampling.network.network import Network
from fastdiff.sampling.network.padding import PaddedConvolution
from fastdiff.sampling.sampler import Sampler
from sampler_tools import diffusion, small_unet

PROCESS = diffusion(20)
SHAPE = (2, 3, 8, 8)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def padded(monkeypatch):
    """What is padded on a GPU is padded here: by each layer's channels those that it was run with,
    (out, in)."""
    calls = {}
    call = PaddedConvolution.__call__

    def counted(self, x):
        calls[self.layer.in_channels, self.layer.out_channels] = tuple(self.tensors[0].shape[:2])
        return call(self, x)

    monkeypatch.setattr(padding, "DEVICES", ("cpu",))
    monkeypatch.setattr(packing, "serves", lambda dtype: False)
    monkeypatch.setattr(execution, "slower", lambda dtype: "a GPU")
    monkeypatch.setattr(PaddedConvolution, "__call__", counted)
    return calls


class Ends(nn.Module):
    """From three channels, inside, and to three; strides, no bias and 1x1 among them."""

    def __init__(self, out=3):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding="same", bias=False)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.few = nn.Conv2d(16, 5, 1)
        self.down = nn.Conv2d(5, 4, 2, stride=2)
        self.grouped = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.last = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.out = nn.Conv2d(4, out, 3, padding=1)

    def forward(self, x, t):
        x = torch.tanh(self.inner(torch.tanh(self.first(x))))
        return self.out(self.last(self.grouped(torch.tanh(self.down(self.few(x))))))


PADDED = {(3, 16): (16, 8), (16, 5): (8, 16), (5, 4): (8, 8), (4, 3): (8, 8)}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("form", ["cast", "half", "half, asked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padded_convolutions_compute_what_plain_ones_do(
    padded, monkeypatch, dtype, form, channels_last
):
    model = Ends().eval()
    asked = None if form == "half" else dtype
    if form != "cast":
        model.to(dtype)
    x, t = torch.randn(SHAPE), torch.zeros(2)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    outputs = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(padding, "DEVICES", devices)
        network = Network(model, asked, channels_last=channels_last, compile=False)
        with network.sampling(), torch.no_grad():
            outputs.append(network(x, t, {}))
    ours, plain = outputs
    assert (ours.dtype, ours.stride()) == (plain.dtype, plain.stride())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.float(), plain.float(), rtol=4 * eps, atol=4 * eps)
    assert padded == PADDED


def test_the_zeros_change_nothing(padded):
    """In float64 the sums are the same numbers."""
    layer = nn.Conv2d(3, 6, 3, padding=1).double()
    x = torch.randn(SHAPE).double()
    ours = PaddedConvolution(layer)
    with torch.no_grad():
        ours.begin()
        torch.testing.assert_close(ours(x), layer(x), rtol=1e-14, atol=1e-14)
        assert ours.tensors[0].shape == (8, 8, 3, 3) and ours.tensors[1].shape == (8,)


def test_float32_is_not_padded(padded):
    Sampler(Ends(), PROCESS, steps=2).sample(SHAPE)
    Sampler(Ends(), PROCESS, steps=2, dtype=torch.float32).sample(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):  # the caller's, which casts at every call
        Sampler(Ends(), PROCESS, steps=2).sample(SHAPE)
    assert padded == {}


def test_the_ends_of_a_unet_are_padded(padded):
    Sampler(small_unet(3), PROCESS, steps=2, dtype=torch.bfloat16).sample(SHAPE)
    assert padded == {(3, 32): (32, 8), (32, 3): (8, 32)}


def test_layers_that_somebody_else_has_a_hand_in_are_left_alone(padded):
    model = Ends()
    model.first.register_forward_pre_hook(lambda layer, args: None)
    model.few.forward = model.few.forward
    nn.utils.spectral_norm(model.down)
    Sampler(model, PROCESS, steps=2, dtype=torch.bfloat16).sample(SHAPE)
    assert padded.keys() == {(4, 3)}


def test_what_does_not_fit_is_the_layers_to_say(padded):
    layer = nn.Conv2d(3, 6, 3).to(torch.bfloat16)
    ours = PaddedConvolution(layer)
    ours.begin()
    with torch.no_grad(), pytest.raises(RuntimeError, match="to have 3 channels, but got 5"):
        ours(torch.zeros(2, 5, 8, 8, dtype=torch.bfloat16))
    with torch.no_grad():
        assert ours(torch.zeros(3, 8, 8, dtype=torch.bfloat16)).shape == (6, 6, 6)
    x = torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


@pytest.mark.parametrize("half", [False, True])
def test_weights_are_read_live_also_by_a_graph(made, padded, half):
    model = Ends().eval()
    if half:
        model.to(torch.bfloat16)
    captured, eager = pair(model, PROCESS, steps=3, dtype=torch.bfloat16)
    samples = [assert_equal(captured, eager, *SHAPE)]

    def changed(recaptures):
        before = made()
        samples.append(assert_equal(captured, eager, *SHAPE))
        assert not torch.equal(samples[-1], samples[-2])
        assert made() - before == recaptures

    for name in ("first.weight", "out.weight", "out.bias"):
        model.get_parameter(name).data.mul_(2)  # no version changes
        changed(0)
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})
    changed(0)
    model.load_state_dict({k: v - 0.2 for k, v in model.state_dict().items()}, assign=True)
    changed(int(half))  # what is cast is cast into the same copies
    model.out = nn.Conv2d(4, 3, 1).to(model.out.weight.dtype)
    changed(1)
    assert padded == PADDED and type(model.first.weight) is nn.Parameter


def test_a_layout_that_changes_is_another_graph(made, padded):
    model = Ends().eval().to(torch.bfloat16)
    captured, eager = pair(model, PROCESS, steps=2, dtype=torch.bfloat16, channels_last=False)
    assert_equal(captured, eager, *SHAPE)
    model.to(memory_format=torch.channels_last)
    assert_equal(captured, eager, *SHAPE)
    assert made() == 2


def test_a_graph_does_not_outlive_the_padded_weights_that_it_reads(made, padded):
    model = Ends().eval().to(torch.bfloat16)
    captured, eager = pair(model, PROCESS, steps=2, dtype=torch.bfloat16)
    assert_equal(captured, eager, *SHAPE)
    hook = model.first.register_forward_pre_hook(lambda layer, args: None)
    assert_equal(captured, eager, 1, *SHAPE[1:])  # another graph; the first one is kept
    hook.remove()
    model.first.weight.data.mul_(2)
    assert_equal(captured, eager, *SHAPE)
    assert made() == 3


def test_a_model_whose_layers_come_to_be_packed_or_padded(padded, monkeypatch):
    """As one does that moves between the CPU and a GPU."""
    model = Ends().eval()
    sampler = Sampler(model, PROCESS, steps=2, dtype=torch.bfloat16)
    first = sampler.sample(SHAPE)
    monkeypatch.setattr(packing, "serves", lambda dtype: True)
    monkeypatch.setattr(packing, "_reorder", lambda weight, geometry, shape: weight)
    monkeypatch.setattr(
        packing,
        "_convolve",
        lambda x, weight, bias, geometry: nn.functional.conv2d(
            x, weight, bias, geometry[1], geometry[0], *geometry[2:]
        ),
    )
    assert sampler.sample(SHAPE).shape == SHAPE
    monkeypatch.setattr(packing, "serves", lambda dtype: False)
    assert torch.equal(sampler.sample(SHAPE), first)
