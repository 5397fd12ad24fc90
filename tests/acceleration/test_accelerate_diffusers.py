"""accelerate on diffusers' own networks: what is fused, what is left and why, the same outputs."""

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    SlicedAttnProcessor,
)
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import nn

import fastdiff
from accelerate_tools import assert_close, replaced
from fastdiff.models.fused import Fused

pytestmark = pytest.mark.usefixtures("seeded")
IMAGE, TIMES, TEXT = torch.randn(2, 3, 8, 8), torch.tensor([10, 500]), torch.randn(2, 5, 16)
SIZES = {"layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
WITH_TEXT = {
    "in_channels": 3,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}
UP = {"out_channels": 3, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
IMAGES = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def unet_2d(**options):
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(sample_size=8, **SIZES, **config | options)


def unet_with_text(**options):
    return diffusers.UNet2DConditionModel(sample_size=8, **SIZES | WITH_TEXT | UP | options)


def autoencoder(kind=diffusers.AutoencoderKL, **options):
    return kind(**SIZES | IMAGES | options)


SIMPLE = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}
# Network, its inputs, and how many residual blocks and attentions it has, all of which are fused.
NETWORKS = {
    "UNet2DModel": (unet_2d, (IMAGE, TIMES), 8, 4),
    "UNet2DModel, scale_shift": (
        lambda: unet_2d(
            resnet_time_scale_shift="scale_shift",
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        ),
        (IMAGE, TIMES),
        8 + 1,
        4,
    ),
    "UNet2DConditionModel": (unet_with_text, (IMAGE, TIMES, TEXT), 8, 8),
    "UNet2DConditionModel, linear": (
        lambda: unet_with_text(use_linear_projection=True),
        (IMAGE, TIMES, TEXT),
        8,
        8,
    ),
    "AutoencoderKL": (autoencoder, (IMAGE,), 10, 2),
    "AutoencoderKL of three": (
        lambda: autoencoder(
            layers_per_block=2,
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        ),
        (IMAGE,),
        19,
        2,
    ),
    "VQModel": (lambda: autoencoder(diffusers.VQModel, num_vq_embeddings=8), (IMAGE,), 10, 2),
    "ControlNetModel": (
        lambda: diffusers.ControlNetModel(
            conditioning_embedding_out_channels=(8, 16), **SIZES | WITH_TEXT
        ),
        (IMAGE, TIMES, TEXT, torch.randn(2, 3, 16, 16)),
        4,
        4,
    ),
    "UNet3DConditionModel": (
        lambda: diffusers.UNet3DConditionModel(
            **SIZES
            | WITH_TEXT
            | {
                "out_channels": 3,
                "block_out_channels": (32, 32),
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            }
        ),
        (torch.randn(2, 3, 2, 8, 8), TIMES, TEXT),
        8,
        18,
    ),
    "AutoencoderTiny": (
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        (IMAGE,),
        0,
        0,
    ),
}


def randomized(model):
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tensors(output):
    output = output if isinstance(output, tuple) else output.to_tuple()
    return [part for part in output if isinstance(part, torch.Tensor) and part.is_floating_point()]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_residual_block_and_attention_is_fused(name):
    make, inputs, blocks, attentions = NETWORKS[name]
    model = randomized(make())
    kinds = [type(part).__name__ for part in model.modules()]
    assert (kinds.count("ResnetBlock2D"), kinds.count("Attention")) == (blocks, attentions)
    with torch.no_grad():
        expected = tensors(model(*inputs))
        fastdiff.accelerate(model)
        actual = tensors(model(*inputs))
    fused = [type(part).__name__ for part in model.modules() if isinstance(part, Fused)]
    assert (fused.count("ResnetBlock2D"), fused.count("Attention")) == (blocks, attentions)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)
    assert_report_is_complete(model)


def assert_report_is_complete(model):
    """Every norm and every attention is fused, inside of what is fused, or named with a reason."""
    report = fastdiff.report(model)
    named = [part.name for part in (*report.replaced, *report.left, *report.others)]
    assert len(named) == len(set(named))
    assert all(part.how for part in (*report.left, *report.others))
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        holds = any("norm" in type(child).__name__.lower() for child in module.children())
        if kind == "attention" or ("norm" in kind and not holds):
            owners = [other for other in named if f"{name}.".startswith(f"{other}.")]
            assert owners, f"{name} is not in the report"
    assert all(part.kind in str(report) for part in (*report.left, *report.others))


def test_what_is_left_has_the_reason():
    model = randomized(unet_with_text(**SIMPLE))
    inputs = (IMAGE, TIMES, TEXT)
    with torch.no_grad():
        expected = model(*inputs).sample
        fastdiff.accelerate(model)
        assert_close(model(*inputs).sample, expected)
    how = replaced(model)
    assert sum("but for the activation" in reason for reason in how.values()) == 10
    left = {part.kind: part.how for part in fastdiff.report(model).left}
    assert left["Attention"].endswith("its processor's (AttnAddedKVProcessor2_0)")
    assert_report_is_complete(model)
    others = nn.ModuleList(
        [
            Attention(8, heads=2, dim_head=4, qk_norm="rms_norm"),
            Attention(32, heads=2, dim_head=4, spatial_norm_dim=4),
            Attention(8, heads=2, dim_head=4, processor=SlicedAttnProcessor(1)),
            ResnetBlockCondNorm2D(in_channels=32, temb_channels=8, time_embedding_norm="spatial"),
            nn.GroupNorm(2, 4, affine=False),
            nn.LayerNorm(4),
        ]
    )
    fastdiff.accelerate(others)
    report = fastdiff.report(others)
    left = {part.name: part.how for part in (*report.left, *report.others)}
    assert "norm_q" in left["0"] and "spatial_norm" in left["1"] and "SlicedAttn" in left["2"]
    assert left["4"] == "it has no weight and bias"
    assert left["5"] == "fastdiff has no operation for it" and "LayerNorm" in str(report)
    assert_report_is_complete(others)


@pytest.mark.parametrize("options", [{"temb_channels": None}, {"time_embedding_norm": "default"}])
@pytest.mark.parametrize("act", ["swish", "mish", "gelu"])
def test_residual_blocks(options, act):
    config = {"in_channels": 8, "groups": 2, "temb_channels": 6, "non_linearity": act}
    block = ResnetBlock2D(**config | options).eval()
    temb = torch.randn(2, 6) if block.time_emb_proj is not None else None
    if temb is None:
        block.time_embedding_norm = "group"  # as UpDecoderBlock2D has it
    x = torch.randn(2, 8, 4, 4)
    expected = block(x, temb)
    fastdiff.accelerate(block)
    assert isinstance(block, Fused)
    assert_close(block(x, temb), expected)
    assert_close(block(input_tensor=x, temb=temb), expected)
    block.time_embedding_norm = "other"
    actual = block(x, temb)
    assert_close(actual, type(block).fastdiff_original.forward(block, x, temb))


def test_attention_of_every_kind_of_input():
    block = Attention(8, cross_attention_dim=6, heads=2, dim_head=4).eval()
    x, text = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    mask = torch.zeros(2, 3).masked_fill(torch.tensor([False, True, False]), -1e4)
    calls = [(x, text), (x, text, None), (x, text, mask), (x.transpose(1, 2)[..., None], text)]
    expected = [block(*args) for args in calls]
    fastdiff.accelerate(block)
    assert isinstance(block, Fused)
    for args, y in zip(calls, expected, strict=True):
        assert_close(block(*args), y)
    assert_close(block(x, attention_mask=mask, encoder_hidden_states=text), expected[2])
    for processor in (SlicedAttnProcessor(1), AttnProcessor()):
        block.set_processor(processor)
        assert_close(block(*calls[0]), expected[0])
