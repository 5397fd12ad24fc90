"""A whole network and a sampler by the backend that is named, whatever it has kernels of."""

import pytest
import torch

import fastdiff
from fastdiff import GaussianDiffusion, Sampler
from fastdiff.ops import backends
from fastdiff.ops.dispatch import OPERATIONS
from fastdiff.process.schedules import cosine_betas
from unet_tools import small_unet

pytestmark = pytest.mark.any_backend


@pytest.fixture(scope="module")
def model():
    return small_unet(channel_mult=(1,), attention_resolutions=(1,))


def explained():
    x, norm = torch.zeros(1, 8, 4), torch.ones(8)
    return [
        fastdiff.explain("attention", torch.zeros(1, 24, 4), 1),
        fastdiff.explain("rms_norm_silu", x, norm),
        fastdiff.explain("group_norm_silu", x, 2, norm, norm),
    ]


def test_each_operation_is_served():
    name = backends.named()
    for choice in explained():
        if name in (*OPERATIONS[choice.op].kernels, "reference"):
            assert choice.backend == name
        elif name is not None:
            assert choice.backend != name and choice.reason.startswith(f"{name!r} was named, there")


def test_a_network_gives_the_references_values_and_gradients(model):
    def run():
        model.zero_grad()
        y = model(x, torch.tensor([3.0, 700.0]))
        y.square().mean().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters())]

    x = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
    actual = run()
    with fastdiff.backend("reference"):
        expected = run()
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["ddpm", "dpmsolver++"])
def test_a_sampler_gives_the_references_images(model, method):
    process = GaussianDiffusion(cosine_betas(50))
    images = []
    for name in (backends.named(), "reference"):
        with fastdiff.backend(name):
            sampler = Sampler(model, process, steps=2, method=method)
            images.append(sampler.sample((2, 3, 4, 4), seed=1))
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)
