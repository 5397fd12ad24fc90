"""Spacings of steps other than the published sections, and processes over any timesteps."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.checkpoints.config import process_from_config
from fastdiff.errors import InputError
from fastdiff.methods.protocol import noise_levels
from fastdiff.process.edm import EDM
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.process.respacing import STEP_SPACINGS, space_timesteps, spaced_timesteps
from fastdiff.process.schedules import get_named_beta_schedule, rescale_zero_terminal_snr
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas

PROCESSES = {
    "linear": create_diffusion(steps=1000),
    "cosine": create_diffusion(steps=300, noise_schedule="cosine"),
    "ve": VarianceExploding(geometric_sigmas(200), conditioning="log_sigma"),
    "edm": EDM(200),
    "zero terminal SNR": create_diffusion(steps=100, mean_type="v", zero_terminal_snr=True),
}


def log_snr(process):
    signal, noise = noise_levels(process)
    with np.errstate(divide="ignore"):
        return np.log(signal / noise)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(PROCESSES)), spacing=st.sampled_from(STEP_SPACINGS), data=st.data()
)
def test_a_spacing_is_as_many_distinct_ascending_timesteps(name, spacing, data):
    process = PROCESSES[name]
    total = process.num_timesteps
    steps = data.draw(st.one_of(st.integers(1, min(20, total)), st.integers(1, total)))
    chosen = spaced_timesteps(process, steps, spacing)
    assert all(type(step) is int for step in chosen) and len(chosen) == steps
    assert (np.diff(chosen) > 0).all() and 0 <= chosen[0] and chosen[-1] < total
    if steps == total:
        assert chosen == list(range(total))
    if spacing in ("trailing", "logsnr"):  # sampling starts from the noisiest step
        assert chosen[-1] == total - 1
    if spacing == "logsnr" and steps > 2:
        assert chosen[0] == 0
    if spacing != "logsnr":  # the others know no noise levels
        assert chosen == spaced_timesteps(np.int64(total), np.int64(steps), spacing)


def test_uniform_is_space_timesteps():
    for sections in (7, "7", "10,5", [10, 5], "ddim50", ""):
        assert spaced_timesteps(100, sections, "uniform") == space_timesteps(100, sections)


def test_quadratic_is_ddims():
    expected = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), 20) ** 2]
    assert spaced_timesteps(1000, 20, "quadratic") == expected
    assert expected[:4] == [0, 2, 8, 19] and expected[-1] == 800
    # 0, 0.2, 0.9, 2, 3.6, …: the second moves up from 0, the third up from there
    assert spaced_timesteps(1000, 60, "quadratic")[:5] == [0, 1, 2, 3, 4]
    assert spaced_timesteps(10, 9, "quadratic") == list(range(9))


def test_trailing_counts_back_from_the_last_step():
    assert spaced_timesteps(1000, 4, "trailing") == [249, 499, 749, 999]
    assert spaced_timesteps(10, 4, "trailing") == [1, 4, 7, 9]  # 2.5, 5, 7.5, 10: half to even


@pytest.mark.parametrize("name", PROCESSES)
def test_logsnr_is_even_in_log_snr(name):
    process = PROCESSES[name]
    values = log_snr(process)
    chosen = spaced_timesteps(process, 5, "logsnr")
    # Without signal λ is −∞: that step is taken, and the spread is over the other four.
    finite = [t for t in chosen if np.isfinite(values[t])]
    assert len(finite) == (4 if name == "zero terminal SNR" else 5)
    wanted = np.linspace(values[finite[0]], values[finite[-1]], len(finite))
    assert finite == [int(np.abs(values - w).argmin()) for w in wanted]
    assert chosen[0] == 0 and chosen[-1] == process.num_timesteps - 1
    spread = np.diff(values[finite])
    uniform = np.diff(values[spaced_timesteps(process, 5, "uniform")[: len(finite)]])
    assert np.ptp(spread) <= np.ptp(uniform)
    if name == "ve":  # geometric noise levels are even in log SNR themselves
        assert np.abs(np.array(chosen) - np.linspace(0, 199, 5)).max() <= 0.5


def test_logsnr_where_the_levels_are_sparse_takes_neighbours():
    """λ falls fast at both ends of these levels: what would be taken twice moves inwards."""
    process = GaussianDiffusion(get_named_beta_schedule("cosine", 50))
    values = log_snr(process)
    wanted = np.linspace(values[0], values[-1], 30)
    nearest = [int(np.abs(values - w).argmin()) for w in wanted]
    assert len(set(nearest)) < 30
    chosen = spaced_timesteps(process, 30, "logsnr")
    assert len(set(chosen)) == 30 and (chosen[0], chosen[-1]) == (0, 49)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(PROCESSES)), data=st.data())
def test_any_list_of_timesteps_makes_a_process_with_those_levels(name, data):
    process = PROCESSES[name]
    total = process.num_timesteps
    chosen = sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1, max_size=12)))
    respaced = process.respace(timesteps=chosen)
    assert respaced.timestep_map.tolist() == chosen and respaced.original_num_steps == total
    for mine, whole in zip(noise_levels(respaced), noise_levels(process), strict=True):
        # Of squares: ᾱ is kept as 1 − β, which leaves a small one an absolute error of 1e-16.
        np.testing.assert_allclose(mine**2, whole[chosen] ** 2, rtol=1e-10, atol=1e-15)
    assert (respaced.model_timesteps == process.model_timesteps[chosen]).all()
    kinds = (np.array(chosen), torch.tensor(chosen), [float(step) for step in chosen])
    alike = [process.respace(timesteps=timesteps) for timesteps in kinds]
    for same in (*alike, respaced.respace("")):
        assert same.timestep_map.dtype == np.int64
        assert (same.timestep_map == respaced.timestep_map).all()
        assert (same.noise_scale == respaced.noise_scale).all()


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(set(PROCESSES) - {"zero terminal SNR"})), data=st.data())
def test_any_list_of_fractions_makes_a_process_with_the_levels_there(name, data):
    process = PROCESSES[name]
    total = process.num_timesteps
    steps = data.draw(st.sets(st.integers(0, 8 * (total - 1)), min_size=1, max_size=12))
    chosen = [step / 8 for step in sorted(steps)]
    respaced = process.respace(timesteps=chosen)
    np.testing.assert_allclose(respaced.timestep_map, chosen, rtol=1e-11, atol=1e-11)
    below = np.floor(chosen).astype(int)
    above = np.minimum(below + 1, total - 1)
    values = log_snr(respaced)
    slack = 1e-11 / respaced.noise_scale.min() ** 2
    assert (log_snr(process)[below] + slack >= values).all()
    assert (values >= log_snr(process)[above] - slack).all()
    # A fraction between two of a strided process's steps is one of the unstrided timesteps.
    strided = process.respace(timesteps=[0, 50])
    between = strided.respace(timesteps=[0, 0.5]).timestep_map
    np.testing.assert_allclose(between, [0, 25], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(
    "choice",
    [
        {"sections": 10},
        {"sections": 10, "spacing": "quadratic"},
        {"sections": 10, "spacing": "trailing"},
        {"sections": 10, "spacing": "logsnr"},
        {"timesteps": [0, 3, 4, 60, 99]},
    ],
    ids=str,
)
def test_the_config_of_a_respaced_process_is_that_process(name, choice):
    process = PROCESSES[name]
    respaced = process.respace(**choice)
    if "sections" in choice:
        expected = spaced_timesteps(process, choice["sections"], choice.get("spacing", "uniform"))
        assert respaced.timestep_map.tolist() == expected
    config = json.loads(json.dumps(respaced.to_config()))
    for again in (process_from_config(config), process_from_config(config).respace("")):
        assert again.timestep_map.tolist() == respaced.timestep_map.tolist()
        assert again.model_timesteps.tolist() == respaced.model_timesteps.tolist()
        assert again.original_num_steps == process.num_timesteps
        for mine, other in zip(noise_levels(again), noise_levels(respaced), strict=True):
            assert (mine == other).all()
    # Only sections have a name in create_diffusion's options, and keep the short config.
    if isinstance(process, GaussianDiffusion):
        assert ("betas" in config) == (choice != {"sections": 10})
        assert process_from_config(config).to_config() == config


def test_a_respaced_process_samples_the_chosen_timesteps():
    seen = []

    def network(x, t):
        seen.append(int(t[0]))
        return torch.zeros_like(x)

    PROCESSES["linear"].respace(timesteps=[2, 5, 900]).p_sample_loop(network, (1, 1))
    assert seen == [900, 5, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (10, 5, "quad"),
            "spacing is 'quad'; expected one of uniform, quadratic, trailing, logsnr, karras, ",
        ),
        ((10, 5, None), "spacing is None; expected one of"),
        ((10, 5, "logsnr"), "spacing 'logsnr' needs noise levels, got 10 steps"),
        (
            (10, "5,5", "trailing"),
            "spacing 'trailing' takes a number of steps, an integer, got '5,5'",
        ),
        ((10, [5, 3], "quadratic"), r"an integer, got \[5, 3\]: sections belong to .*'uniform'"),
        ((10, 2.0, "quadratic"), "an integer, got 2.0"),
        ((10, None, "trailing"), "an integer, got None"),
        ((10, 0, "trailing"), "cannot choose 0 steps: expected 1 or more"),
        ((10, 11, "quadratic"), "cannot choose 11 of 10 steps"),
        ((10, -1, "trailing"), "cannot choose -1 steps"),
        ((0, 1, "trailing"), "must be at least 1, got 0"),
        ((10.0, 1, "trailing"), "a float is no diffusion process"),
    ],
)
def test_bad_spacings(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        spaced_timesteps(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["linear", "ve", "edm"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "respace needs a number of steps, sections, or timesteps: give one"),
        ({"sections": 5, "timesteps": [1]}, "give no sections or spacing"),
        ({"spacing": "logsnr", "timesteps": [1]}, "give no sections or spacing"),
        ({"sections": "5,5", "spacing": "logsnr"}, "an integer, got '5,5'"),
        ({"timesteps": []}, "timesteps is empty: give at least one"),
        ({"timesteps": [9, 5, 1]}, "must ascend strictly, but 5 comes after 9: sort them"),
        ({"timesteps": [1, 1]}, "must ascend strictly, but 1 comes after 1: .* each once"),
        ({"timesteps": [-1, 4]}, r"must lie in 0 … \d+, the steps of this process, got -1"),
        ({"timesteps": [1, 5000]}, r"must lie in 0 … \d+, the steps of this process, got 5000"),
        ({"timesteps": [1, float("nan")]}, "each of timesteps must be a finite number, got nan"),
        ({"timesteps": [1, "5"]}, "each of timesteps must be a finite number, got '5'"),
        ({"timesteps": [1, 1.5], "rounded": True}, "give no sections or spacing"),
        ({"timesteps": [1.5, 1.25]}, "must ascend strictly, but 1.25 comes after 1.5"),
        ({"timesteps": [-0.5, 4]}, r"must lie in 0 … \d+, the steps of this process, got -0.5"),
        ({"timesteps": "1,5"}, "must be a list of numbers, got '1,5'"),
        ({"timesteps": 5}, "must be a list of numbers, got 5"),
        ({"timesteps": np.eye(2)}, "each of timesteps must be a finite number"),
    ],
)
def test_bad_respacings(name, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        PROCESSES[name].respace(**arguments)
    assert "\n" not in str(caught.value)


def test_no_level_lies_next_to_a_step_without_signal():
    process = PROCESSES["zero terminal SNR"]
    assert process.respace(timesteps=[0.5, 98, 99]).alphas_cumprod[-1] == 0
    with pytest.raises(InputError, match="timestep 98.5 lies between 98 and 99, where the signal"):
        process.respace(timesteps=[0.5, 98.5])


def test_zero_terminal_snr_starts_where_no_signal_is():
    betas = rescale_zero_terminal_snr(get_named_beta_schedule("linear", 40))
    process = GaussianDiffusion(betas, mean_type="v")
    for steps in range(1, 41):
        respaced = process.respace(steps, spacing="logsnr")
        assert respaced.alphas_cumprod[-1] == 0 and respaced.num_timesteps == steps
