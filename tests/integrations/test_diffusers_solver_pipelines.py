"""The solvers in accelerated pipelines, and their rows in a Sampler."""

import copy

import diffusers
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.integrations import diffusers as ours
from fastdiff.integrations.diffusers import accelerate_pipeline
from pipeline_tools import MILD, assert_same, drawn, pipeline, unet


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("steps", [10, 20])
def test_dpm_solver_of_a_higher_order(order, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=order, **MILD)
    assert_same(pipeline("ddpm", scheduler), num_inference_steps=steps)


@pytest.mark.parametrize("kind", ["EulerDiscrete", "EulerAncestralDiscrete"])
@pytest.mark.parametrize("config", [MILD, {"prediction_type": "v_prediction"}])
def test_euler_in_a_ddpm_pipeline(kind, config):
    """Which draws x_T from N(0, I) and does not scale what the network is given."""
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**config)
    assert_same(pipeline("ddpm", scheduler), num_inference_steps=20)


OF_THE_SAMPLER = [
    ("EulerDiscrete", MILD),
    ("EulerDiscrete", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"} | MILD),
    ("HeunDiscrete", MILD),
    ("HeunDiscrete", {"prediction_type": "v_prediction", "clip_sample": True} | MILD),
    *(("UniPCMultistep", {"solver_order": order} | MILD) for order in (1, 2, 3)),
    ("UniPCMultistep", {"predict_x0": False, "final_sigmas_type": "sigma_min"} | MILD),
    ("UniPCMultistep", {"disable_corrector": [0, 3], "use_karras_sigmas": True} | MILD),
    *(("DEISMultistep", {"solver_order": order} | MILD) for order in (1, 2, 3)),
    ("DEISMultistep", {"prediction_type": "v_prediction", "use_beta_sigmas": True} | MILD),
    ("DPMSolverMultistep", {"solver_order": 3, "prediction_type": "v_prediction"} | MILD),
    ("PNDM", {"skip_prk_steps": True} | MILD),
    ("PNDM", {"skip_prk_steps": True, "prediction_type": "v_prediction"} | MILD),
]


@pytest.mark.parametrize("name, config", OF_THE_SAMPLER)
@pytest.mark.parametrize("steps", [1, 2, 11])
def test_rows_for_a_sampler(name, config, steps):
    """The loop that diffusers documents for its schedulers, by a Sampler; and x_0 is x_0."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    mine = getattr(ours, f"{name}Scheduler")(**config)
    model = unet()
    for each in (scheduler, mine):
        each.set_timesteps(steps)
    rows = mine.sampling_rows(torch.device("cpu"))
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    x = noise = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x, return_dict=False)[0]
    sampler = fastdiff.Sampler(model, rows.table)
    actual = sampler.sample(tuple(noise.shape), noise=noise)
    assert (actual - x).abs().max() <= 1e-4 * max(1.0, float(x.abs().max()))
    first = next(iter(sampler.iterate(tuple(noise.shape), noise=noise)))["pred_xstart"]
    t = scheduler.timesteps[0]
    if name == "PNDM":
        alpha = scheduler.alphas_cumprod[t] ** 0.5
    else:
        alpha = 1 / (1 + scheduler.sigmas[0] ** 2) ** 0.5
    scaled = noise * alpha if name in ("EulerDiscrete", "HeunDiscrete") else noise
    sigma = (1 - alpha**2) ** 0.5
    with torch.no_grad():
        output = model(scaled, t).sample
    if config.get("prediction_type") == "v_prediction":
        x_start = alpha * scaled - sigma * output
    else:
        x_start = (scaled - sigma * output) / alpha
    x_start = x_start.clamp(-1, 1) if config.get("clip_sample") else x_start
    scale = max(1.0, float(noise.abs().max()), float((scaled / alpha).abs().max()))
    torch.testing.assert_close(first, x_start, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["UniPCMultistep", "DEISMultistep", "PNDM", "HeunDiscrete"])
def test_a_pipeline_samples_with_what_its_own_loop_cannot_use(name):
    """Schedulers whose step takes no generator, at the levels that they are made for."""
    config = {"skip_prk_steps": True} if name == "PNDM" else {}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config | MILD)
    pipe = pipeline("ddpm", copy.deepcopy(scheduler))
    with pytest.raises(TypeError, match="generator"):
        drawn(pipe, num_inference_steps=6)
    images, _ = drawn(accelerate_pipeline(pipe), num_inference_steps=6)
    assert pipe.explain().startswith("eager")
    scheduler.set_timesteps(6)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    x, model = noise * scheduler.init_noise_sigma, unet()
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x, return_dict=False)[0]
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - expected).max() <= 1e-3
