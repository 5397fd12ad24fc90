"""Both DPM-Solver++ forms against diffusers' DPMSolverMultistepScheduler, step by step.

What matches: solver_order=2, solver_type="midpoint", final_sigmas_type="zero" (the default: the
last step arrives at noise 0, at first order), whatever lower_order_final and euler_at_final say:
they concern that last step, which is of first order already, and orders above the second. Clipping
is diffusers' thresholding with a ratio of 0. What differs: final_sigmas_type="sigma_min", which
stops at the least noise of the training schedule, and a schedule without terminal signal, which
diffusers changes to ᾱ = 2⁻²⁴ and we take as it is.
"""

import numpy as np
import pytest
import torch

from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.respacing import spaced_timesteps
from fastdiff.process.schedules import get_named_beta_schedule
from fastdiff.sampling.sampler import Sampler

SHAPE = (3, 2, 4, 4)
BETAS = get_named_beta_schedule("linear", 1000)
PREDICTIONS = {"epsilon": "epsilon", "x_start": "sample", "v": "v_prediction"}
CHOICES = [
    *[
        {"sections": steps, "spacing": spacing}
        for spacing in ("uniform", "quadratic", "trailing", "logsnr")
        for steps in (2, 9, 20)
    ],
    {"timesteps": [500]},
    {"timesteps": [0, 3, 10, 40, 41, 90, 300, 601, 998]},
]


def network(x, t):
    t = t.view(-1, 1, 1, 1)
    return torch.tanh(x) * (0.6 + 0.4 * torch.cos(t / 7)) + 0.1 * torch.sin(5 * x)


def scheduler_of(method, prediction="epsilon", clip=False, **config):
    import diffusers  # takes seconds to import

    return diffusers.DPMSolverMultistepScheduler(
        trained_betas=BETAS,
        **{"solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"} | config,
        algorithm_type=method,
        prediction_type=PREDICTIONS[prediction],
        thresholding=clip,  # with a ratio of 0 the threshold is 1: plain clipping to [−1, 1]
        dynamic_thresholding_ratio=0.0,
        sample_max_value=1.0,
    )


def draws(count):
    return list(torch.randn(count + 1, *SHAPE, generator=torch.Generator().manual_seed(1)))


def theirs(scheduler, timesteps, noise):
    """x after every step, on ascending ``timesteps``; noise[0] is x_T, noise[1 + i] step i's."""
    scheduler.set_timesteps(timesteps=timesteps[::-1])
    x, steps = noise[0], []
    for t, z in zip(timesteps[::-1], noise[1:], strict=True):
        output = network(x, torch.full((len(x),), float(t)))
        x = scheduler.step(output, t, x, variance_noise=z).prev_sample
        steps.append(x)
    return steps


def ours(diffusion, method, clip, noise):
    sampler = Sampler(network, diffusion, method=method, clip_denoised=clip)
    last = diffusion.num_timesteps - 1
    steps = sampler.iterate(SHAPE, noise=noise[0], step_noise=lambda t: noise[1 + last - t])
    return [step["sample"] for step in steps]


def equal_steps(actual, expected):
    """Whether each step's x is the same; diffusers takes differences of float32 logarithms."""
    return [
        torch.allclose(mine, other, rtol=2e-4, atol=2e-4 * max(1, float(other.abs().max())))
        for mine, other in zip(actual, expected, strict=True)
    ]


@pytest.mark.sample(28)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", ["dpmsolver++", "sde-dpmsolver++"])
def test_every_step_is_diffusers(method, prediction, choice):
    diffusion = GaussianDiffusion(BETAS, mean_type=prediction).respace(**choice)
    timesteps = diffusion.timestep_map.tolist()
    noise = draws(len(timesteps))
    for clip in (False, True):
        scheduler = scheduler_of(method, prediction, clip)
        actual = ours(diffusion, method, clip, noise)
        assert all(equal_steps(actual, theirs(scheduler, timesteps, noise)))


@pytest.mark.parametrize("steps", [1, 2, 14, 15, 30])  # diffusers lowers orders below 15 steps
@pytest.mark.parametrize("method", ["dpmsolver++", "sde-dpmsolver++"])
def test_diffusers_rules_for_the_last_steps_change_nothing_at_zero_final_sigma(method, steps):
    diffusion = GaussianDiffusion(BETAS).respace(steps, spacing="trailing")
    timesteps = diffusion.timestep_map.tolist()
    noise = draws(steps)
    actual = ours(diffusion, method, False, noise)
    for lower in (False, True):
        for euler in (False, True):
            scheduler = scheduler_of(method, lower_order_final=lower, euler_at_final=euler)
            assert all(equal_steps(actual, theirs(scheduler, timesteps, noise)))


@pytest.mark.parametrize("method", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize(
    "config, equal",
    [
        ({"final_sigmas_type": "sigma_min"}, [True] * 5 + [False]),
        ({"solver_type": "heun"}, [True] + [False] * 5),
        ({"solver_order": 1}, [True] + [False] * 5),
    ],
)
def test_what_differs(method, config, equal):
    """The comparison notices: other settings leave their trace at the steps that they change."""
    diffusion = GaussianDiffusion(BETAS, mean_type="x_start").respace(6, spacing="trailing")
    noise = draws(6)
    actual = ours(diffusion, method, False, noise)
    scheduler = scheduler_of(method, "x_start", **config)
    expected = theirs(scheduler, diffusion.timestep_map.tolist(), noise)
    assert equal_steps(actual, expected) == equal


@pytest.mark.parametrize("steps", [*range(1, 60), 250, 333, 999, 1000])
def test_trailing_is_diffusers(steps):
    scheduler = scheduler_of("dpmsolver++", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    expected = scheduler.timesteps.numpy()[::-1]
    if len(expected) > steps:  # its stride is rounded: one timestep too many, and that is -1
        assert len(expected) == steps + 1 and expected[0] == -1
        expected = expected[1:]
    assert np.array_equal(spaced_timesteps(1000, steps, "trailing"), expected)
