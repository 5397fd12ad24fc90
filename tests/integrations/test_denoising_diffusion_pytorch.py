"""fastdiff under the real denoising-diffusion-pytorch: the same images for the same seeds."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastdiff
from ddpm_pytorch_package import package
from fastdiff.errors import InputError
from fastdiff.integrations import denoising_diffusion_pytorch as integration
from fastdiff.integrations.denoising_diffusion_pytorch import accelerate, restore
from fastdiff.models.fused import Fused


@pytest.fixture(scope="module")
def ddpm():
    return package()


def made(ddpm, *, network=None, **options):
    torch.manual_seed(0)
    options = {"image_size": 8, "timesteps": 100, "sampling_timesteps": 50} | options
    self_condition = options.pop("self_condition", False)
    unet = ddpm.Unet(dim=16, dim_mults=(1, 2), self_condition=self_condition, **(network or {}))
    return ddpm.GaussianDiffusion(unet.eval(), **options)


def sampled(diffusion, method="sample", *args, **options):
    """(images, the generator's state after them)"""
    torch.manual_seed(7)
    images = getattr(diffusion, method)(*args, **options)
    return images, torch.rand(3)


ETA, DDPM = {"ddim_sampling_eta": 0.5}, {"timesteps": 50}


@pytest.mark.seconds
@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "objective, self_condition, steps",
    [
        *(("pred_noise", False, steps) for steps in ({}, ETA, DDPM)),
        *(("pred_x0", True, steps) for steps in ({}, DDPM)),
        *(("pred_v", True, steps) for steps in (ETA, DDPM)),
    ],
)
def test_the_same_images(ddpm, objective, self_condition, steps):
    diffusion = made(ddpm, objective=objective, self_condition=self_condition, **steps)
    expected, state = sampled(diffusion, batch_size=3)
    assert accelerate(diffusion) is diffusion
    actual, state_after = sampled(diffusion, batch_size=3)
    assert (actual - expected).abs().max() <= 1e-3
    assert torch.equal(state_after, state)
    assert diffusion.explain().startswith("eager: CUDA graphs need a CUDA device")
    restore(diffusion)
    again, _ = sampled(diffusion, batch_size=3)
    assert torch.equal(again, expected)


@pytest.mark.seconds
@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "method, schedule",
    [("ddim_sample", "linear"), ("p_sample_loop", "cosine"), ("ddim_sample", "sigmoid")],
)
def test_its_other_entrances(ddpm, schedule, method):
    options = {"beta_schedule": schedule, "auto_normalize": False, "timesteps": 60}
    diffusion = made(ddpm, objective="pred_v", **options)
    shape = (2, 3, 8, 8)
    expected, _ = sampled(diffusion, method, shape, return_all_timesteps=True)
    accelerate(diffusion)
    actual, _ = sampled(diffusion, method, shape, return_all_timesteps=True)
    assert actual.shape == expected.shape and actual.shape[1] > 50
    assert (actual - expected).abs().max() <= 1e-3
    last, _ = sampled(diffusion, method, shape)
    assert torch.equal(last, actual[:, -1])


@pytest.mark.seconds
def test_bfloat16_is_close(ddpm):
    diffusion = made(ddpm, objective="pred_v")
    expected, _ = sampled(diffusion, batch_size=2)
    accelerate(diffusion, dtype=torch.bfloat16)
    actual, _ = sampled(diffusion, batch_size=2)
    psnr = -10 * (actual - expected).square().mean().log10()
    assert 25 < psnr < 90


def test_its_blocks_are_fused(ddpm):
    diffusion = accelerate(made(ddpm, network={"full_attn": (False, True)}))
    told = fastdiff.report(diffusion.model)
    kinds = {part.kind for part in told.replaced}
    assert {"Block", "RMSNorm", "Attend"} <= kinds and not told.left
    assert {part.kind for part in told.others} == {"LinearAttention"}


@pytest.mark.seconds
def test_training_goes_on(ddpm):
    diffusion = made(ddpm)
    images = torch.rand(2, 3, 8, 8)
    torch.manual_seed(3)
    expected = torch.autograd.grad(diffusion(images), list(diffusion.parameters()))
    accelerate(diffusion)
    torch.manual_seed(3)
    actual = torch.autograd.grad(diffusion(images), list(diffusion.parameters()))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    with torch.no_grad():
        before, _ = sampled(diffusion, batch_size=1)
        for parameter in diffusion.parameters():
            parameter.mul_(1.01)
    after, _ = sampled(diffusion, batch_size=1)
    assert not torch.equal(before, after)


@pytest.mark.seconds
def test_copies_and_pickles(ddpm):
    diffusion = made(ddpm)
    stock = type(diffusion)
    names = list(diffusion.state_dict())
    expected, _ = sampled(accelerate(diffusion), batch_size=1)
    assert list(diffusion.state_dict()) == names
    twin = copy.deepcopy(diffusion)
    assert torch.equal(sampled(twin, batch_size=1)[0], expected)
    assert type(twin) is not stock and twin.model is not diffusion.model
    assert torch.equal(sampled(diffusion, batch_size=1)[0], expected)
    for part in diffusion.modules():
        part.__dict__.pop("cpu_config", None)  # which the stock object cannot pickle either
    again = pickle.loads(pickle.dumps(diffusion))
    assert type(again) is stock and not any("fastdiff" in name for name in again.__dict__)
    assert (sampled(again, batch_size=1)[0] - expected).abs().max() <= 1e-3


def test_bad_objects(ddpm):
    with pytest.raises(InputError, match="is a .*Linear; expected a GaussianDiffusion of"):
        accelerate(nn.Linear(2, 2))
    diffusion = made(ddpm)

    class Learned(type(diffusion)):
        def p_mean_variance(self, *args, **kwargs):
            raise NotImplementedError

    diffusion.__class__ = Learned
    with pytest.raises(InputError, match="Learned; expected a GaussianDiffusion of"):
        accelerate(diffusion)
    diffusion = made(ddpm)
    with pytest.raises(InputError, match="GaussianDiffusion is not accelerated"):
        restore(diffusion)
    accelerate(diffusion)
    with pytest.raises(InputError, match="accelerated; restore it first"):
        accelerate(diffusion)
    assert isinstance(diffusion, integration._Accelerated)
    parametrize.register_parametrization(diffusion, "betas", nn.Identity())
    with pytest.raises(InputError, match="became a ParametrizedGaussianDiffusion after"):
        restore(diffusion)
    assert isinstance(diffusion, integration._Accelerated)
    parametrize.remove_parametrizations(diffusion, "betas")
    assert not isinstance(restore(diffusion), Fused)


def test_arguments_of_another_version_go_to_its_own_loop(ddpm, monkeypatch):
    seen = []
    stock = ddpm.GaussianDiffusion.ddim_sample

    def other(self, shape, clip_denoised=True):
        seen.append(clip_denoised)
        return stock(self, shape)

    monkeypatch.setattr(ddpm.GaussianDiffusion, "ddim_sample", other)
    integration._accelerated_class.cache_clear()
    try:
        diffusion = made(ddpm, sampling_timesteps=3)
        expected, _ = sampled(diffusion, "ddim_sample", (2, 3, 8, 8))
        seen.clear()
        accelerate(diffusion)
        for options in ({}, {"clip_denoised": True}):
            actual, _ = sampled(diffusion, "ddim_sample", shape=(2, 3, 8, 8), **options)
            assert (actual - expected).abs().max() <= 1e-3 and not seen
        sampled(diffusion, "ddim_sample", (2, 3, 8, 8), False)
        assert seen == [False]
    finally:
        integration._accelerated_class.cache_clear()
