"""The U-Net's layouts, compilation, memory, and what it refuses."""

import pytest
import torch

from fastdiff import UNet
from fastdiff.errors import InputError
from fastdiff.models.blocks import AttentionBlock, ResBlock
from fastdiff.models.resampling import Upsample, convolve_doubled, doubling_folds
from unet_tools import SMALL, batch, small_unet


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
        ({"noise_cond": True}, "noise_cond=True needs super_res=True"),
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
        (
            {"super_res": True, "noise_cond": True},
            {"low_res": torch.zeros(2, 3, 4, 4)},
            "noise_level is missing; the network was built with noise_cond=True",
        ),
        (
            {"super_res": True},
            {"low_res": torch.zeros(2, 3, 4, 4), "noise_level": torch.zeros(2)},
            "noise_level was given, but the network was not built with noise_cond",
        ),
        (
            {"super_res": True, "noise_cond": True},
            {"low_res": torch.zeros(2, 3, 4, 4), "noise_level": torch.zeros(1)},
            "noise_level has shape (1,); expected (2,)",
        ),
    ],
)
def test_bad_inputs_get_one_line(options, inputs, message):
    model = small_unet(**options)
    arguments = {"x": torch.zeros(2, 3, 8, 8), "timesteps": torch.zeros(2), **inputs}
    with pytest.raises(InputError) as caught:
        model(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
