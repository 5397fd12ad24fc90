"""Guidance through what wraps a network: its null class is found, or asked for."""

import functools

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.errors import InputError
from fastdiff.models.wrappers import attribute_of


class Shell(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x, t, **kwargs):
        return self.inside(x, t, **kwargs)


def decorated(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


AROUND = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "shell": Shell,
    "nested": lambda model: nn.DataParallel(Shell(nn.DataParallel(model))),
    "partial": functools.partial,
    "method": lambda model: model.forward,
    "decorated": lambda model: decorated(model.forward),
    "partial of a wrapper": lambda model: functools.partial(nn.DataParallel(model)),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = fastdiff.UNet(1, 8, 1, 1, (), channel_mult=(1,), num_classes=3, null_class=True)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.eval()


def samples(called):
    diffusion = fastdiff.create_diffusion(steps=20, noise_schedule="cosine")
    sampler = fastdiff.Sampler(called, diffusion, steps=2, guidance_scale=2.0, executor=False)
    return sampler.sample((2, 1, 4, 4), seed=1, model_kwargs={"y": torch.tensor([0, 2])})


@pytest.mark.parametrize("name", AROUND)
def test_the_null_label_is_found_through(model, name):
    assert torch.equal(samples(AROUND[name](model)), samples(model))


def test_the_null_label_of_a_compiled_network(model):
    assert attribute_of(torch.compile(model), "null_label") == 3
    assert attribute_of(nn.DataParallel(torch.compile(model)), "null_label") == 3
    assert attribute_of(torch.compile(model.forward), "null_label") == 3


def test_a_function_may_rename_labels_so_it_is_asked(model):
    with pytest.raises(InputError, match="not a function"):
        samples(lambda x, t, y: model(x, t, y))
    two = nn.ModuleList([Shell(model), Shell(model)])
    assert attribute_of(two, "null_label") is None
