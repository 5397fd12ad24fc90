"""Tests of captured steps on a GPU, whose bodies run on the CPU too, on the fake of fake_cuda.py.

conftest.py has the fixture ``device`` that goes with them, and in tests/sampling ``unet``.
"""

import functools

import pytest
import torch

from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, diffusion, small_unet

PROCESS = diffusion(40)
SIZE = (1, 3, 16, 16)
LABELS = torch.tensor([0, 2, 1])


def on_both(names="", cpu=((),), gpu=()):
    """Cases of a test: each of ``cpu`` on the fake, each of ``gpu``, or of ``cpu``, on a GPU."""
    both = [("cpu", cpu, ()), ("cuda", gpu or cpu or [()], pytest.mark.cuda)]
    cases = [
        pytest.param(device, *case, marks=marks) for device, given, marks in both for case in given
    ]
    names = ["device", *names.replace(",", " ").split()]
    return pytest.mark.parametrize(names, cases, indirect=["device"])


def pair(model, device, process=PROCESS, **options):
    options = {"device": device.name} | options
    return (
        Sampler(model, process, capture=True, **options),
        Sampler(model, process, capture=False, **options),
    )


def assert_close(captured, eager, shape=SHAPE, **arguments):
    actual, expected = captured.sample(shape, **arguments), eager.sample(shape, **arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert captured.explain().startswith("a captured CUDA graph")
    return actual


@functools.cache
def unet_on(name):
    torch.manual_seed(0)
    width = 64 if name == "cuda" else 8
    model = small_unet(3, model_channels=width, channel_mult=(1, 2), attention_resolutions=(2,))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(name).eval()
