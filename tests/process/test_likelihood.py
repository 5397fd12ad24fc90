"""Likelihood terms, bits/dim with standard errors, and the rate-distortion table."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion_tools import gaussian, images
from fastdiff.errors import InputError
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.process.likelihood import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
    rate_distortion,
    summarize_bpd,
    vb_terms_bpd,
)
from fastdiff.process.schedules import linear_betas

GREY_LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def model(x, t):
    return torch.tanh(x) * (0.6 + 0.4 * torch.cos(t / 100).view(-1, *[1] * (x.dim() - 1)))


def test_normal_kl_is_the_integral():
    p, q = stats.norm(0.3, math.exp(-0.2)), stats.norm(-0.1, math.exp(0.35))
    expected = p.expect(lambda x: p.logpdf(x) - q.logpdf(x))
    arguments = 0.3, -0.4, -0.1, 0.7
    for tensors in range(1, 16):
        mixed = [
            torch.tensor([value], dtype=torch.float64) if tensors >> i & 1 else value
            for i, value in enumerate(arguments)
        ]
        assert normal_kl(*mixed).item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match="at least one tensor"):
        normal_kl(*arguments)


def test_the_cdf_is_close_to_the_normal_one_and_never_overflows():
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    assert np.abs(approx_standard_normal_cdf(x).numpy() - stats.norm.cdf(x)).max() < 2e-4
    far = torch.tensor([-1e30, 1e30], requires_grad=True)
    cdf = approx_standard_normal_cdf(far)
    assert cdf.tolist() == [0.0, 1.0]
    cdf.sum().backward()
    assert (far.grad == 0).all()


@pytest.mark.parametrize("mean", [-1.4, -1.0, 0.123, 0.999, 3.0])
@pytest.mark.parametrize("log_scale", [-6.0, -3.0, 0.5])
def test_the_bins_of_all_grey_levels_share_out_the_probability(mean, log_scale):
    x = GREY_LEVELS
    log_p = discretized_gaussian_log_likelihood(
        x, means=torch.full_like(x, mean), log_scales=torch.full_like(x, log_scale)
    )
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def test_bins_are_one_grey_level_wide_and_open_at_the_edges():
    x = GREY_LEVELS[[0, 1, 128, 254, 255]]
    mean, scale = 0.2, 0.7
    log_p = discretized_gaussian_log_likelihood(
        x, means=torch.full_like(x, mean), log_scales=torch.full_like(x, math.log(scale))
    )
    edges = np.array([-np.inf, *(x[1:].numpy() - 1 / 255)])
    tops = np.array([*(x[:-1].numpy() + 1 / 255), np.inf])
    cdf = stats.norm(mean, scale).cdf
    assert log_p.exp().numpy() == pytest.approx(cdf(tops) - cdf(edges), abs=3e-4)
    # Only |x| > 0.999 counts as an edge: one grey level further in the bin is closed.
    assert log_p[0] > log_p[1] + 1 and log_p[-1] > log_p[-2] + 1


def test_probabilities_are_floored_and_gradients_stay_finite():
    x = torch.tensor([-1.0, 0.0, 1.0]).repeat(4)
    means = torch.tensor([50.0, -50.0, 1e20, 0.0]).repeat_interleave(3).requires_grad_()
    log_scales = torch.tensor([-30.0, -5.0, -30.0, -40.0]).repeat_interleave(3).requires_grad_()
    log_p = discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)
    assert log_p.min().item() == pytest.approx(math.log(1e-12))
    log_p.sum().backward()
    assert means.grad.isfinite().all() and log_scales.grad.isfinite().all()
    with pytest.raises(InputError, match="must have one shape"):
        discretized_gaussian_log_likelihood(x, means=means[:3], log_scales=log_scales)


def test_the_bound_of_a_perfect_network_is_all_decoder():
    diffusion = create_diffusion(steps=100, sigma_small=True, predict_xstart=True)
    x_start = GREY_LEVELS[torch.randint(256, (3, 1, 6, 6))].float()
    terms = diffusion.calc_bpd_loop(lambda x, t: x_start, x_start)
    assert terms["vb"].shape == (3, 100)
    assert terms["vb"][:, :-1].abs().max() < 1e-5
    assert (terms["vb"][:, -1] > 0).all()
    assert terms["xstart_mse"].max() == 0 and terms["mse"].max() < 1e-4
    torch.testing.assert_close(
        terms["total_bpd"], terms["prior_bpd"] + terms["vb"].sum(dim=1), rtol=1e-6, atol=0
    )


@pytest.mark.seconds
def test_the_bound_is_tight_where_the_reverse_process_is_known():
    # Pixels N(0, ¼²): the reverse process is Gaussian, its mean and variance known, so the bound
    # is the data's own likelihood but for the rounding to grey levels.
    diffusion = GaussianDiffusion(linear_betas(100), var_type="learned")
    signal = torch.from_numpy(diffusion.alphas_cumprod)
    spread = 1 / 16 * (1 - signal) / (1 - signal + signal / 16)  # Var(x_0 | x_t)
    coef1, least = (
        torch.from_numpy(table)
        for table in (diffusion.posterior_mean_coef1, diffusion.posterior_variance)
    )
    log_variance = torch.log(least + coef1**2 * spread)

    def exact(x, t):
        alpha_bar, log_var = (table[t.long()].view(-1, 1) for table in (signal, log_variance))
        eps = (1 - alpha_bar).sqrt() * x / (1 - alpha_bar + alpha_bar / 16)
        return torch.cat([eps, log_var.expand(x.shape)], dim=1)

    pixels = gaussian(16, 2000, dtype=torch.float64) / 4
    x_start = ((pixels + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    terms = diffusion.calc_bpd_loop(exact, x_start, clip_denoised=False, generator=generator)
    edges = np.concatenate([[-np.inf], GREY_LEVELS[1:].numpy() - 1 / 255, [np.inf]])
    log_p = np.log2(np.diff(stats.norm(0, 0.25).cdf(edges)))
    exact_bits = -log_p[((x_start + 1) * 127.5).round().long().numpy()].mean()
    summary = summarize_bpd(terms)
    assert summary.total_stderr < 0.02
    assert abs(summary.total - exact_bits) < 4 * summary.total_stderr


def test_likelihood_clips_by_default_and_can_leave_it():
    diffusion = create_diffusion(steps=30)
    x_start, z = images(2, 3, 4), gaussian(2, 3, 4)
    model_ = lambda x, t: torch.zeros_like(x)  # noqa: E731
    clipped = diffusion.calc_bpd_loop(model_, x_start, noise=z)
    free = diffusion.calc_bpd_loop(model_, x_start, False, noise=z)
    assert (free["xstart_mse"] > clipped["xstart_mse"]).any()
    assert not torch.equal(free["vb"], clipped["vb"])


def test_noise_may_be_a_callable_of_the_step_or_come_from_a_generator():
    diffusion = create_diffusion(steps=30, timestep_respacing="5")
    x_start = images(2, 3, 4)
    asked = []

    def noise(i):
        asked.append(i)
        return gaussian(2, 3, 4, seed=i)

    a = diffusion.calc_bpd_loop(model, x_start, noise=noise)
    assert asked == [4, 3, 2, 1, 0]
    for j, i in enumerate(asked):
        x_t = diffusion.q_sample(x_start, torch.tensor([i, i]), gaussian(2, 3, 4, seed=i))
        vb, _ = vb_terms_bpd(diffusion, model, x_start, x_t, torch.tensor([i, i]))
        assert torch.equal(a["vb"][:, j], vb)
    one, two = (
        diffusion.calc_bpd_loop(model, x_start, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(one["vb"], two["vb"])
    torch.manual_seed(1)
    assert torch.equal(diffusion.calc_bpd_loop(model, x_start)["vb"], one["vb"])


def test_likelihood_records_no_gradients():
    weight = torch.ones((), requires_grad=True)
    terms = create_diffusion(steps=30).calc_bpd_loop(lambda x, t: weight * x, images(2, 3))
    assert not any(value.requires_grad for value in terms.values())


def test_the_prior_term_is_the_kl_from_the_unit_gaussian():
    diffusion = GaussianDiffusion(linear_betas(50))
    x_start = images(3, 2, 5, dtype=torch.float64)
    last = diffusion.alphas_cumprod[-1]
    squared = last * x_start.numpy() ** 2
    expected = 0.5 * (squared + (1 - last) - 1 - np.log(1 - last)).mean(axis=(1, 2)) / np.log(2)
    assert diffusion.prior_bpd(x_start).numpy() == pytest.approx(expected, rel=1e-9)


def batches():
    diffusion = create_diffusion(steps=200, timestep_respacing="12")
    return [diffusion.calc_bpd_loop(model, images(n, 3, 4, 4, seed=n)) for n in (5, 3)]


def test_the_summary_averages_over_all_images():
    parts = batches()
    summary = summarize_bpd(parts)
    total = torch.cat([part["total_bpd"] for part in parts]).double().numpy()
    assert summary.count == 8
    assert summary.total == pytest.approx(total.mean())
    assert summary.total_stderr == pytest.approx(total.std(ddof=1) / math.sqrt(8))
    assert summary.total == pytest.approx(summary.prior + summary.rate + summary.decoder, rel=1e-6)
    vb = torch.cat([part["vb"] for part in parts]).double().numpy()
    assert summary.decoder == pytest.approx(vb[:, -1].mean())
    assert summary.rate_stderr == pytest.approx(vb[:, :-1].sum(1).std(ddof=1) / math.sqrt(8))
    # Step t stands at index t, though the loop runs from the noisiest down.
    assert summary.vb[0] == pytest.approx(summary.decoder)
    assert summary.vb == pytest.approx(vb.mean(0)[::-1])
    single = summarize_bpd({name: value[:1] for name, value in parts[0].items()})
    assert single.count == 1 and math.isnan(single.total_stderr)


def test_rate_distortion_counts_bits_received_against_grey_levels_missed():
    parts = batches()
    table, summary = rate_distortion(parts), summarize_bpd(parts)
    assert table.timestep.tolist() == [*range(11, -1, -1), -1]
    # With only x_T the prior has been paid; before the last step everything but the decoder.
    assert table.rate[0] == pytest.approx(summary.prior, rel=1e-6)
    assert table.rate[-2] == pytest.approx(summary.prior + summary.rate, rel=1e-6)
    assert table.rate[-1] == pytest.approx(summary.total, rel=1e-6)
    assert (np.diff(table.rate) >= 0).all()
    assert table.distortion[:-1] == pytest.approx(127.5 * np.sqrt(summary.xstart_mse[::-1]))
    assert table.distortion[-1] == 0


@pytest.mark.seconds
def test_a_gaussian_is_coded_at_its_rate_distortion_function():
    # Pixels N(0, 1) and the exact reverse process: what was received of x_0 is its information in
    # x_t, ½ log2 1/(1 − ᾱ), and what is missed 1 − ᾱ, so D = 2^(−2R), Shannon's own bound.
    diffusion = GaussianDiffusion(np.linspace(0.01, 0.4, 20), var_type="learned")
    signal = torch.from_numpy(diffusion.alphas_cumprod)
    spread = torch.from_numpy(diffusion.posterior_mean_coef1) ** 2 * (1 - signal)
    log_variance = torch.log(torch.from_numpy(diffusion.posterior_variance) + spread)

    def exact(x, t):
        alpha_bar, log_var = (table[t.long()].view(-1, 1) for table in (signal, log_variance))
        return torch.cat([(1 - alpha_bar).sqrt() * x, log_var.expand(x.shape)], dim=1)

    x_start = gaussian(4, 40_000, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    terms = diffusion.calc_bpd_loop(exact, x_start, clip_denoised=False, generator=generator)
    table = rate_distortion(terms)
    left = 1 - diffusion.alphas_cumprod[::-1]
    assert table.rate[:-1] == pytest.approx(0.5 * np.log2(1 / left), rel=0.01, abs=2e-3)
    assert table.distortion[:-1] == pytest.approx(127.5 * np.sqrt(left), rel=0.01)
    assert table.distortion[:-1] == pytest.approx(127.5 * 2 ** -table.rate[:-1], rel=0.01)


def test_distortion_is_in_grey_levels():
    diffusion = create_diffusion(steps=30, predict_xstart=True)
    x_start = GREY_LEVELS[torch.randint(20, 230, (4, 1, 5, 5))]
    terms = diffusion.calc_bpd_loop(lambda x, t: x_start + 3 / 127.5, x_start)
    assert rate_distortion(terms).distortion == pytest.approx([3.0] * 30 + [0.0])


def test_results_of_something_else_are_an_error():
    with pytest.raises(InputError, match="'total_bpd' is missing.*calc_bpd_loop"):
        summarize_bpd({"loss": torch.zeros(3)})


def test_nothing_to_average_is_an_error():
    empty = {name: value[:0] for name, value in batches()[0].items()}
    for nothing in ([], [empty]):
        for function in (summarize_bpd, rate_distortion):
            with pytest.raises(InputError, match="no images to average"):
                function(nothing)
