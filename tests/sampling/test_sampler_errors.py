"""What a sampler says of options, arguments and networks that do not fit."""

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff.errors import InputError, TrainingError
from fastdiff.methods.table import StepTable
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas
from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, closed_form, diffusion


def nan_from(timestep):
    def model(x, t):
        return torch.full_like(x, float("nan")) if t[0] <= timestep else x

    return model


def test_a_network_that_answers_nan_is_named_with_its_step():
    sampler = Sampler(nan_from(10), diffusion(20), steps=3)
    with pytest.raises(TrainingError, match=r"not finite after step 1 \(timestep 10\)"):
        sampler.sample(SHAPE)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "eulr"}, "method is 'eulr'"),
        ({"eta": 0.5}, "eta=0.5 belongs to method 'ddim'"),
        ({"rng": "numpy"}, "rng is 'numpy'"),
        ({"capture": True, "cond_fn": closed_form()}, "cond_fn needs autograd"),
        ({"capture": "always"}, "capture is 'always'"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"dtype": "bf16"}, "dtype is 'bf16'"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": "2"}, "guidance_scale is '2'"),
        ({"device": "gpu"}, "device is 'gpu'; expected 'cpu'"),
        ({"method": "ddim", "eta": "1"}, "eta is '1'"),
        ({"method": "unipc", "method_options": {"clipped_eps": False}}, "belongs to method 'ddim'"),
        ({"method": "heun", "method_options": {1: 2}}, "expected a dict of names and values"),
        ({"method_options": {"process": 1}}, "method_options has 'process', which is no option"),
        ({"steps": 5, "spacing_options": {"sections": 3}}, "spacing_options has 'sections'"),
        ({"steps": 5, "spacing_options": {2: 3}}, "expected a dict of names and values"),
        ({"steps": 21}, "21"),
        ({"method": "auto", "steps": 2.5}, "2.5"),
        ({"method": "auto", "timesteps": 3}, "timesteps must be a list of numbers, got 3"),
        ({"steps": "ddim19"}, "ddim19"),
        ({"steps": "fifty"}, "fifty"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        Sampler(closed_form(), diffusion(20), **options)


ROWS = StepTable.from_rows([{"a": 1.0, "b": -1.0, "c": 0.5, "o": 0.5, "timesteps": 0.0}])


@pytest.mark.parametrize("move", [{"denoised_fn": torch.tanh}, {"dynamic_threshold": 0.9}])
@pytest.mark.parametrize("process", [diffusion(20), ROWS])
def test_what_moves_x_0_alone_is_refused_where_rows_read_the_output_too(move, process):
    own = {} if process is ROWS else {"method": "ddim", "method_options": {"clipped_eps": False}}
    sampler = Sampler(closed_form(), process, **own)  # without a move
    with pytest.raises(InputError, match=f"{next(iter(move))} moves x_0, and rows of this table"):
        Sampler(closed_form(), process, **own, **move)
    if "dynamic_threshold" in move:
        with pytest.raises(InputError, match="dynamic_threshold moves x_0"):
            sampler.configure(**move)


def test_a_classifier_is_refused_there_too():
    own = {"method": "ddim", "method_options": {"clipped_eps": False}}
    with pytest.raises(InputError, match="cond_fn moves x_0, and rows of this table"):
        Sampler(closed_form(), diffusion(20), cond_fn=closed_form(), **own)
    previous_x = diffusion(20, mean_type="previous_x")  # DDPM's rows, which are the output
    Sampler(closed_form(), previous_x, cond_fn=closed_form(), dynamic_threshold=0.9)


def test_bad_model_or_process():
    with pytest.raises(InputError, match="model is a int"):
        Sampler(3, diffusion())
    with pytest.raises(InputError, match="a Linear is no diffusion process, it has no mean_type"):
        Sampler(closed_form(), nn.Linear(2, 2), steps=3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"shape": (3,)}, "expected \\(N, C, ...\\)"),
        ({"shape": (0, 2, 4, 4)}, "positive integers"),
        ({"shape": 16}, "positive integers"),
        ({"shape": (3, 2.0)}, "positive integers"),
        ({"noise": torch.zeros(1, 2, 4, 4)}, "noise has shape"),
        ({"noise": np.zeros(SHAPE)}, "noise must be a floating-point tensor .* got ndarray"),
        ({"step_noise": lambda i: None}, "the noise of step 1 must be a tensor, got NoneType"),
        ({"step_noise": np.zeros(SHAPE)}, "the noise of step 1 must be a tensor, got ndarray"),
        ({"step_noise": torch.zeros(1, 2, 4, 4)}, r"noise is \(1, 2, 4, 4\)"),
        ({"seed": 1.5}, "seed"),
        ({"seed": -1}, "seed"),
        ({"first_sample": -1}, "first_sample"),
        ({"uncond_kwargs": {}}, "belong to guidance"),
    ],
)
@pytest.mark.parametrize("kind", ["counter", "torch"])
def test_bad_calls(arguments, message, kind):
    sampler = Sampler(closed_form(), diffusion(), steps=2, rng=kind)
    with pytest.raises(InputError, match=message):
        sampler.sample(**{"shape": SHAPE} | arguments)


def test_torch_noise_has_no_numbering():
    sampler = Sampler(closed_form(), diffusion(), steps=2, rng="torch")
    with pytest.raises(InputError, match="first_sample numbers the samples of rng='counter'"):
        sampler.sample(SHAPE, first_sample=4)


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda x, t: x[:, :1], r"model_output is \(3, 1, 4, 4\) .*; expected"),
        (lambda x, t: x.long(), "model_output is .* int64"),
        (lambda x, t: [x], "model_output is a list; expected"),
    ],
)
def test_bad_network_outputs(model, message):
    with pytest.raises(InputError, match=message):
        Sampler(model, diffusion(), steps=2).sample(SHAPE)


@pytest.mark.parametrize(
    "kwargs, uncond, message",
    [
        ({}, None, "needs to know what unconditional means"),
        ({"y": torch.zeros(3).long()}, {"z": 1}, "uncond_kwargs has 'z'"),
        ({"y": torch.zeros(3).long()}, {"y": torch.zeros(2).long()}, r"is \(2,\); expected"),
        ({"y": 3}, {"y": torch.zeros(3)}, "must be a tensor whose first dimension is the batch"),
        ({"a": {"b": torch.zeros(3)}}, {"a": {"c": 1}}, r"uncond_kwargs\['a'\] has 'c'"),
    ],
)
def test_bad_guidance(kwargs, uncond, message):
    sampler = Sampler(closed_form(), diffusion(), steps=2, guidance_scale=2.0)
    with pytest.raises(InputError, match=message):
        sampler.sample(SHAPE, model_kwargs=kwargs, uncond_kwargs=uncond)


@pytest.mark.parametrize("options", [{"steps": 1}, {"timesteps": [0, 5]}])
def test_what_is_mostly_data_cannot_be_drawn(options):
    sampler = Sampler(closed_form(), diffusion(20), **options)
    with pytest.raises(
        InputError, match="would start at timestep ., where .* mostly data .*trailing"
    ):
        sampler.sample(SHAPE)
    assert sampler.sample(SHAPE, noise=torch.randn(SHAPE)).shape == SHAPE
    assert sampler.sample(SHAPE, image=torch.randn(SHAPE), strength=1.0).shape == SHAPE
    last = Sampler(closed_form(), diffusion(20), steps=1, spacing="trailing")
    assert last.sample(SHAPE).shape == SHAPE
    exploding = VarianceExploding(geometric_sigmas(20))
    assert Sampler(closed_form(), exploding, timesteps=[15]).sample(SHAPE).shape == SHAPE
