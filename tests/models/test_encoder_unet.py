"""The classifier of noisy images: the published network's arithmetic and names; its refusals."""

import pytest
import torch
from torch import nn

import published_classifier as published
from fastdiff import EncoderUNet, UNet, load, save
from fastdiff.checkpoints.published import load_published
from fastdiff.errors import InputError
from fastdiff.models.encoder_unet import POOLS

SMALL = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 5,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}


def small(**changes) -> EncoderUNet:
    """A classifier with weights everywhere, also where training starts from zero."""
    torch.manual_seed(0)
    model = EncoderUNet(**{**SMALL, **changes}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("plain", [False, True])
def test_the_published_network_and_its_names(pool, plain):
    changes = {"use_scale_shift_norm": False, "resblock_updown": False} if plain else {}
    model = small(pool=pool, **changes).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 400.0, 999.0])
    weights = published.Weights(model.state_dict())
    expected = published.logits(weights, x, t, model.config)
    out = model(x, t)
    assert out.shape == (3, 5) and expected.std() > 0.01
    assert (out - expected).abs().max() < 1e-10 * expected.abs().max()
    # One more or less would not load with strict=True.
    assert weights.read == set(model.state_dict())
    mine, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    assert (mine - theirs).abs().max() < 1e-9 * theirs.abs().max() > 0


def test_a_preset_is_of_one_kind_of_network():
    with pytest.raises(InputError, match="classifier-64 is of a network EncoderUNet, not of UNet"):
        UNet.from_preset("classifier-64")
    with pytest.raises(InputError, match="digits is of a network UNet.*there are classifier-64"):
        EncoderUNet.from_preset("digits")


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("pool", ["adaptive", "spatial"])
def test_other_dimensions(dims, pool):
    model = small(dims=dims, pool=pool)
    out = model(torch.randn(2, 3, *(4, 8, 8)[-dims:]), torch.zeros(2))
    assert out.shape == (2, 5) and out.isfinite().all()


def test_images_that_are_not_square():
    model = small(image_size=(8, 12), pool="attention")
    assert model(torch.randn(2, 3, 8, 12), torch.zeros(2)).shape == (2, 5)


def test_bfloat16_stays_near():
    model = small(pool="attention")
    x, t = torch.randn(4, 3, 8, 8), torch.full((4,), 300.0)
    with torch.no_grad():
        exact = model(x, t)
        with torch.autocast("cpu", torch.bfloat16):
            near = model(x, t)
    assert near.dtype == torch.float32 and not torch.equal(near, exact)
    assert (near - exact).abs().max() < 0.05 * exact.abs().max()


def test_saved_and_loaded_by_what_it_says_of_itself(tmp_path):
    model = small(pool="spatial_v2")
    found = load(save(tmp_path / "classifier", model)).model
    assert type(found) is EncoderUNet and found.config == model.config
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    assert torch.equal(found(x, t), model(x, t))


def test_published_weights_load_by_a_preset():
    torch.manual_seed(0)
    model = EncoderUNet.from_preset("classifier-digits").eval()
    found = load_published(model.state_dict(), preset="classifier-digits")
    x, t = torch.randn(2, 1, 8, 8), torch.zeros(2)
    assert torch.equal(found(x, t), model(x, t))
    with pytest.raises(InputError, match="source holds the weights of another network"):
        load_published(model.state_dict(), preset="classifier-digits", out_channels=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "max"}, "pool='max'; expected one of adaptive, attention, spatial, spatial_v2"),
        ({"image_size": (8, 8, 8)}, "image_size=.8, 8, 8.; expected the images' height and width"),
        ({"image_size": 0}, "image_size=0; expected"),
        ({"pool": "attention", "dims": 1}, "attention pooling is for images, dims=2"),
        ({"num_head_channels": 24}, "num_head_channels=24 does not divide the 64 channels"),
        ({"out_channels": 0}, "EncoderUNet: out_channels=0; expected an integer of at least 1"),
        ({"attention_resolutions": (8,)}, "EncoderUNet: attention_resolutions="),
    ],
)
def test_refuses_arguments_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        EncoderUNet(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), r"x has shape .*; expected \(N, 3, H, W\)"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(3), r"timesteps have shape \(3,\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2), "x is uint8; expected float"),
        (torch.zeros(2, 3, 16, 16), torch.zeros(2), r"attention pooling is for images of 8x8"),
    ],
)
def test_refuses_inputs_that_do_not_fit(x, t, message):
    with pytest.raises(InputError, match=f"EncoderUNet: .*{message}"):
        small(pool="attention")(x, t)
