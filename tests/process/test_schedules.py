"""Noise schedules: their formulas, their limits, and rescaling to zero terminal SNR."""

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as diffusers_rescale
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.errors import InputError
from fastdiff.process.schedules import (
    SCHEDULES,
    const_betas,
    cosine_betas,
    get_named_beta_schedule,
    jsd_betas,
    linear_betas,
    quad_betas,
    rescale_zero_terminal_snr,
    warmup_betas,
)


@given(steps=st.integers(20, 4000), name=st.sampled_from(sorted(SCHEDULES)))
def test_every_schedule_gives_float64_betas_in_range(steps, name):
    betas = get_named_beta_schedule(name, steps)
    assert betas.shape == (steps,) and betas.dtype == np.float64
    assert (betas > 0).all() and (betas <= 1).all()
    assert (np.diff(betas) >= -1e-15).all()


def test_linear_is_the_ddpm_schedule_at_1000_steps_and_keeps_its_noise_at_others():
    betas = linear_betas(1000)
    assert betas[[0, -1]] == pytest.approx([1e-4, 0.02], rel=1e-12)
    assert linear_betas(4000).sum() == pytest.approx(betas.sum(), rel=1e-12)


def test_cosine_follows_the_cosine_and_stops_at_max_beta():
    betas = cosine_betas(1000)
    alphas_cumprod = np.cumprod(1 - betas)
    u = np.arange(1, 1001) / 1000
    angle = (np.append(0, u) + 0.008) / 1.008 * math.pi / 2
    expected = np.cos(angle[1:]) ** 2 / np.cos(angle[0]) ** 2
    assert alphas_cumprod[:-1] == pytest.approx(expected[:-1], rel=1e-9)
    assert betas[-1] == 0.999
    assert cosine_betas(1000, max_beta=0.5).max() == 0.5
    assert cosine_betas(1000, s=0.1)[0] > betas[0]


def test_the_schedules_of_the_first_ddpm_code():
    assert np.sqrt(quad_betas(1000)) == pytest.approx(np.linspace(0.01, math.sqrt(0.02), 1000))
    assert (const_betas(100) == 0.02).all()
    assert jsd_betas(4) == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    assert np.cumprod(1 - jsd_betas(100)) == pytest.approx(np.arange(99, -1, -1) / 100)
    for name, rising in (("warmup10", 100), ("warmup50", 500)):
        betas = get_named_beta_schedule(name, 1000)
        assert betas[:rising] == pytest.approx(np.linspace(1e-4, 0.02, rising))
        assert (betas[rising:] == 0.02).all()
        assert (warmup_betas(1000, rising / 1000) == betas).all()


def test_zero_terminal_snr_keeps_the_first_signal_and_ends_without_any():
    betas = linear_betas(1000)
    rescaled = rescale_zero_terminal_snr(betas)
    alphas_cumprod = np.cumprod(1 - rescaled)
    assert rescaled[-1] == 1.0 and alphas_cumprod[-1] == 0.0
    assert rescaled[0] == pytest.approx(betas[0], rel=1e-9)
    # √ᾱ is moved and stretched, nothing else: its differences keep their proportions.
    before, after = np.sqrt(np.cumprod(1 - betas)), np.sqrt(alphas_cumprod)
    ratio = np.diff(after) / np.diff(before)
    assert ratio == pytest.approx(np.full(999, ratio[0]), rel=1e-6)


def test_zero_terminal_snr_agrees_with_diffusers():
    betas = cosine_betas(400)
    expected = diffusers_rescale(torch.from_numpy(betas)).numpy()
    assert rescale_zero_terminal_snr(betas) == pytest.approx(expected, rel=1e-9)


def test_zero_terminal_snr_leaves_a_schedule_that_has_it():
    assert rescale_zero_terminal_snr(jsd_betas(50)) == pytest.approx(jsd_betas(50))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_named_beta_schedule("linaer", 10), "unknown noise schedule 'linaer'.*linear"),
        (lambda: linear_betas(0), "at least 1, got 0"),
        (lambda: cosine_betas(2.5), "must be an integer, got 2.5"),
        (lambda: linear_betas(19), "at least 20 steps, got 19"),
        (lambda: cosine_betas(10, max_beta=2), r"max_beta must lie in \(0, 1\]"),
        (lambda: cosine_betas(10, s=-1), "s must not be negative"),
        (lambda: const_betas(10, 0.0), r"betas must lie in \(0, 1\]"),
        (lambda: quad_betas(10, 1e-4, 3), r"betas must lie in \(0, 1\]"),
        (lambda: warmup_betas(10, 1.5), r"fraction must lie in \[0, 1\]"),
        (lambda: rescale_zero_terminal_snr([0.1]), "at least 2 steps"),
        (lambda: rescale_zero_terminal_snr("linear"), "array of numbers, got str"),
        (lambda: rescale_zero_terminal_snr([1.0, 0.1]), "leave signal until the last step"),
        (lambda: rescale_zero_terminal_snr([0.1, 1.0, 0.1]), "leave signal until the last step"),
        (lambda: rescale_zero_terminal_snr([0.1, 1e-20]), "lose some after the first"),
        (lambda: cosine_betas(10, s="0"), "s must not be negative"),
        (lambda: get_named_beta_schedule(["linear"], 10), "unknown noise schedule"),
        (lambda: rescale_zero_terminal_snr([0.1, 1.2]), r"betas must lie in \(0, 1\]"),
    ],
)
def test_bad_arguments_get_one_line(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
