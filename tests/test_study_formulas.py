"""The formulas of the studies in examples/, in float64 against what they must give."""

import importlib
import math

import numpy as np
import pytest
import torch

from fastdiff import GaussianDiffusion
from fastdiff.process.likelihood import normal_kl
from paths import ROOT


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(x, t):
    """eps, of no particular use, in x's dtype."""
    return torch.tanh(x + 0.1 * t.to(x.dtype).view(-1, 1))


PROCESS = GaussianDiffusion(np.linspace(0.01, 0.3, 12), loss_type="rescaled_kl")


# --- analytic_averaging ------------------------------------------------------------------------


def test_a_draw_has_the_divergence_as_its_mean_and_the_predicted_variance(study):
    averaging = study("analytic_averaging")
    mean1, log1, mean2, log2 = draws(4, 50)
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)  # exact up to degree 9; this is 4
    z, weights = torch.from_numpy(nodes)[:, None], torch.from_numpy(weights / weights.sum())
    x = mean1 + (0.5 * log1).exp() * z
    ratio = averaging.gaussian_log_density(x, mean1, log1) - averaging.gaussian_log_density(
        x, mean2, log2
    )
    mean = weights @ ratio
    torch.testing.assert_close(mean, normal_kl(mean1, log1, mean2, log2), rtol=1e-10, atol=1e-10)
    variance = averaging.drawn_variance(mean1, log1, mean2, log2)
    torch.testing.assert_close(weights @ (ratio - mean) ** 2, variance, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        averaging.drawn_variance(mean1, log1, mean2, log1), 2 * normal_kl(mean1, log1, mean2, log1)
    )


def a_step(averaging, seed=1):
    x_start, noise = draws(2, 11, 6, seed=seed).clamp(-1, 1)
    return averaging.Step.of(PROCESS, network, x_start, torch.arange(1, 12), noise)


def test_opposite_draws_average_to_the_closed_form(study):
    """With equal variances the draw's part is linear in it."""
    step = a_step(study("analytic_averaging"))
    z = draws(11, 6, seed=2)
    pair = step.drawn(torch.stack([z, -z]))
    torch.testing.assert_close(pair.mean(0), step.closed_form(), rtol=1e-9, atol=1e-9)
    assert (pair[0] - pair[1]).abs().max() > 0.1


def test_the_forward_form_differs_by_a_term_without_the_network(study):
    averaging = study("analytic_averaging")
    step, z = a_step(averaging), draws(11, 6, seed=2)
    mean, _, log_variance = PROCESS.q_mean_variance(step.x_start, step.t)
    before, _, log_before = PROCESS.q_mean_variance(step.x_start, step.t - 1)
    expected = averaging.gaussian_log_density(
        step.x_t, mean, log_variance
    ) - averaging.gaussian_log_density(step.x_prev(z), before, log_before)
    torch.testing.assert_close(step.forward(z) - step.drawn(z), expected, rtol=1e-8, atol=1e-8)


def test_the_closed_form_is_the_loss_of_the_process(study):
    averaging = study("analytic_averaging")
    x_start, noise = draws(2, 12, 6).clamp(-1, 1)
    arguments = (network, x_start, torch.arange(12))
    ours = averaging.AveragedLoss(PROCESS, None).training_losses(*arguments, noise=noise)["loss"]
    theirs = PROCESS.training_losses(*arguments, noise=noise)["loss"]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# --- learned_schedule --------------------------------------------------------------------------


def test_the_continuous_loss_is_that_of_the_process_over_a_step(study):
    """Kingma et al. 2021: in discrete time ½·expm1(gamma's difference) is where ½·gamma' was."""
    learned = study("learned_schedule")
    gammas = np.linspace(-6, 5, 40)
    process = learned.process_of(gammas)
    np.testing.assert_allclose(
        process.noise_scale**2 / process.signal_scale**2, np.exp(gammas), rtol=1e-9
    )
    x_start, noise = draws(2, 39, 6)
    t = torch.arange(1, 40)
    loss = process.training_losses(
        lambda x, t: network(x, torch.from_numpy(gammas)[t.long()] - learned.GAMMA_MIN),
        x_start,
        t,
        noise=noise,
    )["loss"]
    slope = torch.from_numpy(np.expm1(np.diff(gammas)))
    gamma = torch.from_numpy(gammas)[t]
    ours = learned.continuous_loss(network, x_start, gamma, slope, noise)
    torch.testing.assert_close(ours * len(gammas), loss, rtol=1e-7, atol=1e-9)


def test_the_learned_schedule_rises_between_its_ends(study):
    learned = study("learned_schedule")
    schedule = learned.MonotoneSchedule().double()
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter += 3 * draws(*parameter.shape)
    t = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    gamma, slope = schedule(t)
    ends = torch.tensor([learned.GAMMA_MIN, learned.GAMMA_MAX], dtype=torch.float64)
    torch.testing.assert_close(gamma[[0, -1]].detach(), ends)
    torch.testing.assert_close(slope.detach(), torch.autograd.grad(gamma.sum(), t)[0])
    assert (slope > 0).all() and slope.max() > 2 * slope.min()


def test_the_best_schedule_and_its_deviation(study):
    """Where the loss at gamma is e^gamma times a constant or a fair coin's 0 or 2, all is known."""
    learned = study("learned_schedule")
    grid = np.linspace(learned.GAMMA_MIN, learned.GAMMA_MAX, 20001)
    t = np.linspace(0, 1, 11)
    low, high = np.exp(grid[[0, -1]])
    best = learned.best_schedule(grid, np.exp(2 * grid), t)
    np.testing.assert_allclose(best, np.log(low + t * (high - low)), rtol=1e-5, atol=1e-5)
    assert learned.least_deviation(grid, np.exp(grid), 2 * np.exp(2 * grid)) == pytest.approx(
        high - low, rel=1e-6
    )
    # Any other schedule with these ends has more: E[loss²] = ∫ gamma'² · square dt.
    fine = np.linspace(0, 1, 200001)
    for other in (
        learned.named_schedule("cosine", fine),
        learned.named_schedule("linear", fine),
        learned.GAMMA_MIN + (learned.GAMMA_MAX - learned.GAMMA_MIN) * fine**2,
    ):
        assert other[[0, -1]] == pytest.approx([learned.GAMMA_MIN, learned.GAMMA_MAX])
        square = np.mean((np.diff(other) / np.diff(fine)) ** 2 * np.exp(2 * other[1:]))
        assert square > 1.05 * (high - low) ** 2


# --- ddim_vs_ddpm ------------------------------------------------------------------------------


def test_where_two_curves_cross(study):
    crossings = study("ddim_vs_ddpm").crossings
    steps = (5, 20, 100, 400)
    powers = [(s / 50) ** -0.7 for s in steps]  # a line in logarithms: through 1 at 50
    assert crossings(steps, powers) == pytest.approx([50.0])
    assert crossings(steps, [2.0, 0.5, 2.0, 3.0]) == pytest.approx([10.0, math.sqrt(2000)])
    assert crossings(steps, [1.5, 1.2, 1.1, 1.01]) == []
