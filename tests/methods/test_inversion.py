"""The rows that lead from an image to its noise: on the exact flow of a mixture, and to rounding of
the published formulas."""

from dataclasses import replace

import numpy as np
import pytest

import row_oracle
from fastdiff.methods.inversion import INVERTIBLE, encoding_table
from fastdiff.methods.table import COLUMNS, StepTable


def encoding(process, method):
    """The table with the levels of its rows, of which the process's timesteps tell."""
    table = encoding_table(process, method=method, clip_denoised=False)
    of = {np.float32(t): i for i, t in enumerate(process.model_timesteps)}
    rows = [of[t] for t in table.timesteps.numpy()]
    return replace(
        table, levels=np.stack([process.signal_scale[rows], process.noise_scale[rows]], 1)
    )


@pytest.mark.parametrize("preserving", [True, False])
@pytest.mark.parametrize("method", INVERTIBLE)
def test_the_error_falls_with_the_methods_order(method, preserving):
    """From σ_0 = 0.001, so that the first row, of first order always, is none of the error."""
    order = {"ddim": 1, "euler": 1, "heun": 2, "dpmsolver++": 2}[method]
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
    assert errors[-1] < {1: 0.05, 2: 0.005}[order]


@pytest.mark.parametrize("method", INVERTIBLE)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_no_network_is_asked_beyond_the_last_step(method, steps):
    process = row_oracle.evenly(steps)
    table = encoding(process, method)
    asked, own = table.timesteps.numpy(), process.model_timesteps.astype(np.float32)
    assert asked[0] == own[0] and (np.diff(asked) >= 0).all() and asked[-1] <= own[-1]
    assert len(table) == 1 + (steps - 1) * (2 if method == "heun" else 1)
    assert not table.is_noisy and table.slots <= 1


@pytest.mark.parametrize("method", INVERTIBLE)
def test_a_level_without_signal_is_reached_by_eulers_step(method):
    process = row_oracle.evenly(6)
    process.signal_scale[-1], process.noise_scale[-1] = 0.0, 1.0
    table, ddim = encoding(process, method), encoding(process, "ddim")
    assert np.isfinite(table.packed[:, : COLUMNS.index("clip")].numpy()).all()
    assert (table.c[-1], table.d[-1], table.e0[-1]) == (ddim.c[-1], ddim.d[-1], 0)


@pytest.mark.parametrize("method", INVERTIBLE)
def test_a_constant_answer_is_led_to_its_own_noise(method):
    """x_0 and ε that do not change along the way: every row keeps x = signal·x_0 + noise·ε."""
    process = row_oracle.evenly(12)
    table = encoding(process, method)
    x_0, eps = 0.4, -1.3
    seen = row_oracle.run(
        table, np.array([x_0]), lambda x, signal, noise: (x - noise * eps) / signal
    )
    # A second-order step up passes its level twice: where it tries, and where it ends.
    arrived = np.append(table.levels[1:], [[process.signal_scale[-1], process.noise_scale[-1]]], 0)
    np.testing.assert_allclose(
        seen[1:, 0], arrived[:, 0] * x_0 + arrived[:, 1] * eps, rtol=1e-4, atol=1e-4
    )


def test_up_and_down_again():
    """The rows of the way down undo those of the way up, to the error of both."""
    for method in ("heun", "dpmsolver++"):
        process = row_oracle.evenly(150, least=0.001)
        image = np.linspace(-1.3, 1.2, 9)
        up = row_oracle.run(encoding(process, method), image, row_oracle.posterior_mean)[-1]
        down = StepTable.from_process(process, method=method, clip_denoised=False)
        again = row_oracle.run(down, up, row_oracle.posterior_mean)[-1]
        np.testing.assert_allclose(again, image, rtol=0, atol=2e-3)
