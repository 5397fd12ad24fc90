"""One-step methods against published code: recorded calls of k-diffusion, EDM and Restart sampling,
and diffusers' installed schedulers, step by step.

tests/recorded/one_step.json was written by running ``sample_euler``, ``sample_heun``,
``sample_dpm_2``, ``sample_dpmpp_sde`` and the three ``…_ancestral`` of k-diffusion, ``edm_sampler``
of NVlabs/edm and ``restart_sampler`` of Newbeeer/diffusion_restart_sampling, at the commits it
names, with float64 tensors and ``denoiser`` below for a network: all σ and x that it was given, and
the result. Draw n = 1, 2, … of standard normal noise was ``draw(n)``; Restart's draws of factor 0
were left out, and ``dpmpp_sde``'s Brownian motion was made of such draws.
"""

import itertools
import json

import numpy as np
import pytest
import torch

import row_oracle
import row_tools
from fastdiff.process.schedules import get_named_beta_schedule
from paths import RECORDED

CASES = json.loads((RECORDED / "one_step.json").read_text())["cases"]


def denoiser(x, sigma):
    return 0.7 * np.tanh(x / (1 + 0.5 * sigma)) + 0.1 * np.cos(sigma)


def x_start_of(x, signal, noise):
    return denoiser(x / signal, noise / signal)


def draw(n):
    sines = np.sin(1.7 * n), np.cos(2.3 * n), np.sin(0.9 * n) + 0.4 * np.cos(5.1 * n)
    return np.array(sines)


def noise_of_rows(table, draws):
    """Which draw each row takes. "step": the published loop draws as a step begins, which is when
    the row before it ends; else there is one for every row that is noisy."""
    if draws == "step":
        return [draw(1 + begun) for begun in np.cumsum([*table.begins[1:], True])]
    return [draw(n) for n in np.cumsum(table.noisy_rows)]


@pytest.mark.parametrize("preserving", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['of']} {c['method']} {c['options']}")
def test_every_call_is_the_recorded_one(case, preserving):
    process = row_oracle.process(case["sigmas"][::-1], preserving=preserving)
    table = row_tools.table_of(process, case["method"], **case["options"])
    signal, noise = table.levels.T
    calls, final = np.array(case["calls"]), np.array(case["final"])
    # Restart's own levels were float32.
    rtol = 1e-6 if case["method"] == "restart" else 1e-12
    np.testing.assert_allclose(noise / signal, calls[:, 0], rtol=rtol)
    x_T = signal[0] * calls[0, 1:]
    seen = row_oracle.run(table, x_T, x_start_of, z=noise_of_rows(table, case["draws"]))
    expected = np.concatenate([signal[:, None] * calls[:, 1:], [final]])
    np.testing.assert_allclose(seen, expected, rtol=10 * rtol, atol=10 * rtol)


# --- diffusers --------------------------------------------------------------------------------

BETAS = get_named_beta_schedule("linear", 1000)
SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm_2": "KDPM2DiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm_2_ancestral": "KDPM2AncestralDiscreteScheduler",
}


def sigmas_of(timesteps):
    alphas_cumprod = np.cumprod(1 - BETAS)[timesteps]
    return np.sqrt((1 - alphas_cumprod) / alphas_cumprod)


def close(actual, expected):
    """diffusers computes in float32, by differences of σ or of logarithms."""
    scale = np.maximum(1, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4 * scale)


@pytest.mark.parametrize("steps", [2, 3, 8])
@pytest.mark.parametrize("method", SCHEDULERS)
def test_every_step_is_that_of_diffusers_sigma_schedulers(method, steps, monkeypatch):
    import diffusers  # takes seconds to import

    scheduler = getattr(diffusers, SCHEDULERS[method])(
        trained_betas=BETAS, prediction_type="epsilon", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    sigmas = sigmas_of((1000 - 1000 / steps * np.arange(steps)).round().astype(int) - 1)
    table = row_tools.table_of(row_oracle.process(sigmas[::-1], preserving=True), method)
    assert len(table) == len(scheduler.timesteps)
    signal, noise = table.levels.T
    # Draws come in order, one a row that is noisy; where theirs are more, their factor is 0.
    drawn, counter = [draw(n) for n in np.cumsum(table.noisy_rows)], itertools.count(1)
    if any(table.noisy_rows):
        monkeypatch.setattr(
            f"{type(scheduler).__module__}.randn_tensor",
            lambda *_, **__: torch.from_numpy(draw(next(counter))).float(),
        )
    x = np.array([0.4, -1.0, 0.7])
    seen = row_oracle.run(table, x, x_start_of, z=drawn)
    theirs = torch.from_numpy(x / signal[0]).float()
    for i, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(theirs, t).double().numpy()
        close(given, seen[i])
        eps = (seen[i] - signal[i] * x_start_of(seen[i], signal[i], noise[i])) / noise[i]
        theirs = scheduler.step(torch.from_numpy(eps).float(), t, theirs).prev_sample
    close(theirs.numpy(), seen[-1])


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 6, 7, 8, 20])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_every_step_is_that_of_diffusers_singlestep_solver(solver_type, order, steps):
    import diffusers

    scheduler = diffusers.DPMSolverSinglestepScheduler(
        trained_betas=BETAS,
        solver_order=order,
        solver_type=solver_type,
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    timesteps = np.linspace(0, 999, steps).round().astype(int)
    scheduler.set_timesteps(timesteps=timesteps[::-1].tolist())
    process = row_oracle.process(sigmas_of(timesteps), preserving=True)
    table = row_tools.table_of(process, f"dpmsolver++{order}s", solver_type=solver_type)
    assert len(table) == steps
    signal, noise = table.levels.T
    x = np.array([0.4, -1.0, 0.7])
    seen = row_oracle.run(table, x, x_start_of)
    for i, t in enumerate(scheduler.timesteps):
        eps = (seen[i] - signal[i] * x_start_of(seen[i], signal[i], noise[i])) / noise[i]
        x = scheduler.step(torch.from_numpy(eps).float(), t, torch.as_tensor(x)).prev_sample
        close(x.numpy(), seen[i + 1])
