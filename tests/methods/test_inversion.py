"""The rows that lead from an image to its noise: on the exact flow of a mixture, and to rounding of
the published formulas."""

import re
from dataclasses import replace

import numpy as np
import pytest

import row_oracle
from fastdiff.errors import InputError
from fastdiff.methods.inversion import encoding_table
from fastdiff.methods.registry import METHODS
from fastdiff.methods.table import COLUMNS, StepTable

# What makes a method deterministic that is not. ddpm is what no option makes so.
WITHOUT_NOISE = {
    "predictor-corrector": {"eta": 0.0, "corrections": 0},
    "restart": {"restarts": ()},
} | {name: {"eta": 0.0} for name in METHODS if name.startswith("sde-") or "ancestral" in name}
INVERTIBLE = [name for name in METHODS if name != "ddpm"]
FIRST_ORDER = ("ddim", "euler", "euler_ancestral", "predictor-corrector")
HIGHER_ORDER = {"deis": 3, "unipc": 3, "dpmsolver++3s": 3, "lms": 4}  # the others' is 2
ONE_MORE_CALL = ("pndm",)
TWO_CALLS = ("heun", "restart", "dpm_2", "dpm_2_ancestral", "dpmsolver++2s_ancestral")
TWO_CALLS += ("sde-dpmsolver++2s",)


def encoding(process, method, **options):
    """The table with the levels of its rows, of which its network's timesteps, log σ, tell."""
    options = WITHOUT_NOISE.get(method, {}) | options
    table = encoding_table(process, method=method, clip_denoised=False, **options)
    sigmas = np.exp(table.timesteps.double().numpy())
    signal = np.ones_like(sigmas) if process.signal_scale[0] == 1 else (1 + sigmas**2) ** -0.5
    return replace(table, levels=np.stack([signal, signal * sigmas], 1))


@pytest.mark.parametrize("preserving", [True, False])
@pytest.mark.parametrize("method", INVERTIBLE)
def test_the_error_falls_with_the_methods_order(method, preserving):
    """From σ_0 = 0.001, so that the first row, of first order always, is none of the error."""
    order = 1 if method in FIRST_ORDER else HIGHER_ORDER.get(method, 2)
    counts, errors = np.array([40, 56, 80, 112]), []
    for steps in counts:
        process = row_oracle.evenly(steps, preserving, least=0.001)
        table = encoding(process, method)
        image = np.linspace(-1.3, 1.2, 9)
        latent = row_oracle.run(table, image, row_oracle.posterior_mean)[-1]
        last = process.signal_scale[-1], process.noise_scale[-1]
        exact = row_oracle.along_the_flow(image, (1.0, 0.0), last)
        errors.append(np.sqrt(np.mean(((latent - exact) / last[1]) ** 2)))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.25 <= slope <= order + 0.6
    assert errors[-1] < {1: 0.05, 2: 0.005, 3: 5e-4, 4: 5e-4}[order]


@pytest.mark.parametrize("method", INVERTIBLE)
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 20])
def test_no_network_is_asked_beyond_the_last_step(method, steps):
    process = row_oracle.evenly(steps)
    table = encoding(process, method)
    asked, own = table.timesteps.numpy(), process.model_timesteps.astype(np.float32)
    assert asked[0] == own[0] and (np.diff(asked) >= 0).all() and asked[-1] <= own[-1]
    more = 1 if method in ONE_MORE_CALL and steps > 1 else 0
    assert len(table) == 1 + (steps - 1) * (2 if method in TWO_CALLS else 1) + more
    assert not table.is_noisy


@pytest.mark.parametrize("steps", [2, 3, 6])
@pytest.mark.parametrize("method", INVERTIBLE)
def test_a_level_without_signal_is_reached_by_eulers_step(method, steps):
    process = row_oracle.evenly(steps)
    process.signal_scale[-1], process.noise_scale[-1] = 0.0, 1.0
    table, ddim = encoding(process, method), encoding(process, "ddim")
    assert np.isfinite(table.packed[:, : COLUMNS.index("clip")].numpy()).all()
    assert table.timesteps[-1] == ddim.timesteps[-1]
    if method != "unipc":  # whose row also corrects the step before
        assert (table.c[-1], table.d[-1], table.e0[-1]) == (ddim.c[-1], ddim.d[-1], 0)


@pytest.mark.parametrize("method", INVERTIBLE)
def test_a_constant_answer_is_led_to_its_own_noise(method):
    """x_0 and ε that do not change along the way: every row that ends a step keeps x = signal·x_0 +
    noise·ε, with the levels that it leads to."""
    process = row_oracle.evenly(12)
    table = encoding(process, method)
    x_0, eps = 0.4, -1.3
    seen = row_oracle.run(
        table, np.array([x_0]), lambda x, signal, noise: (x - noise * eps) / signal
    )
    arrived = np.append(table.levels[1:], [[process.signal_scale[-1], process.noise_scale[-1]]], 0)
    np.testing.assert_allclose(
        seen[1:, 0], arrived[:, 0] * x_0 + arrived[:, 1] * eps, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("method", [name for name in INVERTIBLE if name not in FIRST_ORDER])
def test_up_and_down_again(method):
    """The rows of the way down undo those of the way up, to the error of both."""
    process = row_oracle.evenly(150, least=0.001)
    image = np.linspace(-1.3, 1.2, 9)
    up = row_oracle.run(encoding(process, method), image, row_oracle.posterior_mean)[-1]
    options = WITHOUT_NOISE.get(method, {})
    down = StepTable.from_process(process, method=method, clip_denoised=False, **options)
    again = row_oracle.run(down, up, row_oracle.posterior_mean)[-1]
    np.testing.assert_allclose(again, image, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "method, options",
    [
        ("dpmsolver++", {"solver_type": "heun"}),
        ("dpmsolver++3s", {"solver_type": "heun"}),
        ("unipc", {"order": 2, "variant": "bh1"}),
        ("unipc", {"corrector": False}),
        ("deis", {"order": 4}),
        ("lms", {"order": 3}),
        ("pndm", {"order": 2}),
    ],
)
def test_a_methods_options_hold_upward_too(method, options):
    process = row_oracle.evenly(100, least=0.001)
    image = np.linspace(-1.3, 1.2, 9)
    table, usual = encoding(process, method, **options), encoding(process, method)
    assert table.packed.shape == usual.packed.shape and (table.packed != usual.packed).any()
    latent = row_oracle.run(table, image, row_oracle.posterior_mean)[-1]
    last = process.signal_scale[-1], process.noise_scale[-1]
    exact = row_oracle.along_the_flow(image, (1.0, 0.0), last)
    np.testing.assert_allclose(latent, exact, rtol=0, atol=5e-3 * last[1])


@pytest.mark.parametrize("preserving", [True, False])
@pytest.mark.parametrize(
    "method, options",
    [
        ("ddpm", {}),
        ("ddim", {"eta": 0.5}),
        ("euler", {"s_churn": 3.0}),
        ("heun", {"s_churn": 3.0, "s_noise": 0.0}),  # none comes, but the steps are not the ODE's
        ("euler_ancestral", {}),
        ("euler_ancestral", {"s_noise": 0.0}),
        ("restart", {}),
        ("restart", {"s_noise": 0.0}),
        ("sde-dpmsolver++", {}),
        ("predictor-corrector", {"eta": 0.0}),
    ],
)
def test_a_method_with_noise_is_refused(method, options, preserving):
    process = row_oracle.evenly(10, preserving)
    with pytest.raises(InputError, match=f"method '{re.escape(method)}' draws noise here"):
        encoding_table(process, method=method, **options)


def test_a_clip_that_is_kept_from_eps_is_refused():
    process = row_oracle.evenly(10)
    with pytest.raises(InputError, match="clipped_eps=False leads back .* only without the clip"):
        encoding_table(process, clipped_eps=False)
    plain = encoding_table(process, clip_denoised=False)
    same = encoding_table(process, clip_denoised=False, clipped_eps=False)
    assert (plain.packed == same.packed).all()
