"""Power-function averages: the paper's equations in float64, tracked and put together later."""

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff.errors import InputError
from fastdiff.models.ema import EMA, best_suited, initial_share, power_name
from fastdiff.models.power_function import (
    coefficients,
    exponent,
    relative_width,
    share_of_newest,
)

WIDTHS = (0.01, 0.05, 0.1, 0.2, 0.28)


def profile(gamma: float, time: int, length: int) -> np.ndarray:
    """What the steps 1 … length have in an average of ``time``: the integral of
    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) over each step."""
    upto = (np.minimum(np.arange(length + 1), time) / time) ** (gamma + 1)
    return np.diff(upto)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_gamma_gives_the_width(sigma_rel):
    gamma = exponent(sigma_rel)
    assert gamma > 0
    assert relative_width(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    # The definition: the standard deviation of p over tau, in shares of t.
    length = 200_000
    p, tau = profile(gamma, length, length), (np.arange(length) + 0.5) / length
    mean = p @ tau
    assert np.sqrt(p @ (tau - mean) ** 2) == pytest.approx(sigma_rel, rel=1e-4)


def test_the_paper_s_exponents():
    """Section 3.1: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, float("nan")])
def test_widths_out_of_range_are_refused(sigma_rel):
    with pytest.raises(InputError, match="sigma_rel is .*, expected a number between 0 and 0.288"):
        exponent(sigma_rel)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_updates_by_beta_give_the_profile(sigma_rel):
    gamma, steps = exponent(sigma_rel), 500
    shares = np.zeros(steps)
    for step in range(1, steps + 1):
        beta = (1 - 1 / step) ** (gamma + 1)
        newest = share_of_newest(gamma, step)
        assert newest == pytest.approx(1 - beta, rel=1e-9)
        shares *= 1 - newest
        shares[step - 1] += newest
    np.testing.assert_allclose(shares, profile(gamma, steps, steps), rtol=1e-9, atol=1e-15)


def walk(steps: int, size: int, seed: int = 0) -> np.ndarray:
    """float32 (steps + 1, size): a random walk that does not begin at 0."""
    moves = np.random.default_rng(seed).normal(size=(steps + 1, size))
    return np.cumsum(moves, axis=0).astype(np.float32) + 5


def follow(weights: np.ndarray, widths, every: int):
    """The averages as tracked: (EMA at the end, {(step, sigma_rel): float32 snapshot})."""
    model = nn.Linear(weights.shape[1], 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weights[0]))
    ema = EMA(model, (), sigma_rel=widths)
    snapshots = {}
    for step in range(1, len(weights)):
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(weights[step]))
        ema.update()
        if step % every == 0:
            for width in widths:
                average = ema.state_dict(power_name(width))["weight"]
                snapshots[step, width] = average.clone().flatten().numpy()
    return ema, snapshots


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_a_tracked_average_is_the_profile_s(sigma_rel):
    weights = walk(300, 16)
    ema, _ = follow(weights, (sigma_rel,), every=300)
    expected = profile(exponent(sigma_rel), 300, 300) @ weights[1:].astype(np.float64)
    average = ema.state_dict(power_name(sigma_rel))["weight"].flatten().numpy()
    np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-4)


def test_products_of_profiles_are_the_integrals():
    """The least squares of sampled profiles, without the paper's closed form."""
    snapshots = [(step, width) for step in (400, 800, 1200, 1600) for width in (0.05, 0.1)]
    fine = 50  # samples of each step
    columns = [profile(exponent(w), t * fine, 1600 * fine) for t, w in snapshots]
    wanted = profile(exponent(0.07), 1600 * fine, 1600 * fine)
    matrix = np.stack(columns, axis=1)
    factors = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    factors /= factors.sum()
    found, off = coefficients(snapshots, 1600, 0.07)
    np.testing.assert_allclose(found, factors, rtol=1e-3, atol=1e-4)
    assert found.sum() == pytest.approx(1)
    error = np.linalg.norm(matrix @ factors - wanted) / np.linalg.norm(wanted)
    assert off == pytest.approx(error, rel=1e-2) and off < 0.05


# Of 20 snapshots: what the profile is off by, as ``coefficients`` says.
@pytest.mark.parametrize(
    ("sigma_rel", "error"), [(0.03, 0.03), (0.07, 0.003), (0.15, 0.007), (0.2, 0.02)]
)
def test_a_known_average_from_snapshots_of_others(sigma_rel, error):
    """In a walk, whose averages differ, it is the tracked one up to the profile's error."""
    weights = walk(2000, 64)
    _, snapshots = follow(weights, (0.05, 0.1), every=100)
    tracked, _ = follow(weights, (sigma_rel,), every=2000)
    factors, off = coefficients(list(snapshots), 2000, sigma_rel)
    assert off < error
    found = factors @ np.stack([s.astype(np.float64) for s in snapshots.values()])
    expected = tracked.state_dict(power_name(sigma_rel))["weight"].flatten().numpy()
    apart = np.linalg.norm(snapshots[2000, 0.05] - snapshots[2000, 0.1])
    assert np.linalg.norm(found - expected) < error * apart * 2


def test_a_snapshot_of_its_own_is_taken_as_it_is():
    snapshots = [(step, width) for step in range(1000, 21_000, 1000) for width in (0.05, 0.1)]
    factors, off = coefficients(snapshots, 20_000, 0.1)
    expected = np.zeros(len(snapshots))
    expected[-1] = 1
    np.testing.assert_allclose(factors, expected, atol=1e-9)
    assert off < 1e-6


def test_names_beside_rates():
    model = nn.Linear(2, 2)
    ema = EMA(model, (0.9,), sigma_rel=(0.05, 0.1))
    assert ema.rates == ["0.9", "power-0.05", "power-0.1"] and ema.highest_rate == "0.9"
    assert ema.state_dict("power-0.050")["bias"] is ema.state_dict("power-0.05")["bias"]
    with pytest.raises(InputError, match="power-0.05 was given twice"):
        EMA(model, (), sigma_rel=(0.05, 0.050))
    with pytest.raises(InputError, match="'power-fast' is no power function"):
        ema.state_dict("power-fast")
    with pytest.raises(InputError, match="expected a number between 0 and 0.288"):
        EMA(model, (), sigma_rel=(0.3,))


def test_a_power_function_forgets_the_untrained_weights_at_once():
    assert initial_share("power-0.2", 0, warmup=False) == 1
    assert initial_share("power-0.2", 1, warmup=False) == 0
    weights = walk(1, 4)
    ema, _ = follow(weights, (0.2,), every=1)
    assert np.array_equal(ema.state_dict("power-0.2")["weight"].flatten().numpy(), weights[1])


@pytest.mark.parametrize(
    ("names", "updates", "warmup", "best"),
    [
        (["0.9999"], 400, True, "0.9999"),
        (["0.9999"], 400, False, None),  # 96 % of it untrained
        (["0.9", "0.99", "0.9999"], 400, False, "0.9"),  # 0.99 ** 400 is 1.8 %
        (["0.9", "0.99", "0.9999"], 500, False, "0.99"),
        (["0.9", "0.9999"], 50_000, False, "0.9999"),
        (["0.9", "0.9999"], 2, True, None),
        (["0.9", "0.9999"], 4, True, "0.9999"),  # still alike
        (["0.9999", "power-0.05", "power-0.1"], 1000, False, "power-0.1"),
        (["0.9999", "power-0.05"], 1000, True, "0.9999"),
        (["0.9999", "power-0.05"], 1_000_000, True, "power-0.05"),
        (["0.9", "0.9999"], None, False, "0.9999"),
        (["0.9", "power-0.05"], 0, True, None),
        ([], 100, True, None),
    ],
)
def test_the_best_suited_is_the_slowest_that_has_forgotten_the_start(names, updates, warmup, best):
    assert best_suited(names, updates, warmup=warmup) == best
