"""Spacings of noise levels: against their published functions, and as steps."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.checkpoints.config import process_from_config
from fastdiff.errors import InputError
from fastdiff.methods.protocol import noise_levels
from fastdiff.process.between import log_snr
from fastdiff.process.edm import EDM, karras_sigmas
from fastdiff.process.gaussian import create_diffusion
from fastdiff.process.respacing import spaced_timesteps
from fastdiff.process.spacings import LEVEL_SPACINGS, beta_quantile
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas

PROCESSES = {
    "linear": create_diffusion(steps=1000),
    "cosine": create_diffusion(steps=300, noise_schedule="cosine"),
    "ve": VarianceExploding(geometric_sigmas(200)),
    "edm": EDM(40),
    "zero terminal SNR": create_diffusion(steps=100, mean_type="v", zero_terminal_snr=True),
}
VE = VarianceExploding(geometric_sigmas(200, 0.01, 50.0))

# Least noisy first; of 6 levels between σ of DDPM's linear schedule in float64, by the functions
# _convert_to_karras, _convert_to_exponential and _convert_to_beta of diffusers 0.42.1.
DIFFUSERS = {
    "karras": [0.010000500037502566, 0.26312714164280754, 2.4228336361888956]
    + [13.037830600505087, 50.58067064629097, 157.40728081040749],
    "exponential": [0.010000500037502575, 0.06909113640312718, 0.47733464442520407]
    + [3.297794400704389, 22.783697006558565, 157.40728081040763],
}
# Theirs are of σ, the paper's of the timesteps: here as shares of the range.
DIFFUSERS_BETA = [0.0, 0.12292175045833285, 0.36270099075321405]
DIFFUSERS_BETA += [0.6372990092467856, 0.8770782495416671, 1.0]
# Of 6 between 0.01 and 50: k-diffusion's get_sigmas_* in float64.
K_DIFFUSION = {
    ("polynomial", 2.0): [0.010000000000000004, 0.014059141442025068, 0.03906926137119377]
    + [0.21459974499253665, 2.3299188916435547, 49.99999999999997],
    ("karras", 5.0): [0.010000000000000007, 0.24667336295386996, 1.7122072684963299]
    + [6.894023445201447, 20.467717809968438, 50.000000000000014],
}


def sigmas(process):
    signal, noise = noise_levels(process)
    return noise / signal


@pytest.mark.parametrize("spacing", DIFFUSERS)
def test_levels_are_diffusers(spacing):
    respaced = PROCESSES["linear"].respace(6, spacing=spacing)
    np.testing.assert_allclose(sigmas(respaced), DIFFUSERS[spacing], rtol=1e-11)
    if spacing == "karras":  # EulerDiscreteScheduler._sigma_to_t there
        expected = [0.0, 76.56721297302363, 433.73844583148684]
        expected += [711.2657039496728, 879.5131712508461, 999.0]
        np.testing.assert_allclose(respaced.timestep_map, expected, rtol=1e-10, atol=1e-10)


def test_beta_levels_are_at_the_papers_timesteps():
    respaced = PROCESSES["linear"].respace(6, spacing="beta")
    expected = 999 * np.array(DIFFUSERS_BETA)
    np.testing.assert_allclose(respaced.timestep_map, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spacing, rho", K_DIFFUSION, ids=str)
def test_levels_are_k_diffusions(spacing, rho):
    respaced = VE.respace(6, spacing=spacing, rho=rho)
    np.testing.assert_allclose(respaced.sigmas, K_DIFFUSION[spacing, rho], rtol=1e-12)


@pytest.mark.parametrize("steps", [2, 5, 40, 90])
def test_edm_has_the_levels_that_it_would_be_made_with(steps):
    """Any number of them: strided to 90 of 40 steps it is EDM(90)."""
    respaced = EDM(40).respace(steps, spacing="karras")
    np.testing.assert_allclose(respaced.sigmas, karras_sigmas(steps), rtol=1e-12)
    np.testing.assert_allclose(respaced.sigmas, EDM(steps).sigmas, rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(PROCESSES)),
    spacing=st.sampled_from(sorted(LEVEL_SPACINGS)),
    steps=st.integers(1, 120),
)
def test_levels_run_from_the_first_step_to_the_last(name, spacing, steps):
    process = PROCESSES[name]
    respaced = process.respace(steps, spacing=spacing)
    assert type(respaced) is type(process) and respaced.num_timesteps == steps
    assert respaced.timestep_map[-1] == pytest.approx(process.num_timesteps - 1, rel=1e-12)
    if steps > 2:
        assert respaced.timestep_map[0] == pytest.approx(0, abs=1e-10)
    assert (np.diff(log_snr(respaced)) < 0).all()
    config = json.loads(json.dumps(respaced.to_config()))
    assert process_from_config(config).to_config() == config
    for mine, other in zip(
        noise_levels(process_from_config(config)), noise_levels(respaced), strict=True
    ):
        assert (mine == other).all()


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(PROCESSES)),
    spacing=st.sampled_from(sorted(LEVEL_SPACINGS)),
    data=st.data(),
)
def test_rounded_they_are_the_nearest_steps_all_distinct(name, spacing, data):
    process = PROCESSES[name]
    total = process.num_timesteps
    steps = data.draw(st.integers(1, total))
    chosen = spaced_timesteps(process, steps, spacing)
    assert all(type(step) is int for step in chosen) and len(chosen) == steps
    assert (np.diff(chosen) > 0).all() and 0 <= chosen[0] and chosen[-1] == total - 1
    respaced = process.respace(steps, spacing=spacing, rounded=True)
    assert respaced.timestep_map.dtype == np.int64 and respaced.timestep_map.tolist() == chosen
    exact = process.respace(steps, spacing=spacing).timestep_map
    if (np.diff(exact.round()) > 0).all() and name != "edm":  # its curve between steps is its own
        tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-6
        assert (exact.round()[~tie] == np.array(chosen)[~tie]).all()


@pytest.mark.parametrize("name", PROCESSES)
def test_logsnr_is_exponential_rounded(name):
    process = PROCESSES[name]
    for steps in (1, 2, 7, 30):
        rounded = spaced_timesteps(process, steps, "exponential")
        assert spaced_timesteps(process, steps, "logsnr") == rounded


@pytest.mark.parametrize("spacing", LEVEL_SPACINGS)
def test_a_strided_process_is_spread_over_its_own_range(spacing):
    strided = PROCESSES["linear"].respace(timesteps=[100, 200, 900])
    made = strided.respace(7, spacing=spacing)
    np.testing.assert_allclose(made.timestep_map[[0, -1]], [100, 900], rtol=1e-10)
    chosen = strided.respace(2, spacing=spacing, rounded=True)
    assert chosen.timestep_map.tolist() == [100, 900]


@pytest.mark.parametrize("spacing", LEVEL_SPACINGS)
def test_a_step_without_signal_is_taken_and_the_others_are_spread(spacing):
    process = PROCESSES["zero terminal SNR"]
    made = process.respace(8, spacing=spacing)
    assert made.alphas_cumprod[-1] == 0 and made.timestep_map[-1] == 99
    before = process.respace(timesteps=list(range(99))).respace(7, spacing=spacing)
    np.testing.assert_allclose(made.timestep_map[:-1], before.timestep_map, rtol=1e-12, atol=1e-9)


def test_options_shape_the_spread():
    linear = PROCESSES["linear"]
    middle = {rho: log_snr(linear.respace(3, spacing="karras", rho=rho))[1] for rho in (1, 7, 900)}
    # In σ itself the mean of the ends; ever nearer to the mean in log σ (arXiv:2206.00364, D.1).
    assert middle[1] == pytest.approx(-np.log(sigmas(linear)[[0, -1]].mean()), rel=1e-9)
    assert middle[1] < middle[7] < middle[900] < log_snr(linear)[[0, -1]].mean() * (1 - 1e-6)
    assert middle[900] == pytest.approx(log_snr(linear)[[0, -1]].mean(), abs=0.02)
    uniform = linear.respace(9, spacing="beta", alpha=1.0, beta=1.0)
    np.testing.assert_allclose(uniform.timestep_map, np.linspace(0, 999, 9), rtol=1e-10, atol=1e-9)
    steps = spaced_timesteps(linear, 4, "polynomial", rho=0.25)
    assert linear.respace("4", spacing="polynomial", rho=0.25, rounded=True).timestep_map[
        1
    ] == pytest.approx(steps[1])


# scipy.stats.beta.ppf of scipy 1.17.1 at even shares
SCIPY = {
    (0.6, 0.6): [0.0914867955500452, 0.2754132907776234, 0.5]
    + [0.7245867092223766, 0.9085132044499548],
    (0.3, 2.0): [0.0041181161550032964, 0.04276750690589219, 0.1848580358619112],
}


@pytest.mark.parametrize("shape", SCIPY)
def test_quantiles_are_scipys(shape):
    shares = np.linspace(0, 1, len(SCIPY[shape]) + 2)
    found = beta_quantile(shares, *shape)
    np.testing.assert_allclose(found, [0, *SCIPY[shape], 1], rtol=1e-13)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.1, 20.0), st.just(0.0) | st.floats(1e-12, 1.0))
def test_quantiles_in_closed_form(alpha, p):
    """Beta(α, 1) has the distribution function x^α; mirrored it is Beta(1, α)."""
    shares = np.array([p])
    x = beta_quantile(shares, alpha, 1.0)[0]
    assert x**alpha == pytest.approx(p, rel=1e-13, abs=1e-13 if x > 0.5 else 1e-300)
    x = beta_quantile(shares, 1.0, alpha)[0]
    rounding = 2.0**-53 * alpha * max(1 - x, 2.0**-53) ** (alpha - 1)  # of x, in p
    assert 1 - (1 - x) ** alpha == pytest.approx(p, rel=1e-13, abs=1e-13 + 2 * rounding)


@pytest.mark.parametrize("name", ["linear", "ve", "edm"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"spacing": "logsnr", "rho": 7.0}, "rho=7.0 belongs to spacing 'karras' or 'polyn"),
        ({"spacing": "beta", "rho": 7.0}, "rho=7.0 belongs to .*, not to 'beta'"),
        ({"spacing": "karras", "alpha": 0.6}, "alpha=0.6 belongs to spacing 'beta', not to"),
        ({"spacing": "karras", "speed": 1}, "speed=1 belongs to spacing none that there is, not"),
        ({"rho": 7.0}, "rho=7.0 belongs to spacing .*, not to 'uniform'"),
        ({"spacing": "karras", "rho": 0}, "rho must be a positive number, got 0"),
        ({"spacing": "beta", "beta": -1.0}, "beta must be a positive number, got -1.0"),
        ({"spacing": "beta", "alpha": 1e6, "beta": 1e6}, "expected at most 100 of each"),
        ({"spacing": "karras", "sections": 0}, "cannot choose 0 steps"),
        ({"spacing": "karras", "sections": "5,5"}, "an integer, got '5,5'"),
        (
            {"spacing": "polynomial", "rho": 60.0},
            "20 levels by spacing 'polynomial', rho=60.0 do not all differ; expected fewer",
        ),
        ({"spacing": "karras", "rho": 1e-3}, "20 levels by .* do not all differ"),
        ({"spacing": "karras", "sections": 5000, "rounded": True}, "cannot choose 5000 of"),
    ],
)
def test_bad_spacings(name, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        PROCESSES[name].respace(**{"sections": 20} | arguments)
    assert "\n" not in str(caught.value)


def test_a_spacing_of_levels_needs_levels():
    with pytest.raises(InputError, match="spacing 'karras' needs noise levels, got 10 steps"):
        spaced_timesteps(10, 5, "karras")
