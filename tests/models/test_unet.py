"""The U-Net: recorded answers of the published code, every option, every size, bad input."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdiff import UNet
from fastdiff.models.blocks import (
    timestep_embedding,
)
from paths import RECORDED
from unet_tools import SMALL, batch, small_unet

CASES = ["improved_film_learned", "improved_plain_classcond", "guided_updown_neworder"]


def recorded(case: str):
    arrays = np.load(RECORDED / f"unet_{case}.npz")
    model = UNet(**json.loads(str(arrays["config"]))).eval()
    state = {
        name.removeprefix("sd/"): torch.from_numpy(arrays[name].astype(np.float32))
        for name in arrays.files
        if name.startswith("sd/")
    }
    model.load_state_dict(state, strict=True)
    x, t = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["t"])
    y = torch.from_numpy(arrays["y"]) if "y" in arrays.files else None
    return model, (x, t, y), torch.from_numpy(arrays["out"])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_recorded_answers_of_the_published_code(case, channels_last):
    model, inputs, out = recorded(case)
    if not channels_last:
        model.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        assert (model(*inputs) - out).abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_autocast_stays_near_the_recorded_answer(case):
    model, inputs, out = recorded(case)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = model(*inputs)
    assert result.dtype == torch.float32
    assert (result - out).abs().max() < 0.05 * out.abs().max()
    assert (result - out).abs().mean() < 0.01 * out.abs().max()


def test_whole_network_in_bfloat16():
    model, inputs, out = recorded("improved_film_learned")
    with torch.no_grad():
        result = model.bfloat16()(*inputs)
    assert result.dtype == torch.float32
    assert (result - out).abs().max() < 0.05 * out.abs().max()


def test_published_state_dict_keys():
    keys = set(small_unet(num_classes=4, use_scale_shift_norm=True).state_dict())
    for key in (
        "time_embed.0.weight",
        "time_embed.2.bias",
        "label_emb.weight",
        "input_blocks.0.0.weight",
        "input_blocks.1.0.in_layers.0.weight",
        "input_blocks.1.0.in_layers.2.weight",
        "input_blocks.1.0.emb_layers.1.weight",
        "input_blocks.1.0.out_layers.0.weight",
        "input_blocks.1.0.out_layers.3.weight",
        "input_blocks.2.0.op.weight",
        "input_blocks.3.0.skip_connection.weight",
        "input_blocks.3.1.norm.weight",
        "input_blocks.3.1.qkv.weight",
        "input_blocks.3.1.proj_out.weight",
        "middle_block.0.in_layers.0.weight",
        "middle_block.1.qkv.bias",
        "middle_block.2.out_layers.3.bias",
        "output_blocks.1.2.conv.weight",
        "out.0.weight",
        "out.2.weight",
    ):
        assert key in keys
    assert small_unet().state_dict()["middle_block.1.qkv.weight"].shape == (192, 64, 1)


def test_starts_as_a_network_that_predicts_zero():
    torch.manual_seed(0)
    model = UNet(**SMALL)
    assert not model(torch.randn(1, 3, 8, 8), torch.tensor([5.0])).any()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_scale_shift_norm": True},
        {"resblock_updown": True},
        {"conv_resample": False},
        {"num_classes": 3},
        {"num_heads": 4, "num_heads_upsample": 2},
        {"num_head_channels": 16, "use_new_attention_order": True},
        {"channel_mult": (0.5, 1.5, 2), "attention_resolutions": (1, 4), "num_res_blocks": 2},
    ],
)
def test_options_in_one_two_and_three_dimensions(dims, options):
    model = small_unet(dims=dims, **options)
    x, t, y = batch(model, *(4, 8, 8)[-dims:])
    out = model(x, t, y)
    assert out.shape == x.shape and out.isfinite().all() and out.any()
    out.square().mean().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused


@pytest.mark.seconds
@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    channels=st.integers(1, 5),
    model_channels=st.integers(1, 40),
    levels=st.integers(1, 4),
    resblock_updown=st.booleans(),
    conv_resample=st.booleans(),
)
def test_any_image_size_and_channel_count(
    height, width, channels, model_channels, levels, resblock_updown, conv_resample
):
    model = small_unet(
        in_channels=channels,
        out_channels=2 * channels,
        model_channels=model_channels,
        channel_mult=(1,) * levels,
        attention_resolutions=(),
        resblock_updown=resblock_updown,
        conv_resample=conv_resample,
    )
    x, t, _ = batch(model, height, width)
    with torch.no_grad():
        out = model(x, t)
    assert out.shape == (2, 2 * channels, height, width) and out.isfinite().all()


@pytest.mark.seconds
@settings(deadline=None, max_examples=25)
@given(
    size=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    n=st.integers(1, 2),
    resblock_updown=st.booleans(),
    conv_resample=st.booleans(),
)
@example(size=[1, 1], n=1, resblock_updown=False, conv_resample=True)
@example(size=[1, 1, 3], n=1, resblock_updown=True, conv_resample=False)
def test_any_size_in_one_two_and_three_dimensions(size, n, resblock_updown, conv_resample):
    # The examples: norms with groups of one element in one sample; images below the pool's window.
    model = small_unet(
        dims=len(size),
        channel_mult=(1, 1, 1),
        resblock_updown=resblock_updown,
        conv_resample=conv_resample,
    )
    x, t, _ = batch(model, *size, n=n)
    with torch.no_grad():
        out = model(x, t)
    assert out.shape == x.shape and out.isfinite().all() and out.any()


def test_empty_batch():
    assert small_unet()(torch.zeros(0, 3, 8, 8), torch.zeros(0)).shape == (0, 3, 8, 8)


def test_three_dimensions_keep_their_depth():
    """Published 3-D networks halve height and width only."""
    model = small_unet(dims=3)
    seen = []
    model.middle_block.register_forward_hook(lambda module, args, out: seen.append(out.shape[2:]))
    model(torch.randn(1, 3, 3, 6, 6), torch.zeros(1))
    assert seen == [(3, 3, 3)]


def test_samples_do_not_see_each_other():
    model = small_unet(num_classes=3, num_heads=2)
    x, t, y = batch(model, 8, 8, n=3)
    with torch.no_grad():
        together = model(x, t, y)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert (together - alone).abs().max() < 1e-5


def test_timesteps_and_labels_matter():
    model = small_unet(num_classes=3)
    x, t, y = batch(model, 8, 8)
    with torch.no_grad():
        out = model(x, t, y)
        assert (model(x, t + 0.5, y) - out).abs().max() > 1e-4
        assert (model(x, t, 2 - y) - out).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    model = small_unet(num_classes=3)
    x, t, y = batch(model, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x, t, y.to(dtype)), model(x, t, y))


def test_null_class_is_one_more_label():
    model = small_unet(num_classes=3, null_class=True)
    x, t, _ = batch(model, 8, 8)
    assert model.null_label == 3 and model.label_emb.num_embeddings == 4
    assert model(x, t, torch.full((2,), model.null_label)).shape == x.shape
    assert small_unet(num_classes=3).null_label is None


def test_the_noise_level_is_embedded_beside_the_timestep():
    model = small_unet(super_res=True, noise_cond=True, use_scale_shift_norm=True)
    x, low_res = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    t, level = torch.tensor([3.0, 500.0]), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        told = model(x, t, low_res=low_res, noise_level=level)
        other = model(x, t, low_res=low_res, noise_level=level + 0.1)
        assert ((told - other).abs().amax((1, 2, 3)) > 1e-4).all()
        model.noise_embed.load_state_dict(model.time_embed.state_dict())
        level_as_time = model(x, 1000 * level, low_res=low_res, noise_level=t / 1000)
        torch.testing.assert_close(
            model(x, t, low_res=low_res, noise_level=level), level_as_time, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_super_resolution_sees_the_small_image_resized(dims):
    model = small_unet(dims=dims, super_res=True)
    size = (4, 6, 8)[-dims:]
    x, t, _ = batch(model, *size)
    low_res = torch.randn(2, 3, *(s // 2 for s in size))
    with torch.no_grad():
        out = model(x, t, low_res=low_res)
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
        resized = torch.nn.functional.interpolate(low_res, size, mode=mode)
        plain = small_unet(dims=dims, in_channels=6)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(out, plain(torch.cat([x, resized], 1), t))
    assert out.shape == x.shape and model.in_channels == 3


def test_dropout_only_in_training():
    model = small_unet(dropout=0.5)
    x, t, _ = batch(model, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t))
        model.train()
        assert not torch.equal(model(x, t), model(x, t))


def test_odd_embedding_width_and_fractional_timesteps():
    t = torch.tensor([0.0, 17.25])
    even, odd = timestep_embedding(t, 6), timestep_embedding(t, 7)
    frequencies = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    angles = t.double()[:, None] * frequencies
    assert (even - torch.cat([angles.cos(), angles.sin()], 1)).abs().max() < 1e-6
    assert torch.equal(odd[:, :6], even) and not odd[:, 6].any()
    assert timestep_embedding(torch.tensor([3]), 8).dtype == torch.float32


def test_timestep_embedding_stays_on_its_device():
    """Nothing is made on the CPU and moved: on the meta device that would raise."""
    with torch.device("meta"):
        model = UNet(**SMALL)
        out = model(torch.empty(2, 3, 8, 8), torch.empty(2))
    assert out.device.type == "meta" and out.shape == (2, 3, 8, 8)


def test_config_describes_the_network():
    model = small_unet(
        num_classes=3, image_size=(8, 6), channel_mult=(1, 2), null_class=True, num_heads=2
    )
    config = json.loads(json.dumps(model.config))
    twin = UNet(**config)
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict(), strict=True)
    x, t, y = batch(model, 8, 6)
    assert torch.equal(twin.eval()(x, t, y), model(x, t, y))
    assert (model.in_channels, model.out_channels, model.num_classes, model.dims) == (3, 3, 3, 2)
