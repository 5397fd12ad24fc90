"""improved-diffusion's and guided-diffusion's U-Nets run as programs, and answer what they do."""

import pytest
import torch

from fastdiff.models.execution.executor import Executor
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


def program_of(model, dtype=None):
    """The network's answers, computed as a program."""
    reading = reading_of(model)
    assert reading.difference() == reading.disagreement() == ""
    executor = Executor(reading, dtype)

    def run(*args, **kwargs):
        call = reading.call(args, kwargs)
        return call.answer(executor(**call.arguments))

    return run


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
