"""improved-diffusion's and guided-diffusion's U-Nets run as programs, and answer what they do."""

import pytest
import torch
from torch import nn

from executor_cases import program_of
from fastdiff.models.readers import reading_of
from published_unet import Guided, GuidedUpsampler, Improved, ImprovedUpsampler, small

NETWORKS = {
    "improved": (Improved, {}),
    "film and classes": (Improved, {"use_scale_shift_norm": True, "num_classes": 3}),
    "pooled": (Improved, {"conv_resample": False, "num_heads_upsample": 4, "out_channels": 6}),
    "1-D": (Improved, {"dims": 1, "attention_resolutions": {1, 2, 8}}),
    "3-D": (Improved, {"dims": 3}),
    "guided": (Guided, {"num_head_channels": 16, "dropout": 0.5}),
    "new order": (Guided, {"use_new_attention_order": True, "num_heads": 4}),
    "up and down in blocks": (Guided, {"resblock_updown": True, "use_scale_shift_norm": True}),
    "upsampler": (ImprovedUpsampler, {}),
    "guided upsampler": (GuidedUpsampler, {"resblock_updown": True, "num_classes": 2}),
}


def given(model, n=2):
    """Arguments of a forward."""
    dims = model.input_blocks[0][0].weight.dim() - 2
    x, kwargs = torch.randn(n, 3, *(4, 6, 8)[3 - dims :]), {}
    if model.num_classes is not None:
        kwargs["y"] = torch.arange(n) % model.num_classes
    if model.in_channels == 6:
        kwargs["low_res"] = torch.randn(n, 3, 3, 4)
    return x, torch.linspace(0, 999, n), kwargs


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_answers_are_the_forwards(name):
    kind, options = NETWORKS[name]
    model = small(kind, **options)
    x, t, kwargs = given(model)
    expected = model(x, t, **kwargs)
    found = program_of(model)(x, t, **kwargs)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_bfloat16_is_near():
    model = small(Guided, use_scale_shift_norm=True)
    x, t, kwargs = given(model)
    expected = model(x, t, **kwargs)
    found = program_of(model, torch.bfloat16)(x, t, **kwargs)
    assert 0 < (found - expected).abs().max() < 0.03 * expected.abs().max()


CHANGES = {
    "a hook": (lambda m: m.out.register_forward_hook(lambda *_: None), "out has a hook"),
    "other heads": (
        lambda m: setattr(m.middle_block[1].attention, "n_heads", 4),
        "middle_block.1.attention has n_heads 4, not 2",
    ),
    "another norm": (
        lambda m: m.out.__setitem__(0, nn.GroupNorm(32, 32)),
        "out.0 is a torch.GroupNorm, not a GroupNorm32",
    ),
    "another way of a block": (
        lambda m: setattr(m.middle_block[0], "use_scale_shift_norm", True),
        "input_blocks.1.0 has use_scale_shift_norm False, not True",
    ),
    "no middle": (
        lambda m: delattr(m, "middle_block"),
        "its parts are not those of a UNetModel",
    ),
    "no levels": (lambda m: setattr(m, "channel_mult", None), "its parts are not those of a UNet"),
    "an impossible width": (
        lambda m: setattr(m, "model_channels", 7),
        "its class does not make it of its arguments",
    ),
    "an impossible rate": (
        lambda m: setattr(m, "dropout", 2),
        "its class does not make it of its arguments (dropout probability has to be between",
    ),
    "no convolution first": (
        lambda m: m.input_blocks[0].__setitem__(0, nn.Identity()),
        "its parts are not those of a UNetModel",
    ),
    "half precision": (lambda m: m.half(), "its weights are float16"),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_was_changed_is_named(change):
    model, (make, message) = small(Guided), CHANGES[change]
    reading = reading_of(model)
    assert reading.difference() == ""
    make(model)
    said = reading.difference()
    assert message in said and "\n" not in said


@torch.no_grad()
def test_arguments_that_are_its_own_to_refuse():
    model = small(Improved, num_classes=3)
    reading, (x, t, kwargs) = reading_of(model), given(model)
    assert reading.difference() == ""
    for args, others in (
        ((x, t), {}),
        ((x, t), {"y": torch.zeros(3).long()}),
        ((x[..., :5], t), kwargs),
        ((x, t), {"y": kwargs["y"], "scale": 2}),
        ((x,), kwargs),
        ((x, None), kwargs),
        ((None, t), kwargs),
    ):
        assert reading.call(args, others) is None
        with pytest.raises((AssertionError, RuntimeError, TypeError, AttributeError)):
            model(*args, **others)
    assert reading.call((x, t), kwargs).arguments.keys() == {"x", "timesteps", "y"}


def test_what_fastdiffs_network_cannot_be_is_said_at_every_call():
    reading = reading_of(small(Improved, num_heads=5))
    for _ in range(2):
        assert reading.difference().startswith("attention over 64 channels cannot have 5 heads")
