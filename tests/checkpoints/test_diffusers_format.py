"""U-Nets in diffusers' format, against diffusers itself: outputs, weights, configs, bad input."""

import inspect
import json

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastdiff
from diffusers_format_tools import (
    assert_same_output,
    assert_same_weights,
    from_pretrained,
    randomized,
    theirs,
)
from extent import examples
from fastdiff import UNet
from fastdiff.checkpoints.diffusers_unet import diffusers_state, load_unet, save_unet
from fastdiff.models import presets
from fastdiff.models.readers.diffusers.config import FIELDS, diffusers_config, unet_arguments

# The config.json files of released networks, as far as the network depends on them.
DDPM = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
LSUN = {
    **DDPM,
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
RELEASED = {
    "google/ddpm-cifar10-32": {
        **DDPM,
        "sample_size": 32,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "google/ddpm-celebahq-256, ddpm-church-256": LSUN,
    "CompVis/ldm-celebahq-256": {
        "sample_size": 64,
        "attention_head_dim": 32,
        "block_out_channels": [224, 448, 672, 896],
        "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
        "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    },
}


@st.composite
def configs(draw) -> dict:
    """Configs of ``UNet2DModel`` that fastdiff can follow."""
    groups = draw(st.sampled_from([2, 4]))
    widths = draw(st.lists(st.integers(1, 5).map(lambda n: 4 * n), min_size=1, max_size=3))
    attention = draw(st.lists(st.booleans(), min_size=len(widths), max_size=len(widths)))
    resampling = draw(st.sampled_from(["conv", "resnet"]))
    down, up = "DownBlock2D", "UpBlock2D"
    if resampling == "resnet":
        down, up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    film = draw(st.booleans())
    return {
        "sample_size": draw(st.sampled_from([None, 8, [8, 16]])),
        "in_channels": draw(st.integers(1, 3)),
        "out_channels": draw(st.integers(1, 3)),
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if has else down for has in attention],
        "up_block_types": ["AttnUpBlock2D" if has else up for has in reversed(attention)],
        "downsample_type": resampling,
        "upsample_type": resampling,
        "layers_per_block": draw(st.integers(1, 2)),
        "attention_head_dim": draw(st.sampled_from([None, 1, 2, 4])),
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if film else draw(st.sampled_from([None, groups])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-2])),
        "resnet_time_scale_shift": "scale_shift" if film else "default",
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "downsample_padding": draw(st.sampled_from([0, 1])),
        "num_class_embeds": draw(st.sampled_from([None, 3])),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "act_fn": draw(st.sampled_from(["silu", "swish"])),
    }


def plain(config) -> dict:
    """The fields alone, as JSON has them."""
    fields = {name: config[name] for name in config if not name.startswith("_")}
    return json.loads(json.dumps(fields))


def test_fields_and_defaults_are_those_of_the_real_constructor():
    parameters = inspect.signature(UNet2DModel.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    assert FIELDS == json.loads(json.dumps(defaults))


# Both ways


@pytest.mark.seconds
@settings(
    max_examples=examples(12, of=40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_from_diffusers_and_back(tmp_path, config, seed):
    model = theirs(config, seed)
    model.save_pretrained(tmp_path / "a")
    loaded = fastdiff.load(tmp_path / "a")
    assert not loaded.model.training and loaded.weights == "model"
    assert_same_output(loaded.model, model)

    back = from_pretrained(save_unet(tmp_path / "b", loaded.model))
    assert_same_weights(back, model)
    expected = {**plain(model.config), "act_fn": "silu", "attn_norm_num_groups": None}
    if config["resnet_time_scale_shift"] == "scale_shift":
        expected["attn_norm_num_groups"] = config["norm_num_groups"]
    found = plain(back.config)
    if len(config["block_out_channels"]) == 1:  # nothing to resample
        for field in ("downsample_type", "upsample_type", "down_block_types", "up_block_types"):
            assert found.pop(field) and expected.pop(field)
    if found["attention_head_dim"] is None:  # or as wide as each attention block
        assert expected.pop("attention_head_dim") in (None, *config["block_out_channels"])
        del found["attention_head_dim"]
    assert found == expected
    assert_same_weights(load_unet(tmp_path / "b"), loaded.model)


@st.composite
def arguments(draw) -> dict:
    """Arguments of ``UNet`` that diffusers can follow."""
    mults = [1, *draw(st.lists(st.sampled_from([1, 1.5, 2, 3]), max_size=2))]
    heads = [{}, {"num_head_channels": 2}, {"num_head_channels": 4}]
    if set(mults) == {1}:
        heads += [{"num_heads": 2}, {"num_heads": 4, "num_heads_upsample": 4}]
    factors = [2**level for level in range(len(mults))]
    return {
        "in_channels": draw(st.integers(1, 3)),
        "model_channels": 8,
        "out_channels": draw(st.integers(1, 3)),
        "num_res_blocks": draw(st.integers(1, 2)),
        "attention_resolutions": draw(st.sets(st.sampled_from(factors))),
        "channel_mult": mults,
        "num_classes": draw(st.sampled_from([None, 3])),
        **draw(st.sampled_from(heads)),
        "use_scale_shift_norm": draw(st.booleans()),
        "resblock_updown": draw(st.booleans()),
        "use_new_attention_order": draw(st.booleans()),
        "norm_num_groups": draw(st.sampled_from([1, 2, 4])),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "downsample_padding": draw(st.sampled_from([0, 1])),
    }


@pytest.mark.seconds
@settings(
    max_examples=examples(12, of=40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(arguments=arguments(), seed=st.integers(0, 2**31))
def test_to_diffusers_and_back(tmp_path, arguments, seed):
    model = randomized(UNet(**arguments), seed)
    path = save_unet(tmp_path / "a", model)
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert_same_output(model, from_pretrained(path))

    back = fastdiff.load(path).model
    assert_same_output(back, model)
    if model.config["use_new_attention_order"]:
        assert_same_weights(back, model)


@pytest.mark.parametrize("name", RELEASED)
def test_released_networks_have_our_names_and_shapes(name):
    config = RELEASED[name]
    with torch.device("meta"):
        model = UNet(**unet_arguments(config))
        expected = UNet2DModel(**config).state_dict()
    found = diffusers_state(model, model.state_dict())
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert plain(diffusers_config(model)) == {**FIELDS, **config}


@pytest.mark.parametrize("name", ["ddpm-cifar10", "ddpm-256", "iddpm-lsun256", "adm-64"])
def test_presets_that_diffusers_can_follow(name):
    with torch.device("meta"):
        model = UNet(**presets.get(name).model)
        expected = UNet2DModel(**diffusers_config(model)).state_dict()
    found = diffusers_state(model, model.state_dict())
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
