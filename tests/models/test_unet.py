"""The U-Net: recorded answers of the published code, every option, every size, bad input."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdiff import UNet
from fastdiff.errors import InputError
from fastdiff.models.blocks import (
    AttentionBlock,
    ResBlock,
    Upsample,
    convolve_doubled,
    doubling_folds,
    timestep_embedding,
)
from paths import RECORDED

CASES = ["improved_film_learned", "improved_plain_classcond", "guided_updown_neworder"]
SMALL = {
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
}


def small_unet(**changes) -> UNet:
    """A network whose layers that start at zero do not, so that every path shows in the output."""
    torch.manual_seed(0)
    model = UNet(**{**SMALL, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def batch(model: UNet, *size: int, n: int = 2):
    x = torch.randn(n, model.in_channels, *size)
    y = None if model.num_classes is None else torch.arange(n) % model.num_classes
    return x, torch.linspace(0, 999, n), y


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


@pytest.mark.parametrize("resblock_updown", [False, True])
def test_activation_checkpointing_changes_no_gradient(resblock_updown):
    x = torch.randn(2, 3, 9, 9)
    gradients = []
    for use_checkpoint in (False, True):
        model = small_unet(
            use_checkpoint=use_checkpoint, resblock_updown=resblock_updown, dropout=0.5
        ).train()
        torch.manual_seed(1)  # recomputation must draw the same dropout
        model(x, torch.tensor([3.0, 700.0])).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_activation_checkpointing_saves_memory():
    def saved_bytes(use_checkpoint):
        model = small_unet(use_checkpoint=use_checkpoint).train()
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(2, 3, 32, 32), torch.zeros(2))
        return total

    assert saved_bytes(True) < 0.5 * saved_bytes(False)


def test_dropout_only_in_training():
    model = small_unet(dropout=0.5)
    x, t, _ = batch(model, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t))
        model.train()
        assert not torch.equal(model(x, t), model(x, t))


@pytest.mark.parametrize("in_channels", [1, 3])
def test_computes_in_channels_last_whatever_comes(in_channels):
    model = small_unet(in_channels=in_channels, out_channels=in_channels)
    layouts = []

    def note(module, args, out):
        layouts.append(out.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, ResBlock | AttentionBlock):
            module.register_forward_hook(note)
    x, t, _ = batch(model, 8, 8)
    with torch.no_grad():
        out = model(x, t)
        assert layouts and all(layouts)
        assert torch.equal(model(x.contiguous(memory_format=torch.channels_last), t), out)


def test_follows_the_layout_of_its_weights():
    model = small_unet().to(memory_format=torch.contiguous_format)
    layouts = []
    model.middle_block.register_forward_hook(lambda m, a, out: layouts.append(out.is_contiguous()))
    model(*batch(model, 8, 8))
    assert layouts == [True]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_doubling_and_convolution_in_one_are_the_two_in_turn(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(7, 3, 3, 3, dtype=torch.float64).contiguous(memory_format=layout)
    leaves = [x.requires_grad_(), weight.requires_grad_(), torch.randn(7).double().requires_grad_()]
    upstream = torch.randn(2, 7, 10, 8, dtype=torch.float64)

    one = convolve_doubled(*leaves)
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    two = torch.nn.functional.conv2d(doubled, weight, leaves[2], padding=1)
    assert (one - two).abs().max() < 1e-12
    gradients = [torch.autograd.grad(y, leaves, upstream) for y in (one, two)]
    for own, true in zip(*gradients, strict=True):
        assert (own - true).abs().max() < 1e-12


def test_doubling_folds_only_where_it_is_exact_and_pays():
    x = torch.zeros(2, 4, 16, 16)
    assert doubling_folds(x, (32, 32))
    assert not doubling_folds(x, (31, 32))
    assert not doubling_folds(x[:1], (32, 32))
    assert not doubling_folds(x.bfloat16(), (32, 32))
    assert not doubling_folds(torch.zeros(8, 4, 64), (128,))
    assert not doubling_folds(x.to("meta"), (32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert not doubling_folds(x, (32, 32))


def test_upsampling_is_the_same_folded_or_not():
    torch.manual_seed(0)
    layer = Upsample(4, True, 2)
    x = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        alone = torch.cat([layer(x[:1], (32, 32)), layer(x[1:], (32, 32))])
        assert (layer(x, (32, 32)) - alone).abs().max() < 1e-5


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


@pytest.mark.seconds
def test_compiles_without_a_graph_break():
    model = small_unet(num_classes=3, use_scale_shift_norm=True, resblock_updown=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x, t, y = batch(model, 8, 8)
    assert torch.equal(compiled(x, t, y), model(x, t, y))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": 4}, "dims=4; expected 1, 2 or 3"),
        ({"in_channels": 0}, "in_channels=0; expected an integer of at least 1"),
        ({"num_res_blocks": 1.5}, "num_res_blocks=1.5; expected an integer"),
        ({"channel_mult": ()}, "expected at least one level"),
        ({"channel_mult": (1, 0.01)}, "each of at least 1 channel"),
        ({"attention_resolutions": (16,)}, "2 levels have [1, 2], not [16]"),
        ({"dropout": 1.0}, "dropout=1.0; expected 0 ≤ dropout < 1"),
        ({"num_heads": 5}, "64 channels cannot have 5 heads"),
        ({"num_head_channels": 48}, "num_head_channels=48 does not divide the 64 channels"),
        ({"num_head_channels": 0}, "num_head_channels=0; expected −1 or at least 1"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"null_class": True}, "null_class=True needs num_classes"),
    ],
)
def test_bad_arguments_get_one_line(changes, message):
    with pytest.raises(InputError) as caught:
        UNet(**{**SMALL, **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        ({}, {"x": torch.zeros(2, 1, 8, 8)}, "shape (2, 1, 8, 8); expected (N, 3, H, W)"),
        ({}, {"x": torch.zeros(2, 3, 8)}, "expected (N, 3, H, W)"),
        ({"dims": 1}, {"x": torch.zeros(2, 3, 8, 8)}, "expected (N, 3, W)"),
        ({"dims": 3}, {"x": torch.zeros(2, 3, 8, 8)}, "expected (N, 3, D, H, W)"),
        (
            {},
            {"x": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)},
            "x is uint8; expected floating-point samples, such as images scaled to [-1, 1]",
        ),
        ({}, {"timesteps": torch.zeros(3)}, "timesteps have shape (3,); expected (2,)"),
        ({}, {"timesteps": torch.tensor(1.0)}, "timesteps have shape ()"),
        ({}, {"y": torch.zeros(2, dtype=torch.int64)}, "y was given, but the network has no"),
        ({"num_classes": 4}, {}, "y is missing; the network has 4 classes"),
        ({"num_classes": 4}, {"y": torch.tensor([0, 4])}, "y holds label 4; expected 0 to 3"),
        ({"num_classes": 4}, {"y": torch.tensor([-1, 0])}, "y holds label -1"),
        (
            {"num_classes": 4, "null_class": True},
            {"y": torch.tensor([0, 5])},
            "y holds label 5; expected 0 to 4",
        ),
        ({"num_classes": 4}, {"y": torch.zeros(2)}, "float32; expected (2,) integer labels"),
        ({"num_classes": 4}, {"y": torch.tensor([1])}, "y has shape (1,)"),
        ({"super_res": True}, {}, "low_res is missing"),
        ({}, {"low_res": torch.zeros(2, 3, 4, 4)}, "low_res was given"),
        (
            {"super_res": True},
            {"low_res": torch.zeros(2, 1, 4, 4)},
            "low_res has shape (2, 1, 4, 4); expected 4 dimensions that start with (2, 3)",
        ),
    ],
)
def test_bad_inputs_get_one_line(options, inputs, message):
    model = small_unet(**options)
    arguments = {"x": torch.zeros(2, 3, 8, 8), "timesteps": torch.zeros(2), **inputs}
    with pytest.raises(InputError) as caught:
        model(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
