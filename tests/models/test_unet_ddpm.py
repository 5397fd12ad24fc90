"""The arguments with which the U-Net is Ho et al.'s own: embedding, epsilon, groups, padding."""

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdiff import UNet
from fastdiff.errors import InputError
from fastdiff.models.blocks import timestep_embedding
from fastdiff.models.resampling import Downsample

SMALL = {
    "in_channels": 3,
    "model_channels": 8,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2, 2),
}
HO = {"norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0}


@given(
    dim=st.integers(4, 65),
    flip=st.booleans(),
    shift=st.sampled_from([0, 0.5, 1]),
    t=st.lists(st.floats(0, 4000, width=32), min_size=1, max_size=4).map(torch.tensor),
)
def test_timestep_embedding_is_that_of_diffusers(dim, flip, shift, t):
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    found = timestep_embedding(t, dim, flip_sin_to_cos=flip, freq_shift=shift)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(2, 2), (6, 4), (5, 7)])
def test_downsampling_pads_as_diffusers_does(dims, padding, size):
    torch.manual_seed(0)
    flat = Downsample2D(4, use_conv=True, padding=padding)
    layer = Downsample(4, True, dims, padding)
    weight, bias = flat.conv.weight, flat.conv.bias
    x = torch.randn(2, 4, *size)
    with torch.no_grad():
        layer.op.bias.copy_(bias)
        if dims == 1:
            # An image whose one row meets one row of the kernel: the first, or past the padding
            # the middle one.
            x = x[:, :, :1]
            weight[:, :, [row for row in range(3) if row != padding]] = 0
            layer.op.weight.copy_(weight[:, :, padding])
            expected = flat(torch.cat([x, torch.zeros_like(x)], 2))
            found = layer(x[:, :, 0])[:, :, None]
        elif dims == 2:
            layer.op.weight.copy_(weight)
            expected, found = flat(x), layer(x)
        else:
            layer.op.weight.zero_()[:, :, 1] = weight  # no mixing along the depth
            expected, found = flat(x), layer(x[:, :, None].expand(-1, -1, 3, -1, -1))
            assert torch.equal(found[:, :, 0], found[:, :, 2])
            assert found.shape[2] == 3
            found = found[:, :, 1]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5


def test_every_norm_has_the_groups_and_the_epsilon():
    model = UNet(**SMALL, norm_num_groups=4, norm_eps=1e-3, num_heads=2)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) > 20 and all((n.num_groups, n.eps) == (4, 1e-3) for n in norms)


@pytest.mark.seconds
@settings(max_examples=20, deadline=None)
@given(dims=st.integers(1, 3), size=st.lists(st.integers(4, 9), min_size=3, max_size=3))
def test_any_size_with_padding_after_the_image(dims, size):
    size = size[:dims] if dims < 3 else [1, *size[1:]]  # the depth may be anything
    model = UNet(**SMALL, **HO, dims=dims).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert model(x, torch.tensor([0, 9])).shape == x.shape


@pytest.mark.parametrize("size", [(3, 8), (8, 3), (1, 1)])
def test_an_image_too_small_for_padding_after_it(size):
    with pytest.raises(InputError) as caught:
        UNet(**SMALL, **HO)(torch.zeros(2, 3, *size), torch.zeros(2))
    message = str(caught.value)
    assert "with downsample_padding=0 and 3 levels it must be at least 4 wide" in message
    for options in ({}, {**HO, "conv_resample": False}, {**HO, "resblock_updown": True}):
        UNet(**SMALL, **options)(torch.zeros(2, 3, *size), torch.zeros(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 0}, "norm_num_groups=0; expected an integer of at least 1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0; expected more than 0"),
        ({"norm_eps": float("nan")}, "norm_eps=nan; expected more than 0"),
        ({"freq_shift": 4}, "freq_shift=4; expected less than half of model_channels=8"),
        ({"downsample_padding": 2}, "downsample_padding=2; expected 0 or 1"),
    ],
)
def test_bad_arguments_get_one_line(changes, message):
    with pytest.raises(InputError) as caught:
        UNet(**SMALL, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
