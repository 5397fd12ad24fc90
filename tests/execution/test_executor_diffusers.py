"""diffusers' UNet2DModel as a program: its own answers, in its own form, or a reason why not."""

import sys
import types

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import fastdiff
from diffusers_format_tools import TINY, theirs
from executor_cases import program_of
from fastdiff.models.readers import reading_of

HO = {"downsample_padding": 0, "norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1}
FILM = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}
RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    **{"downsample_type": "resnet", "upsample_type": "resnet"},
}


def unet(**options):
    return theirs(TINY | options)


def given(model, n=2):
    x, t = torch.randn(n, 3, 8, 12, dtype=model.dtype), torch.linspace(0, 999, n)
    classes = model.config.num_class_embeds
    return (x, t) if classes is None else (x, t, torch.arange(n) % classes)


@pytest.mark.parametrize(
    "options",
    [{}, HO, FILM | {"num_class_embeds": 3}, RESNETS, {"attention_head_dim": None, "dropout": 0.5}],
    ids=["plain", "ho", "film and classes", "resnets", "one head"],
)
@torch.no_grad()
def test_the_answers_are_the_forwards(options):
    model = unet(out_channels=6, **options)
    arguments = given(model)
    expected, found = model(*arguments), program_of(model)(*arguments)
    assert type(found) is type(expected) and found.sample.shape == expected.sample.shape
    most = 1e-4 * float(expected.sample.abs().max())
    torch.testing.assert_close(found.sample, expected.sample, rtol=0, atol=most)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bfloat16_is_near(weights):
    model = unet()
    arguments = given(model)
    expected = model(*arguments).sample
    x, t = given(model.to(weights))
    found = program_of(model, torch.bfloat16)(arguments[0].to(weights), t).sample
    assert found.dtype == x.dtype
    assert 0 < (found - expected).abs().max() < 0.03 * expected.abs().max()


@torch.no_grad()
def test_arguments_as_it_takes_them():
    model = unet()
    run, (x, _) = program_of(model), given(model)
    for t in (7, torch.tensor(7), torch.tensor([7])):
        expected = model(x, t, return_dict=False)
        found = run(sample=x, timestep=t, return_dict=False)
        assert type(found) is tuple and len(found) == 1
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4)
    wrong = torch.randn(2, 3, 7, 8)  # which it cannot double to its size
    for arguments in (
        (wrong, 7),
        (x.double(), 7),
        (x, 7, torch.zeros(2)),
        (x,),
        (x, 7, None, 1, 1),
    ):
        assert run(*arguments) is None
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            model(*arguments)


# --- Refusals -------------------------------------------------------------------------------------


class Derived(diffusers.UNet2DModel):
    pass


class LowRank(nn.Module):
    """An adapter around a layer, as peft puts them."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer


def attention(model):
    return model.mid_block.attentions[0]


CHANGES = {
    "a hook": (
        lambda m: m.mid_block.register_forward_hook(lambda *_: None),
        "mid_block has a hook",
    ),
    "an adapter": (
        lambda m: setattr(attention(m), "to_q", LowRank(attention(m).to_q)),
        "mid_block.attentions.0.to_q.base_layer was added",
    ),
    "another processor": (
        lambda m: attention(m).set_processor(AttnProcessor()),
        "has processor diffusers.AttnProcessor, not diffusers.AttnProcessor2_0",
    ),
    "a projection for all": (
        lambda m: attention(m).fuse_projections(),
        "mid_block.attentions.0.to_qkv was added",
    ),
    "another activation": (
        lambda m: setattr(m.mid_block.resnets[0], "nonlinearity", nn.GELU()),
        "mid_block.resnets.0.nonlinearity is a torch.GELU, not a SiLU",
    ),
    "another scale": (
        lambda m: setattr(m.mid_block.resnets[0], "output_scale_factor", 2.0),
        "mid_block.resnets.0 has output_scale_factor 2.0, not 1",
    ),
    "what only some code asks for": (
        lambda m: setattr(m.up_blocks[1], "s1", 0.9),
        "up_blocks.1 has another s1",
    ),
    "a scale for each head": (
        lambda m: setattr(attention(m), "scale", torch.ones(2)),
        "mid_block.attentions.0 has scale tensor([1., 1.]), not 0.",
    ),
    "another forward": (
        lambda m: setattr(m, "forward", types.MethodType(lambda self, *_: None, m)),
        "the network has another forward",
    ),
    "weight normalization": (
        lambda m: nn.utils.parametrizations.weight_norm(m.conv_out),
        "conv_out.parametrizations was added",
    ),
    "half precision": (lambda m: m.half(), "its weights are float16"),
    "autocast around it": (
        lambda m: fastdiff.accelerate(m, dtype=torch.bfloat16),
        "its program differs by",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_was_changed_is_named(change):
    model, (make, message) = unet(), CHANGES[change]
    reading = reading_of(model)
    assert reading.difference() == reading.disagreement() == ""
    make(model)
    said = reading.difference() or reading.disagreement()
    assert message in said and "\n" not in said and " at 0x" not in said


@pytest.mark.parametrize(
    "options, message",
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'; fastdiff's U-Net needs 'silu' or 'swish'"),
        ({"center_input_sample": True}, "center_input_sample=True; fastdiff's U-Net needs False"),
        ({"mid_block_type": None}, "mid_block_type=None; fastdiff's U-Net needs 'UNetMidBlock2D'"),
    ],
)
def test_configurations_that_are_none_of_ours(options, message):
    assert reading_of(unet(**options)).difference() == message


@torch.no_grad()
def test_zeros_prove_nothing():
    model = unet()
    for parameter in model.conv_out.parameters():
        parameter.zero_()
    reading = reading_of(model)
    assert reading.difference() == ""
    assert reading.disagreement() == "it answers zeros, on which no program can be tried"
    model.conv_out.weight.add_(0.1)
    assert reading.disagreement() == ""


def test_other_classes():
    derived = reading_of(Derived(**TINY))
    assert "Derived; known is only the class that it derives from" in derived.difference()
    assert reading_of(nn.Linear(1, 1)) is None


def test_a_class_whose_forward_was_exchanged_is_tried_again(monkeypatch):
    model = unet()
    reading = reading_of(model)
    assert reading.difference() == reading.disagreement() == ""
    block = sys.modules["diffusers.models.resnet"].ResnetBlock2D
    stock = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x, temb: 2 * stock(self, x, temb))
    assert reading.difference() == ""
    assert reading.disagreement().startswith("tried on small inputs in float32 its program differs")
    assert reading_of(model).difference() == ""
    monkeypatch.undo()
    assert reading.disagreement() == ""


@pytest.mark.parametrize(
    "name, made, message",
    [
        ("scale", lambda: nn.Parameter(torch.ones(())), "a scale, which fastdiff's U-Net has not"),
        ("conv_out", lambda: nn.Conv2d(8, 4, 3), "[(4, 8, 3, 3)] for a out.2.weight of"),
        ("conv_out", lambda: nn.Conv2d(8, 3, 3, bias=False), "[] for a out.2.bias of (3,)"),
    ],
)
def test_a_class_that_has_become_another_one_is_refused(name, made, message, monkeypatch):
    kind = sys.modules["diffusers.models.unets.unet_2d"].UNet2DModel
    stock = kind.__init__

    def init(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        setattr(self, name, made())

    monkeypatch.setattr(kind, "__init__", init)
    said = reading_of(kind(**TINY)).difference()
    assert said.startswith(f"it has {message}")
