"""Every method on data whose exact network is known: a Gaussian and a mixture of Gaussians.

For x_0 ~ Σ w_k N(m_k, C_k), x_t = signal·x_0 + noise·ε is again a mixture, and E[ε | x_t] is known
at every t. So what the samples are off by is the sampler's and chance's alone.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fastdiff import Sampler, create_diffusion
from fastdiff.methods.protocol import noise_levels


@dataclass
class Mixture:
    """weights (M,), means (M, D), covariances (M, D, D)."""

    weights: list[float]
    means: list[list[float]]
    covariances: list[list[list[float]]]

    def __post_init__(self):
        self.weights, self.means, self.covariances = (
            torch.tensor(value, dtype=torch.float64)
            for value in (self.weights, self.means, self.covariances)
        )

    def network(self, process):
        """model(x, t) = E[ε | x_t] for the timesteps of an unstrided process."""
        signal, noise = noise_levels(process)
        identity = torch.eye(self.means.shape[1], dtype=torch.float64)

        def model(x, t):
            s, n = signal[int(t[0])], noise[int(t[0])]
            centred = x.double()[:, None] - s * self.means  # (N, M, D)
            covariances = s**2 * self.covariances + n**2 * identity
            scores = torch.einsum("kij,nkj->nki", torch.linalg.inv(covariances), centred)
            log_joint = self.weights.log() - 0.5 * (
                (centred * scores).sum(-1) + torch.linalg.slogdet(covariances)[1]
            )
            return (n * (log_joint.softmax(1)[:, :, None] * scores).sum(1)).float()

        return model

    def deviations(self, samples):
        """How far weights, means and covariances are off, the largest, in standard errors.

        Of component k the samples are those nearest to its mean: the components are far apart.
        """
        samples = samples.double()
        nearest = (samples[:, None] - self.means).square().sum(-1).argmin(1)
        found = []
        for k, weight in enumerate(self.weights):
            mine, covariance = samples[nearest == k], self.covariances[k]
            variance = covariance.diagonal()
            if weight < 1:
                error = (weight * (1 - weight) / len(samples)).sqrt()
                found.append((len(mine) / len(samples) - weight) / error)
            found.append((mine.mean(0) - self.means[k]) / (variance / len(mine)).sqrt())
            error = ((variance[:, None] * variance + covariance**2) / len(mine)).sqrt()
            found.append((torch.cov(mine.T) - covariance) / error)
        return max(value.abs().max().item() for value in found)


GAUSSIAN = Mixture([1.0], [[0.3, -0.5]], [[[0.50, 0.18], [0.18, 0.10]]])
MIXTURE = Mixture(
    [0.5, 0.3, 0.2],
    [[-0.9, 0.2], [0.7, 0.8], [0.6, -0.7]],
    [[[0.03, 0.01], [0.01, 0.02]], [[0.02, -0.01], [-0.01, 0.04]], [[0.02, 0.0], [0.0, 0.02]]],
)
METHODS = {
    "DDPM, small variance": {"method": "ddpm", "var_type": "fixed_small"},
    "DDPM, large variance": {"method": "ddpm", "var_type": "fixed_large"},
    "DDIM": {"method": "ddim"},
    "DDIM, eta 0.5": {"method": "ddim", "eta": 0.5},
    "DDIM, eta 1": {"method": "ddim", "eta": 1.0},
    "DPM-Solver++": {"method": "dpmsolver++"},
    "SDE-DPM-Solver++": {"method": "sde-dpmsolver++"},
}


def process(var_type="fixed_small"):
    return create_diffusion(steps=1000, noise_schedule="linear", var_type=var_type)


def sampler(data, steps, *, var_type="fixed_small", spacing="logsnr", **method):
    whole = process(var_type)
    strided = whole.respace(steps, spacing=spacing)
    return Sampler(data.network(whole), strided, clip_denoised=False, **method)


COUNT = 3000
SLACK = 4.0  # standard errors, of twenty figures at most


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["Gaussian", "mixture"])
def test_samples_have_the_datas_weights_means_and_covariances(data, name):
    samples = sampler(data, 250, **METHODS[name]).sample((COUNT, 2), seed=5)
    assert data.deviations(samples) < SLACK


@pytest.mark.parametrize("method", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["Gaussian", "mixture"])
def test_second_order_needs_a_fifth_of_the_steps(data, method):
    assert data.deviations(sampler(data, 60, method=method).sample((COUNT, 2), seed=5)) < SLACK
    first_order = {"dpmsolver++": {}, "sde-dpmsolver++": {"eta": 1.0}}[method]
    samples = sampler(data, 30, method="ddim", **first_order).sample((COUNT, 2), seed=5)
    assert data.deviations(samples) > SLACK


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_network_is_noticed(name):
    """The figures tell apart what they should: other weights, means and covariances."""
    wrong = [
        Mixture([0.45, 0.35, 0.2], MIXTURE.means.tolist(), MIXTURE.covariances.tolist()),
        Mixture([0.5, 0.3, 0.2], (MIXTURE.means + 0.03).tolist(), MIXTURE.covariances.tolist()),
        Mixture([0.5, 0.3, 0.2], MIXTURE.means.tolist(), (1.3 * MIXTURE.covariances).tolist()),
    ]
    for data in wrong:
        samples = sampler(data, 40, **METHODS[name]).sample((COUNT, 2), seed=5)
        assert MIXTURE.deviations(samples) > SLACK


def along_the_flow(x, start, end):
    """The probability-flow ODE's x at the level ``end`` from x (N, 2) at ``start``, for GAUSSIAN;
    levels are (signal, noise). In the covariance's eigenvectors each coordinate keeps its place in
    units of its standard deviation (Song et al. 2021, arXiv:2011.13456, appendix D)."""
    mean, (variances, axes) = GAUSSIAN.means[0], torch.linalg.eigh(GAUSSIAN.covariances[0])

    def total(level):
        return (level[0] ** 2 * variances + level[1] ** 2).sqrt()

    place = (x.double() - start[0] * mean) @ axes / total(start)
    return end[0] * mean + (place * total(end)) @ axes.T


@pytest.mark.parametrize("method, order", [("ddim", 1), ("dpmsolver++", 2)])
def test_the_error_falls_with_each_methods_order(method, order):
    signal, noise = noise_levels(process())
    x_T = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    # At t = 0, before the last step, which no number of steps makes smaller.
    exact = along_the_flow(x_T, (signal[-1], noise[-1]), (signal[0], noise[0]))
    counts = [24, 32, 48, 64, 96, 128]
    errors = []
    for steps in counts:
        *_, x_0, _ = sampler(GAUSSIAN, steps, method=method).iterate((100, 2), noise=x_T)
        errors.append((x_0["sample"] - exact).square().mean().sqrt().item())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert 0.85 * order <= slope <= 1.15 * order
    assert errors[-1] < {1: 0.02, 2: 5e-4}[order]


def test_the_flow_ends_in_the_data():
    """The exact flow carries noise into data, and the solver arrives where it does."""
    signal, noise = noise_levels(process())
    x_T = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(1))
    exact = along_the_flow(x_T, (signal[-1], noise[-1]), (1.0, 0.0))
    assert GAUSSIAN.deviations(exact) < SLACK
    samples = sampler(GAUSSIAN, 200, method="dpmsolver++").sample((COUNT, 2), noise=x_T)
    torch.testing.assert_close(samples.double(), exact, rtol=1e-3, atol=1e-3)
