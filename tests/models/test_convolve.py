"""Convolutions in training: by kernels where the layer is plain, by its own forward elsewhere."""

import copy

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.models import convolve as module
from fastdiff.models.convolve import convolve
from fastdiff.ops.convolution import fastest
from fastdiff.ops.convolution.fastest import Products
from kernel_tools import ISAS, forced_isa


@pytest.fixture(autouse=True)
def pays(monkeypatch):
    """On CPUs without tiles too."""
    monkeypatch.setattr(fastest, "products_of", lambda dtype: Products.SPLIT)


def plain(c=32, k=48, kernel=3, **options):
    return nn.Conv2d(c, k, kernel, padding=kernel // 2, **options)


def images(n=2, c=32, side=32):
    x = torch.randn(n, c, side, side).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def by_kernels(layer, x):
    y = convolve(layer, x)
    return "convolution_training" in y.grad_fn.name(), y


@pytest.mark.parametrize("stride, kernel, bias", [(1, 3, True), (2, 3, True), (1, 5, False)])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_layers_own_answer_and_gradients(stride, kernel, bias, autocast):
    torch.manual_seed(0)
    layer, x = plain(kernel=kernel, stride=stride, bias=bias), images(n=16)
    leaves = (x, *layer.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        served, y = by_kernels(layer, x)
        expected = layer(x)
    dy = torch.randn(y.shape).to(y.dtype)
    bound = 2e-2 if autocast else 2e-5
    assert served and y.dtype == expected.dtype
    assert (y - expected).abs().max() <= bound * expected.abs().max()
    pairs = zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    )
    for found, right in pairs:
        assert found.dtype == torch.float32
        assert (found - right).abs().max() <= bound * right.abs().max()


def hooked(kind):
    layer = plain()
    getattr(layer, f"register_{kind}")(lambda *given: None)
    return layer


def replaced():
    layer = plain()
    layer.forward = lambda x: nn.Conv2d.forward(layer, x)
    return layer


class Derived(nn.Conv2d):
    pass


OTHERS = {
    "forward hook": lambda: hooked("forward_hook"),
    "pre-hook": lambda: hooked("forward_pre_hook"),
    "backward hook": lambda: hooked("full_backward_hook"),
    "replaced forward": replaced,
    "derived": lambda: Derived(32, 48, 3),
    "groups": lambda: plain(groups=2),
    "dilation": lambda: plain(dilation=2),
    "circular": lambda: plain(padding_mode="circular"),
    "padding by name": lambda: nn.Conv2d(32, 48, 3, padding="same"),
    "two strides": lambda: plain(stride=(1, 2)),
    "few channels": lambda: plain(k=3),
    "one tap": lambda: plain(kernel=1),
    "many taps": lambda: plain(kernel=9),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(plain()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_layer_is_called(name):
    torch.manual_seed(0)
    layer, x = OTHERS[name](), images()
    served, y = by_kernels(layer, x)
    assert not served and torch.equal(y, layer(x))


def test_another_call_is_the_layers():
    torch.manual_seed(0)
    layer, x = plain(), images()
    assert by_kernels(layer, x)[0]
    assert not by_kernels(layer, x.contiguous())[0]
    assert not by_kernels(layer, images(n=1, side=4))[0]
    with fastdiff.backend("reference"):
        assert not by_kernels(layer, x)[0]
    with torch.autocast("cpu", torch.float16):
        assert not by_kernels(layer, x)[0]
    assert not by_kernels(copy.deepcopy(layer).eval(), x)[0]  # a sampler's guidance
    assert not by_kernels(copy.deepcopy(layer).double(), x.double())[0]
    with torch.no_grad():
        assert torch.equal(convolve(layer, x), layer(x))
    frozen = plain().requires_grad_(False)
    assert convolve(frozen, x.detach()).grad_fn is None


def test_without_tiles(monkeypatch):
    """In bfloat16, and in float32 where Winograd's algorithm pays."""
    monkeypatch.setattr(fastest, "products_of", lambda dtype: Products.FLOAT32)
    layer, x = plain(), images()
    wide, many = plain(64), images(c=64)
    for isa in ISAS:
        with forced_isa(isa):
            assert not by_kernels(layer, x)[0]
            assert by_kernels(wide, many)[0] == (isa != "baseline")
            with torch.autocast("cpu", torch.bfloat16):
                assert by_kernels(layer, x)[0] == (isa != "baseline")


def losses(steps=50):
    """Of a small U-Net on images that it can learn."""
    torch.manual_seed(0)
    model = fastdiff.UNet(
        image_size=8, in_channels=1, model_channels=32, out_channels=1, num_res_blocks=1,
        channel_mult=(1, 1), attention_resolutions=(),
    )  # fmt: skip
    diffusion = fastdiff.create_diffusion(steps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.linspace(-1, 1, 8).expand(4, 1, 8, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        t = torch.randint(100, (4,))
        loss = diffusion.training_losses(model, x, t)["loss"].mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.seconds
def test_a_run_is_the_same_to_rounding(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_PRODUCTS", 0)
    ours = losses()
    monkeypatch.setattr(module, "FEWEST_PRODUCTS", 1 << 60)
    theirs = losses()
    assert not torch.equal(ours, theirs) and theirs[-10:].mean() < theirs[0] / 4
    assert torch.allclose(ours, theirs, rtol=5e-3)
