"""What is not a U-Net as its class makes it is named, and not executed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

from fastdiff import UNet
from fastdiff.models import presets
from fastdiff.models.blocks import ResBlock
from fastdiff.models.execution.problems import difference
from unet_tools import SMALL, small_unet


class Derived(UNet):
    pass


class LowRank(nn.Module):
    """An adapter around a layer, as LoRA puts them."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


class OtherLinear(nn.Linear):
    pass


def set_item(owner, index, value):
    owner[index] = value


def attribute(owner, name, value):
    setattr(owner, name, value)


CHANGES = {
    "a hook": (
        lambda m: m.middle_block[1].register_forward_hook(lambda *_: None),
        "middle_block.1 has a hook",
    ),
    "a hook before": (
        lambda m: m.out[1].register_forward_pre_hook(lambda *_: None),
        "out.1 has a hook",
    ),
    "an adapter": (
        lambda m: set_item(m.time_embed, 0, LowRank(m.time_embed[0])),
        "time_embed.0.base was added",
    ),
    "another class": (
        lambda m: set_item(m.time_embed, 0, OtherLinear(32, 128)),
        "time_embed.0 is a test_executor_problems.OtherLinear, not a Linear",
    ),
    "another layer": (
        lambda m: set_item(m.out, 1, nn.ReLU()),
        "out.1 is a torch.ReLU, not a SiLU",
    ),
    "another convolution": (
        lambda m: set_item(m.out, 2, nn.Conv2d(32, 3, 3, padding=1, padding_mode="circular")),
        "out.2 has padding_mode 'circular', not 'zeros'",
    ),
    "other groups": (
        lambda m: set_item(m.out, 0, nn.GroupNorm(8, 32)),
        "out.0 has num_groups 8, not 32",
    ),
    "no bias": (
        lambda m: m.out[2].register_parameter("bias", None),
        "out.2 has parameters of shapes {'weight': (3, 32, 3, 3), 'bias': None}",
    ),
    "a layer less": (lambda m: m.out.__delitem__(2), "out.2 was removed"),
    "another order": (
        lambda m: attribute(m.middle_block[1], "order", "qkv_first"),
        "middle_block.1 has order 'qkv_first', not 'heads_first'",
    ),
    "another forward": (
        lambda m: attribute(m.middle_block[0], "forward", lambda x, emb, size=None: x),
        "middle_block.0 has another forward",
    ),
    "another unroll": (
        lambda m: attribute(m.middle_block[0], "unroll", None),
        "middle_block.0 has another unroll",
    ),
    "weight normalization": (
        lambda m: parametrizations.weight_norm(m.out[2]),
        "out.2.parametrizations was added",
    ),
    "pruning": (lambda m: prune.random_unstructured(m.out[2], "bias", 0.5), "out.2 has a hook"),
    "a compiled block": (lambda m: m.middle_block[0].compile(), "middle_block.0 is compiled"),
    "half precision": (lambda m: m.half(), "its weights are float16"),
    "mixed precision": (
        lambda m: m.out[2].double(),
        "out.2 has weight in torch.float64, others in torch.float32",
    ),
    "another device": (lambda m: m.to("meta"), "time_embed.0 is on meta"),
    "another configuration": (
        lambda m: m.config.update(model_channels=64),
        "the network has _settings",
    ),
    "an argument more": (lambda m: m.config.update(note=1), "its config makes no UNet"),
    "a value of another type": (lambda m: m.config.update(dims=[]), "its config makes no UNet"),
    "no text": (lambda m: m.config.update(dims=torch.float32), "its config makes no UNet"),
    "a fused class": (
        lambda m: attribute(m.middle_block[0], "__class__", type("Fused", (ResBlock,), {})),
        "middle_block.0 is a test_executor_problems.Fused, not a ResBlock",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_named(change):
    model = small_unet()
    assert difference(model) == ""
    make, message = CHANGES[change]
    make(model)
    said = difference(model)
    assert message in said and "\n" not in said


@pytest.mark.parametrize("model", [Derived(**SMALL), nn.Linear(1, 1), len])
def test_what_is_no_unet_of_fastdiff(model):
    assert difference(model).endswith("not a UNet of fastdiff")


def test_a_hook_on_all_modules():
    model = small_unet()
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert difference(model) == "there is a hook on all modules"
    finally:
        handle.remove()
    assert difference(model) == ""


def test_the_mode_is_no_difference():
    model = small_unet(dropout=0.3).train()
    assert difference(model) == "" == difference(model.eval())
    assert difference(small_unet().train()) == ""


def test_what_changes_nothing_that_is_computed():
    model = small_unet(use_checkpoint=True, image_size=[8, 8])
    model.note = "of a user"
    model.middle_block[0].use_checkpoint = False
    model.register_buffer("steps", torch.zeros(()))
    model.requires_grad_(False)
    model.to(memory_format=torch.contiguous_format)
    for changed in (model, copy.deepcopy(model), model.double(), model.bfloat16()):
        assert difference(changed) == ""


@pytest.mark.seconds
@pytest.mark.sample(3)
@pytest.mark.parametrize("name", presets.names("UNet"))
def test_networks_as_they_are_made_are_no_others(name):
    # Of the preset's form, but small.
    options = {**presets.get(name).model, "model_channels": 32, "num_head_channels": -1}
    options |= {"num_heads": 1, "channel_mult": (1, 2), "attention_resolutions": (2,)}
    assert difference(UNet(**options).eval()) == ""
