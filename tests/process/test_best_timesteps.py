"""best_timesteps against every other choice, against calc_bpd_loop and against a closed form."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import GaussianDiffusion, InputError, VarianceExploding, best_timesteps
from fastdiff.methods.levels import VAR_TYPES
from fastdiff.methods.protocol import noise_levels
from fastdiff.process.likelihood import summarize_bpd
from fastdiff.process.respacing import spaced_timesteps
from fastdiff.process.schedules import get_named_beta_schedule, rescale_zero_terminal_snr
from fastdiff.process.variance_exploding import geometric_sigmas


def strides(process, mse):
    """The KL terms of a process's own steps but the first, nats per dimension, from the variances
    and the coefficient that the posterior has by definition (Ho et al. 2020 eq. 6-7)."""
    signal, noise = noise_levels(process)
    shrink = signal[1:] / signal[:-1]
    transition = noise[1:] ** 2 - (shrink * noise[:-1]) ** 2
    posterior = transition * (noise[:-1] / noise[1:]) ** 2
    coef1 = signal[:-1] * transition / noise[1:] ** 2
    variance = transition if process.var_type == "fixed_large" else posterior
    ratio = posterior / variance
    return 0.5 * (ratio - 1 - np.log(ratio) + coef1**2 * mse[1:] / variance)


def bound(process, timesteps, mse):
    return strides(process.respace(timesteps=timesteps), mse[timesteps]).sum()


def gaussian_mse(process, variance):
    """Of E[x_0 | x_t], the best network, for Gaussian data of that variance in each dimension."""
    signal, noise = noise_levels(process)
    return variance / (1 + variance * (signal / noise) ** 2)


def cosine(steps, **types):
    return GaussianDiffusion(get_named_beta_schedule("cosine", steps), **types)


@st.composite
def processes(draw):
    total = draw(st.integers(2, 9))
    if draw(st.booleans()):
        betas = draw(st.lists(st.floats(1e-4, 0.9), min_size=total, max_size=total))
        return GaussianDiffusion(betas, var_type=draw(st.sampled_from(VAR_TYPES)))
    factors = draw(st.lists(st.floats(1.05, 5.0), min_size=total, max_size=total))
    var_type = draw(st.sampled_from(["fixed_small", "fixed_large"]))
    return VarianceExploding(0.01 * np.cumprod(factors), var_type=var_type)


@pytest.mark.seconds
@settings(max_examples=100, deadline=None)
@given(process=processes(), data=st.data())
def test_no_other_choice_has_a_smaller_bound(process, data):
    total = process.num_timesteps
    mse = st.lists(st.floats(1e-6, 2.0), min_size=total, max_size=total)
    mse = np.array(data.draw(mse.filter(lambda values: values[0] <= values[-1])))
    for steps in range(2, total + 1):
        chosen = best_timesteps(process, steps, mse)
        assert len(chosen) == steps and all(type(step) is int for step in chosen)
        assert (chosen[0], chosen[-1]) == (0, total - 1) and (np.diff(chosen) > 0).all()
        least = min(
            bound(process, [0, *between, total - 1], mse)
            for between in combinations(range(1, total - 1), steps - 2)
        )
        assert bound(process, chosen, mse) == pytest.approx(least, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("var_type", ["fixed_small", "fixed_large"])
def test_what_is_minimised_is_what_calc_bpd_loop_measures(var_type):
    """Per image: the errors of the whole process give the bound of any respaced one."""
    process = cosine(12, var_type=var_type, mean_type="x_start")
    x_start = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(1)).double()

    def measure(diffusion):
        return diffusion.calc_bpd_loop(
            lambda x, t: torch.tanh(x),
            x_start,
            clip_denoised=False,
            noise=lambda i: noise[diffusion.timestep_map[i]],
        )

    whole = measure(process)
    for chosen in ([0, 3, 11], [0, 1, 2, 7, 11], list(range(12))):
        found = measure(process.respace(timesteps=chosen))
        for image in range(3):
            mse = whole["xstart_mse"][image].flip(0).numpy()
            kl = found["vb"][image, :-1].sum().item() * np.log(2)  # the last is the decoder's
            assert bound(process, chosen, mse) == pytest.approx(kl, rel=1e-9)

    # So the choice it makes has the least measured bound, whichever form the errors come in.
    by_image = best_timesteps(process, 4, whole["xstart_mse"])
    assert by_image == best_timesteps(process, 4, whole["xstart_mse"].numpy())
    assert by_image == best_timesteps(process, 4, summarize_bpd(whole).xstart_mse)
    rates = {
        between: measure(process.respace(timesteps=[0, *between, 11]))["vb"][:, :-1].sum(1).mean()
        for between in combinations(range(1, 11), 2)
    }
    assert by_image == [0, *min(rates, key=rates.get), 11]


@pytest.mark.parametrize("variance", [0.05, 1.0])
@pytest.mark.parametrize("steps", [3, 5, 10])
def test_gaussian_data_has_a_closed_form(variance, steps):
    """With the best network, ½·Σ (SNR_s − SNR_t)·mse_t = ½·Σ ((1 + v·SNR_s)/(1 + v·SNR_t) − 1): the
    best 1 + v·SNR are in geometric progression, which a fine process comes near."""
    snr = np.geomspace(1e4, 1e-3, 1000)
    alphas_cumprod = snr / (1 + snr)
    process = GaussianDiffusion(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))
    mse = gaussian_mse(process, variance)
    chosen = best_timesteps(process, steps, mse)
    ends = 1 + variance * snr[[0, -1]]
    exact = 0.5 * (steps - 1) * ((ends[0] / ends[1]) ** (1 / (steps - 1)) - 1)
    found = bound(process, chosen, mse)
    assert exact * (1 - 1e-9) <= found < 1.002 * exact
    wanted = np.geomspace(*ends, steps)
    place = np.interp(-np.log(wanted), -np.log(1 + variance * snr), np.arange(len(snr)))
    assert np.abs(place - chosen).max() <= 1.5  # of a thousand
    uniform = spaced_timesteps(process, steps, "uniform")
    assert bound(process, uniform, mse) > 1.01 * exact  # it is no flat minimum


@settings(max_examples=40, deadline=None)
@given(
    process=st.sampled_from(
        [
            cosine(200),
            cosine(200, var_type="fixed_large"),
            cosine(150, var_type="learned_range"),
            GaussianDiffusion(get_named_beta_schedule("linear", 250), var_type="fixed_large"),
            GaussianDiffusion(
                rescale_zero_terminal_snr(get_named_beta_schedule("linear", 100)), mean_type="v"
            ),
            VarianceExploding(geometric_sigmas(120), var_type="fixed_large"),
        ]
    ),
    steps=st.integers(2, 40),
    variance=st.floats(0.01, 2.0),
    excess=st.floats(0.0, 0.5),
    seed=st.integers(0, 9),
)
def test_no_spacing_has_a_smaller_bound(process, steps, variance, excess, seed):
    rise = np.random.default_rng(seed).uniform(0, excess, process.num_timesteps).cumsum()
    mse = gaussian_mse(process, variance) * (1 + rise)
    least = bound(process, best_timesteps(process, steps, mse), mse)
    for spacing in ("uniform", "quadratic", "logsnr", "trailing"):
        other = spaced_timesteps(process, steps, spacing)
        other = [0, *other[1:-1], process.num_timesteps - 1]  # the prior's and decoder's terms
        assert least <= bound(process, other, mse) * (1 + 1e-9) + 1e-12


def test_all_steps_and_single_ones():
    process = cosine(30)
    mse = gaussian_mse(process, 1.0)
    assert best_timesteps(process, 30, mse) == list(range(30))
    assert best_timesteps(process, np.int64(2), mse) == [0, 29]
    assert best_timesteps(cosine(1), 1, [0.5]) == [0]
    assert fastdiff.best_timesteps is best_timesteps


def test_many_steps_cross_the_blocks():
    """More steps than are searched at a time: the same programme, written as its formula."""
    process = cosine(100, var_type="fixed_large")
    mse = gaussian_mse(process, 0.3)
    pairs = {
        (s, t): bound(process, [s, t], mse) for s, t in combinations(range(100), 2) if t - s <= 50
    }
    best = {0: (0.0, [0])}
    for _ in range(9):
        best = {
            t: min((best[s][0] + pairs[s, t], [*best[s][1], t]) for s in best if (s, t) in pairs)
            for t in range(1, 100)
            if any((s, t) in pairs for s in best)
        }
    chosen = best_timesteps(process, 10, mse)
    assert np.diff(chosen).max() < 50
    assert bound(process, chosen, mse) == pytest.approx(best[99][0], rel=1e-9)


RISING = np.linspace(0.1, 1.0, 10)


@pytest.mark.parametrize(
    "steps, mse, message",
    [
        (1, RISING, r"cannot choose 1 of 10 steps: expected 2 … 10 \(both ends are kept\)"),
        (0, RISING, "cannot choose 0 of 10 steps"),
        (11, RISING, "cannot choose 11 of 10 steps"),
        ("5", RISING, "steps must be an integer, got '5'"),
        (2.0, RISING, "steps must be an integer, got 2.0"),
        (5, RISING[:9], r"xstart_mse has shape \(9,\); expected \(10,\) or \(N, 10\)"),
        (5, np.ones((10, 9)), r"shape \(10, 9\); expected .* calc_bpd_loop of this very process"),
        (5, np.ones((2, 3, 10)), r"shape \(2, 3, 10\)"),
        (5, np.ones((0, 10)), r"shape \(0, 10\)"),
        (5, 0.5, r"shape \(\)"),
        (5, "mse", "must be an array of numbers"),
        (5, [[1.0], [1.0, 2.0]], "must be an array of numbers"),
        (5, np.where(RISING > 0.5, np.nan, RISING), "must be finite and not negative"),
        (5, RISING - 0.2, "must be finite and not negative"),
        (5, RISING[::-1], r"xstart_mse falls, from 1 at the least noisy step to 0.1"),
        (5, torch.tensor(RISING).expand(3, 10), "falls, from 1 .* as calc_bpd_loop returns it"),
    ],
)
def test_bad_arguments(steps, mse, message):
    with pytest.raises(InputError, match=message) as caught:
        best_timesteps(cosine(10), steps, mse)
    assert "\n" not in str(caught.value)


def test_no_process():
    with pytest.raises(InputError, match="a list is no diffusion process"):
        best_timesteps([0.1, 0.2], 2, [0.5, 0.6])
