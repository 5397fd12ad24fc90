"""The sampler on a problem whose answer is known."""

import math

import numpy as np
import pytest
import torch

from fastdiff.methods.protocol import noise_levels
from fastdiff.methods.table import StepTable
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.schedules import get_named_beta_schedule
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas
from fastdiff.sampling.sampler import Sampler

# A problem with a known answer: Gaussian data and the exact network


MEAN = torch.tensor([0.3, -0.5])
STD = torch.tensor([0.1, 0.6])


def levels(process):
    """Signal, noise and input scale, float64 (K,)."""
    input_scale = getattr(process, "input_scale", np.ones(process.num_timesteps))
    return tuple(torch.tensor(scale) for scale in (*noise_levels(process), input_scale))


def exact_eps(process):
    """E[ε | x_t] for data N(MEAN, diag(STD²))."""
    signal, noise, scale = levels(process)
    index = {float(t): i for i, t in enumerate(process.model_timesteps)}

    def model(x, timesteps):
        i = index[float(timesteps[0])]
        x = x.double() / scale[i]
        total = (signal[i] * STD) ** 2 + noise[i] ** 2
        return (noise[i] * (x - signal[i] * MEAN) / total).float()

    return model


def vp(schedule, var_type):
    return GaussianDiffusion(get_named_beta_schedule(schedule, 1000), var_type=var_type)


PROCESSES = {
    "vp": lambda: vp("linear", "fixed_small"),
    "vp_large": lambda: vp("cosine", "fixed_large"),
    "ve": lambda: VarianceExploding(geometric_sigmas(1000, 0.002, 30.0)),
    "ve_large": lambda: VarianceExploding(
        geometric_sigmas(1000, 0.002, 30.0), var_type="fixed_large", conditioning="log_sigma"
    ),
}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("method, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)])
def test_moments_of_gaussian_data_arrive(name, method, eta):
    """With the exact network x_prev is linear in x_t: mean and variance follow in closed form."""
    process = PROCESSES[name]()
    table = StepTable.from_process(process, method=method, eta=eta, clip_denoised=False)
    row = {column: getattr(table, column).double() for column in ("a", "b", "c", "d", "sigma")}
    signal, noise, _ = levels(process)
    mean, variance = signal[-1] * MEAN, (signal[-1] * STD) ** 2 + noise[-1] ** 2
    for i in range(len(table)):
        t = len(table) - 1 - i
        # ε = slope·x + offset; x_prev = c·(a·x + b·ε) + d·x + σ·z
        slope = noise[t] / ((signal[t] * STD) ** 2 + noise[t] ** 2)
        offset = -slope * signal[t] * MEAN
        gain = row["c"][i] * (row["a"][i] + row["b"][i] * slope) + row["d"][i]
        mean = gain * mean + row["c"][i] * row["b"][i] * offset
        variance = gain**2 * variance + row["sigma"][i] ** 2
    assert ((mean - MEAN) / STD).abs().max() < 1e-3
    assert (variance.sqrt() / STD - 1).abs().max() < 0.05


@pytest.mark.seconds
@pytest.mark.sample(5)
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(
    "method, steps", [("ddpm", None), ("ddim", 500), ("dpmsolver++", 250), ("dpmsolver++", 500)]
)
def test_gaussian_data_is_sampled_with_its_mean_and_covariance(name, method, steps):
    process = PROCESSES[name]()
    count = 2_000 if method == "ddpm" else 20_000
    sampler = Sampler(exact_eps(process), process, steps=steps, method=method, clip_denoised=False)
    samples = sampler.sample((count, 2), seed=3)
    slack = 4 / math.sqrt(count)  # four standard errors
    assert ((samples.mean(0) - MEAN) / STD).abs().max() < slack
    assert (samples.std(0) / STD - 1).abs().max() < 0.04 + slack
    assert torch.corrcoef(samples.T)[0, 1].abs() < slack


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_solver_is_of_second_order_and_ddim_of_first(name):
    """The probability-flow ODE from a given x_T has a known end."""
    process = PROCESSES[name]()
    signal, noise, _ = (scale[-1] for scale in levels(process))
    prior = getattr(process, "prior_std", 1.0)
    x_T = prior * torch.linspace(-1, 1, 7)[:, None].expand(7, 2).contiguous()
    # Along the flow, (x − signal·MEAN)/√((signal·STD)² + noise²) stays what it is.
    answer = MEAN + STD * (x_T - signal * MEAN) / ((signal * STD) ** 2 + noise**2).sqrt()

    def error(method, steps):
        sampler = Sampler(
            exact_eps(process), process, steps=steps, method=method, clip_denoised=False
        )
        return (sampler.sample((7, 2), noise=x_T) - answer).abs().max(0).values[1].item()

    assert 1.8 < error("ddim", 125) / error("ddim", 250) < 2.2
    assert 3.5 < error("dpmsolver++", 125) / error("dpmsolver++", 250) < 5
    assert error("dpmsolver++", 250) < 0.2 * error("ddim", 250)
