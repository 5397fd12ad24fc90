"""The score of every process against the exact gradient of a Gaussian mixture's log density."""

import copy

import numpy as np
import pytest
import torch

from fastdiff.errors import InputError
from fastdiff.process.edm import EDM
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.process.reverse import MEAN_TYPES, VAR_TYPES
from fastdiff.process.schedules import cosine_betas, rescale_zero_terminal_snr
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas

STEPS = 20
MEANS = torch.tensor([[-0.6, 0.3], [0.2, -0.1], [0.5, 0.8]], dtype=torch.float64)
STDS = torch.tensor([0.05, 0.3, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

SIGMAS = geometric_sigmas(STEPS, 0.02, 5.0)
PROCESSES = {
    **{f"vp {m}": GaussianDiffusion(cosine_betas(STEPS), mean_type=m) for m in MEAN_TYPES},
    **{f"vp {v}": GaussianDiffusion(cosine_betas(STEPS), var_type=v) for v in VAR_TYPES},
    **{f"ve {m}": VarianceExploding(SIGMAS, mean_type=m) for m in ("epsilon", "x_start", "v")},
    "ve unscaled": VarianceExploding(SIGMAS, scale_input=False, conditioning="log_sigma"),
    "edm": EDM(STEPS, sigma_max=5.0, sigma_data=0.6),
    "zero terminal SNR": GaussianDiffusion(
        rescale_zero_terminal_snr(cosine_betas(STEPS)), mean_type="v"
    ),
    "respaced": create_diffusion(steps=100, noise_schedule="cosine").respace(STEPS),
}


def log_joint(x_t, signal, noise):
    """log p(component, x_t), (N, 3)."""
    variance = (signal * STDS) ** 2 + noise**2
    distance = (x_t[:, None] - signal * MEANS).square().sum(-1)
    return WEIGHTS.log() - 0.5 * distance / variance - variance.log()


def exact_score(x_t, signal, noise):
    x_t = x_t.clone().requires_grad_()
    return torch.autograd.grad(log_joint(x_t, signal, noise).logsumexp(1).sum(), x_t)[0]


def exact_output(process, x_t, i):
    """What a network without error answers at step i: E[x_0 | x_t] in the form of its mean_type."""
    signal, noise = process.signal_scale[i], process.noise_scale[i]
    which = log_joint(x_t, signal, noise).softmax(1)
    gain = signal * STDS**2 / ((signal * STDS) ** 2 + noise**2)
    each = MEANS + gain[:, None] * (x_t[:, None] - signal * MEANS)
    x_start = (which[:, :, None] * each).sum(1)
    eps = (x_t - signal * x_start) / noise
    if process.mean_type == "edm":  # Karras et al. 2022, eq. 7, solved for F
        r = np.hypot(noise, process.sigma_data)
        c_skip, c_out = (process.sigma_data / r) ** 2, noise * process.sigma_data / r
        return (x_start - c_skip * x_t) / c_out
    if process.mean_type == "v":
        return (signal * eps - noise * x_start) / np.hypot(signal, noise)
    if process.mean_type == "previous_x":
        coef1, coef2 = process.posterior_mean_coef1[i], process.posterior_mean_coef2[i]
        return coef1 * x_start + coef2 * x_t
    return {"epsilon": eps, "x_start": x_start}[process.mean_type]


def exact_network(process, learns_variance=False):
    """It is told x_t and t as every network of the process is, and checks both."""

    def network(x, timesteps):
        (i,) = np.flatnonzero(process.model_timesteps == float(timesteps[0]))
        output = exact_output(process, x.double() / process.input_scale[i], i)
        output = torch.cat([output, 7 * output], 1) if learns_variance else output
        return output.to(x.dtype)

    return network


def points(process, i, dtype=torch.float64):
    generator = torch.Generator().manual_seed(i)
    x_start = MEANS[torch.randint(3, (50,), generator=generator)]
    noise = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    return (process.signal_scale[i] * x_start + process.noise_scale[i] * noise).to(dtype)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_perfect_networks_score_is_the_densitys_gradient(name):
    process = PROCESSES[name]
    network = exact_network(process, process.var_type in ("learned", "learned_range"))
    for i in range(STEPS):
        x_t, t = points(process, i), torch.full((50,), i)
        expected = exact_score(x_t, process.signal_scale[i], process.noise_scale[i])
        score = process.score(network, x_t, t)
        assert score.dtype == torch.float64
        torch.testing.assert_close(score, expected, rtol=1e-9, atol=1e-9)


def test_it_is_minus_eps_over_the_noise_each_sample_at_its_own_step():
    process = PROCESSES["vp epsilon"]
    x, eps = torch.randn(2, 4, 3, 5, 5)
    t = torch.tensor([0, 19, 3, 3])
    score = process.score(lambda x, t, y: eps * y, x, t, {"y": 2.0})
    noise = torch.from_numpy(np.sqrt(1 - process.alphas_cumprod))[t].view(4, 1, 1, 1)
    torch.testing.assert_close(score.double(), -2 * eps.double() / noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-4), (torch.bfloat16, 0.05)])
def test_storage_may_be_narrow(dtype, error):
    process = PROCESSES["ve v"]
    x_t = points(process, 4, dtype)
    score = process.score(exact_network(process), x_t, torch.full((50,), 4))
    expected = exact_score(x_t.double(), 1.0, process.sigmas[4])
    assert score.dtype == torch.float32
    assert (score - expected).norm() < error * expected.norm()


def test_copies_answer_the_same_and_leave_the_devices_tables_behind():
    process = create_diffusion(steps=STEPS, noise_schedule="cosine")
    x, t = torch.randn(3, 2), torch.tensor([0, 5, 19])
    with torch.inference_mode():  # what is made here serves training too
        before = process.score(lambda x, t: x, x, t).clone()
    twin = copy.deepcopy(process)
    assert not twin._score_tables.copies
    weight = torch.ones((), requires_grad=True)
    score = twin.score(lambda x, t: weight * x, x, t)
    score.sum().backward()
    assert torch.equal(score, before) and weight.grad is not None


def test_bad_input():
    process = PROCESSES["edm"]
    x, t = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match=r"integer tensor of timestep indices, got torch.float32"):
        process.score(lambda x, t: x, x, t.float())  # no quantile of its training
    with pytest.raises(InputError, match=r"0 … 19 for a process of 20 steps, got 20"):
        process.score(lambda x, t: x, x, t + 20)
    with pytest.raises(InputError, match=r"mean_type 'edm' .* needs \(2, 3\)"):
        process.score(lambda x, t: x[:, :1], x, t)
    with pytest.raises(InputError, match="floating-point"):
        process.score(lambda x, t: x, x.long(), t)
