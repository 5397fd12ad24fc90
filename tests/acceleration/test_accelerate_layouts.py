"""channels_last: weights of plain convolutions alone, since others may count on their strides."""

import copy

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastdiff
from accelerate_tools import T, X, assert_close, network
from fastdiff.integrations.diffusers import accelerate_pipeline, restore_pipeline
from fastdiff.models.layouts import plain_convolutions

pytestmark = pytest.mark.usefixtures("seeded")


class Dora(nn.Module):
    """A weight-decomposed low-rank adapter around a convolution, with peft's names and views."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        narrow, wide = (base.in_channels, rank), (rank, base.out_channels)
        kernel = {"kernel_size": base.kernel_size, "bias": False}
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(*narrow, padding=1, **kernel)})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(*wide, 1, bias=False)})
        self.magnitude = nn.Parameter(1 + torch.rand(1, base.out_channels, 1, 1))

    def forward(self, x):
        weight, bias = self.base_layer.weight, self.base_layer.bias
        up, down = self.lora_B["default"].weight, self.lora_A["default"].weight
        change = up.view(len(up), -1) @ down.view(len(down), -1)
        norm = (weight.view(len(weight), -1) + change).norm(dim=1)
        y = self.base_layer(x) - bias[:, None, None]
        y = y + self.lora_B["default"](self.lora_A["default"](x))
        return y * (self.magnitude / norm.view_as(self.magnitude)) + bias[:, None, None]


def adapt(model):
    for block in model.modules():
        for name in ("conv1", "conv2"):
            if isinstance(getattr(block, name, None), nn.Conv2d):
                setattr(block, name, Dora(getattr(block, name)))
    return model


def unet():
    return diffusers.UNet2DModel(
        in_channels=3,
        out_channels=3,
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    ).eval()


@pytest.mark.parametrize("first", ["adapters", "accelerate"])
def test_adapters_in_a_pipeline(first):
    plain = adapt(unet())
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler(beta_end=0.004))
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "np"}
    if first == "accelerate":
        accelerate_pipeline(pipe)
        restore_pipeline(pipe)
    adapt(pipe.unet)
    pipe.unet.load_state_dict(plain.state_dict())
    expected = pipe(generator=torch.manual_seed(0), **call).images
    accelerate_pipeline(pipe)
    actual = pipe(generator=torch.manual_seed(0), **call).images
    assert abs(actual - expected).max() < 1e-3
    weights = dict(pipe.unet.named_parameters())
    assert not weights["conv_in.weight"].is_contiguous()
    assert all(w.is_contiguous() for name, w in weights.items() if ".resnets." in name)
    restore_pipeline(pipe)
    assert all(weight.is_contiguous() for weight in pipe.unet.parameters())


class Positions(nn.Module):
    """A table of positions and memories of keys, both 4-D and read by view."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.memory = nn.Parameter(torch.randn(2, 2, 3, 8))

    def forward(self, x):
        return x + self.table.view(1, -1).mean() + self.memory.view(-1).sum()


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.view(len(self.weight), -1).mean(1)[:, None, None, None]
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Reading(nn.Module):
    """A block that computes with its convolution's weight, in another method."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x):
        return self.inner(x) * self.size()

    def size(self):
        return self.inner[0].weight.view(-1).norm()


def tied():
    layers = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    layers[1].weight = layers[0].weight
    return layers


def hooked(change):
    return nn.Sequential(change(nn.Conv2d(8, 8, 3, padding=1)))


class Scaled(nn.Module):
    def forward(self, weight):
        return (2 * weight).view(-1).view_as(weight)


def parametrized(layer):
    return parametrize.register_parametrization(layer, "weight", Scaled())


OTHERS = {
    "positions": Positions,
    "derived": lambda: Standardized(8, 8, 3, padding=1),
    "reading": Reading,
    "tied": tied,
    "spectral norm": lambda: hooked(parametrizations.spectral_norm),
    "weight norm": lambda: hooked(parametrizations.weight_norm),
    "parametrized": lambda: hooked(parametrized),
    "old spectral norm": lambda: hooked(nn.utils.spectral_norm),
    "pruned": lambda: hooked(lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
    "strided": lambda: nn.Conv2d(8, 8, 3, padding=1),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_plain_convolutions_weight_keeps_its_strides(kind):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), OTHERS[kind]()).eval()
    if kind == "strided":
        model[1].weight.data = model[1].weight.data.permute(1, 0, 3, 2)
    x = torch.randn(2, 8, 4, 4)
    expected = model(x)
    strides = {name: p.stride() for name, p in model.named_parameters()}
    fastdiff.accelerate(model, channels_last=True)
    assert_close(model(x), expected)
    after = {name: p.stride() for name, p in model.named_parameters()}
    assert after.pop("0.weight") != strides["0.weight"]
    assert after == {name: stride for name, stride in strides.items() if name != "0.weight"}
    assert all(value.is_contiguous() for value in model.state_dict().values())
    fastdiff.restore(model)
    assert {name: p.stride() for name, p in model.named_parameters()} == strides


def test_plain_convolutions_are_those_of_two_dimensions():
    model = nn.ModuleList(
        [nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)]
    )
    assert plain_convolutions(model) == [model[1], model[3]]
    assert len(plain_convolutions(network())) == 8
    assert plain_convolutions(nn.Conv2d(4, 4, 1)) != []
    with torch.device("meta"):
        lazy = nn.ModuleList([nn.LazyConv2d(4, 3)])
    assert plain_convolutions(lazy) == []


def test_restore_finds_a_weight_that_was_renamed_or_replaced():
    model = network()
    expected = model(X, T)
    fastdiff.accelerate(model, channels_last=True)
    assert not model.first.weight.is_contiguous()
    layer = model.first
    model.first = nn.Sequential(layer)
    layer.weight = nn.Parameter(copy.deepcopy(layer.weight.detach()))
    assert_close(model(X, T), expected)
    fastdiff.restore(model)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert torch.equal(model(X, T), expected)
