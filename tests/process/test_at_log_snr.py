"""Processes over noise levels between the steps: their levels, and what the network is given."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.checkpoints.config import process_from_config
from fastdiff.errors import InputError
from fastdiff.methods.levels import Levels, Source
from fastdiff.methods.protocol import noise_levels
from fastdiff.process.between import log_snr
from fastdiff.process.edm import EDM, karras_sigmas
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.process.schedules import linear_betas
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas

PROCESSES = {
    "linear": create_diffusion(steps=1000),
    "cosine, rescaled": create_diffusion(
        steps=300, noise_schedule="cosine", rescale_timesteps=True, mean_type="v"
    ),
    "learned": create_diffusion(steps=100, learn_sigma=True),
    "ve by index": VarianceExploding(geometric_sigmas(200)),
    "ve by sigma": VarianceExploding([0.01, 0.5, 0.7, 9.0], conditioning="log_sigma"),
    "edm": EDM(200, rho=5.0, sigma_max=30.0),
    "zero terminal SNR": create_diffusion(steps=100, mean_type="v", zero_terminal_snr=True),
}


def finite(process):
    levels = log_snr(process)
    return levels[np.isfinite(levels)]


@st.composite
def processes(draw):
    """A process and 1 to 8 of its λ, none closer than 1e-3, in any order."""
    process = PROCESSES[draw(st.sampled_from(sorted(PROCESSES)))]
    most, least = finite(process)[[0, -1]]
    places = draw(st.sets(st.integers(0, 1000), min_size=1, max_size=8))
    return process, draw(st.permutations([most + p / 1000 * (least - most) for p in places]))


@settings(max_examples=100, deadline=None)
@given(processes())
def test_the_levels_are_those_asked_for(drawn):
    process, values = drawn
    made = process.at_log_snr(values)
    assert type(made) is type(process) and made.num_timesteps == len(values)
    assert made.original_num_steps == process.num_timesteps
    # Of ᾱ, kept as products of 1 − β: K roundings of 2^-53, which λ divides by 2·(1 − ᾱ).
    room = (len(values) + 4) * 2.0**-52
    signal, noise = noise_levels(made)
    expected = np.sort(values)[::-1]
    np.testing.assert_allclose(
        log_snr(made), expected, rtol=1e-14, atol=room / (noise * np.minimum(signal, 1)).min() ** 2
    )
    assert made.prior_std == (1.0 if isinstance(process, GaussianDiffusion) else noise[-1])
    config = json.loads(json.dumps(made.to_config()))
    again = process_from_config(config)
    assert again.to_config() == config
    for name in ("signal_scale", "noise_scale", "model_timesteps", "timestep_map", "input_scale"):
        assert np.array_equal(getattr(again, name), getattr(made, name)), name


@settings(max_examples=50, deadline=None)
@given(processes(), st.data())
def test_a_strided_process_remembers_the_whole(drawn, data):
    process, values = drawn
    total = process.num_timesteps
    kept = data.draw(st.sets(st.integers(0, total - 1), min_size=1, max_size=4))
    whole = process.at_log_snr(values)
    strided = process.respace(timesteps=sorted(kept))
    read = process_from_config(json.loads(json.dumps(strided.to_config())))
    between = process.at_log_snr(values[:1])
    for coarse in (strided, read, between, strided.respace(1)):
        made = coarse.at_log_snr(values)
        for name in ("noise_scale", "timestep_map", "model_timesteps"):
            assert np.array_equal(getattr(made, name), getattr(whole, name)), name


@pytest.mark.parametrize("name", PROCESSES)
def test_at_its_own_levels_it_is_the_process(name):
    process = PROCESSES[name]
    made = process.at_log_snr(log_snr(process)[::-1])
    np.testing.assert_allclose(made.timestep_map, process.timestep_map, rtol=1e-13, atol=1e-13)
    assert np.abs(made.model_timesteps - process.model_timesteps).max() <= 6e-5  # float32, to 1,000
    for mine, own in zip(noise_levels(made), noise_levels(process), strict=True):
        np.testing.assert_allclose(mine**2, own**2, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(made.input_scale, process.input_scale, rtol=1e-13)


def test_log_snr_is_linear_between_two_steps():
    process = PROCESSES["linear"]
    levels = log_snr(process)
    made = process.at_log_snr([0.25 * levels[30] + 0.75 * levels[31], levels[999]])
    np.testing.assert_allclose(made.timestep_map, [30.75, 999], rtol=1e-12)
    assert made.model_timesteps.tolist() == [30.75, 999]
    rescaled = create_diffusion(steps=500, rescale_timesteps=True)
    mean = log_snr(rescaled)[[40, 41]].mean()
    assert rescaled.at_log_snr([mean]).model_timesteps.tolist() == pytest.approx([81.0], rel=1e-6)


def test_the_timesteps_are_diffusers():
    """EulerDiscreteScheduler._sigma_to_t of diffusers 0.42.1, with DDPM's linear schedule in
    float64."""
    made = PROCESSES["linear"].at_log_snr(-np.log([0.0123, 0.3, 1.0, 14.6, 150.0]))
    recorded = [0.5251840001006723, 87.58042108669325, 258.09301969495516]
    recorded += [726.7528138630919, 994.2192575073329]
    np.testing.assert_allclose(made.timestep_map, recorded, rtol=1e-11)


def test_edm_is_in_closed_form():
    process = EDM(50, sigma_data=0.7)
    sigmas = np.array([0.003, 0.2, 79.0])
    made = process.at_log_snr(-np.log(sigmas))
    np.testing.assert_allclose(made.sigmas, sigmas, rtol=1e-13)
    np.testing.assert_allclose(made.model_timesteps, np.log(sigmas) / 4, rtol=1e-6)
    np.testing.assert_allclose(made.input_scale, 1 / np.hypot(sigmas, 0.7), rtol=1e-13)
    # Karras et al. 2022, eq. 5: 99 steps have a level amid each two of 50.
    finer = karras_sigmas(99)
    np.testing.assert_allclose(process.at_log_snr(-np.log(finer)).timestep_map, np.arange(99) / 2)


def test_variance_exploding_is_in_closed_form():
    sigmas = np.array([0.02, 0.6, 8.0])
    by_sigma = PROCESSES["ve by sigma"].at_log_snr(-np.log(sigmas))
    np.testing.assert_allclose(by_sigma.sigmas, sigmas, rtol=1e-15)
    np.testing.assert_allclose(by_sigma.model_timesteps, np.log(sigmas), rtol=1e-6)
    by_index = PROCESSES["ve by index"].at_log_snr(-np.log(sigmas))
    expected = 199 * np.log(sigmas / 0.01) / np.log(5000)
    np.testing.assert_allclose(by_index.timestep_map, expected, rtol=1e-12)


def test_a_last_step_without_signal_is_minus_infinity():
    process = PROCESSES["zero terminal SNR"]
    made = process.at_log_snr([-np.inf, 0.0])
    assert made.alphas_cumprod[-1] == 0 and made.timestep_map[-1] == 99
    assert made.alphas_cumprod[0] == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_method_reads_the_levels(name):
    """What fastdiff.methods asks of it: x_0 = a·x + b·output there."""
    process = PROCESSES[name]
    source = Source.of(Levels.of(*noise_levels(process)), process)
    most, least = finite(process)[[0, -1]]
    asked = [0.3 * most + 0.7 * least, 0.6 * most + 0.4 * least]
    levels = sorted(source.between(asked), key=lambda level: level.log_snr)
    assert [level.log_snr for level in levels] == pytest.approx(asked, rel=1e-9)
    for level in levels:
        x, x_0, eps = level.signal * 0.4 + level.noise * 1.3, 0.4, 1.3
        output = {"epsilon": eps, "v": level.signal * eps - level.noise * x_0}.get(
            process.mean_type
        )
        if output is not None and not (process.mean_type == "v" and level.signal == 1):
            assert level.a * x + level.b * output == pytest.approx(x_0, rel=1e-9)


def test_it_samples_and_scores():
    seen = []

    def network(x, t):
        seen.append(float(t[0]))
        return torch.zeros_like(x)

    made = PROCESSES["linear"].at_log_snr([1.0, -2.0, 3.0])
    made.p_sample_loop(network, (1, 1))
    assert seen == made.model_timesteps[::-1].tolist() and seen[0] % 1 != 0


@pytest.mark.parametrize("name", ["linear", "ve by index", "edm"])
@pytest.mark.parametrize(
    "values, message",
    [
        ([], "log_snr must be one or more numbers"),
        ([[0.0]], "log_snr must be one or more numbers"),
        ([0.0, float("nan")], "none of them NaN"),
        ("high", "log_snr must be a list of numbers, got 'high'"),
        ([0.5, -1.0, 0.5], "log_snr 0.5 is there twice; expected levels that all differ"),
        ([0.5, 70.0], r"log_snr is 70; the levels of this process are -[\d.]+ … [\d.]+$"),
        ([0.5, -70.0], "log_snr is -70; the levels of this process are"),
        ([-float("inf")], "log_snr is -inf; the levels of this process are"),
    ],
)
def test_levels_that_are_not_there(name, values, message):
    with pytest.raises(InputError, match=message) as caught:
        PROCESSES[name].at_log_snr(values)
    assert "\n" not in str(caught.value)


def test_levels_of_the_whole_only():
    with pytest.raises(InputError, match="are -[0-9.]+ … [0-9.]+, −inf$"):
        PROCESSES["zero terminal SNR"].at_log_snr([-50.0])
    with pytest.raises(InputError, match="'previous_x' predicts where a step of its own leads"):
        create_diffusion(mean_type="previous_x").at_log_snr([0.0])
    betas = linear_betas(30)
    with pytest.raises(InputError, match="original_betas holds 30 values and .*_steps is 40"):
        GaussianDiffusion(
            betas[:2], timestep_map=[0, 1], original_num_steps=40, original_betas=betas
        )
    with pytest.raises(InputError, match="original_sigmas holds 3 values and .*_steps is 2"):
        VarianceExploding([1, 2], original_num_steps=2, original_sigmas=[1, 2, 3])


def test_where_the_whole_is_not_known_the_steps_are_what_is_known():
    whole = create_diffusion(steps=100)
    strided = whole.respace(timesteps=[0, 50, 99])
    config = strided.to_config() | {"original_betas": None}
    known = GaussianDiffusion.from_config(config)
    mean = log_snr(strided)[:2].mean()
    assert known.at_log_snr([mean]).timestep_map == pytest.approx([25.0], rel=1e-12)
    assert strided.at_log_snr([mean]).timestep_map[0] < 15
