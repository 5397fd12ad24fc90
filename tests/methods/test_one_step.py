"""One-step methods: their orders, their marginals on Gaussian data, and what their options do."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import row_oracle
import row_tools
from fastdiff.errors import InputError
from fastdiff.methods.table import COLUMNS, StepTable
from fastdiff.process.gaussian import create_diffusion

ORDERS = [
    ("euler", {}, 1),
    ("euler_ancestral", {"eta": 0.0}, 1),
    ("heun", {}, 2),
    ("dpm_2", {}, 2),
    ("dpm_2_ancestral", {"eta": 0.0}, 2),
    ("dpmsolver++2s_ancestral", {"eta": 0.0}, 2),
    ("sde-dpmsolver++2s", {"eta": 0.0}, 2),
    ("dpmsolver++2s", {}, 2),
    ("dpmsolver++2s", {"solver_type": "heun"}, 2),
    ("dpmsolver++3s", {}, 3),
    ("dpmsolver++3s", {"solver_type": "heun"}, 3),
]


def slope(counts, errors):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("preserving", [True, False])
@pytest.mark.parametrize("method, options, order", ORDERS, ids=lambda v: str(v))
def test_the_error_falls_with_the_order(method, options, order, preserving):
    counts = np.array([30, 42, 60, 84]) * (1 if order < 3 else 2)
    errors = []
    for steps in counts + 1:  # the last is to the data, which no number of steps makes smaller
        table = row_tools.table_of(row_oracle.evenly(steps, preserving), method, **options)
        start, end = table.levels[0], table.levels[-1]
        x = np.linspace(-2, 2, 9) * start[1]
        seen = row_oracle.run(table, x, row_oracle.posterior_mean)
        exact = row_oracle.along_the_flow(x, start, end)
        errors.append(np.sqrt(np.mean((seen[-2] - exact) ** 2)))
    assert order - 0.25 <= slope(counts, errors) <= order + 0.6
    assert errors[-1] < {1: 0.02, 2: 2e-3, 3: 2e-5}[order]


NOISY = [
    ("euler_ancestral", {}, 1),
    ("euler_ancestral", {"eta": 0.4}, 1),
    ("euler", {"s_churn": 6.0}, 1),
    ("heun", {"s_churn": 6.0}, 2),
    ("heun", {"s_churn": 9.0, "s_tmin": 0.1, "s_tmax": 5.0}, 2),
    ("restart", {"restarts": [(0.5, 4.0, 0, 2), (0.1, 0.4, 0, 3)]}, 2),
    ("dpm_2", {"s_churn": 6.0}, 2),
    ("dpm_2_ancestral", {}, 2),
    ("dpmsolver++2s_ancestral", {}, 2),
    ("sde-dpmsolver++2s", {}, 2),
    ("sde-dpmsolver++2s", {"eta": 0.5}, 2),
    ("dpmsolver++2s", {"eta": 1.0}, 2),
    ("dpmsolver++3s", {"eta": 0.7}, 2),  # the way to σ_down is not cut in three even parts
    ("dpmsolver++3s", {"eta": 0.7, "solver_type": "heun"}, 2),
]


@pytest.mark.parametrize("preserving", [True, False])
@pytest.mark.parametrize("method, options, order", NOISY, ids=lambda v: str(v))
def test_noise_keeps_the_marginals_of_gaussian_data(method, options, order, preserving):
    """Down the exact flow and up by noise, every level's marginal is the data's, noised: mean and
    variance, both known exactly, are off by the steps' error alone and fall with its order."""
    mean, variance = 0.3, 0.2
    counts, errors = np.array([30, 42, 60, 84]) * (2 if "3s" in method else 1), []
    for steps in counts + 1:
        given = dict(options)
        if method == "restart":  # as fine as the rest
            given["restarts"] = [(*ends, int(steps) // 4, n) for *ends, _, n in given["restarts"]]
        table = row_tools.table_of(row_oracle.evenly(steps, preserving), method, **given)
        assert table.is_noisy
        means, variances = row_oracle.moments(table, mean, variance)
        signal, noise = table.levels[-1]
        there = signal**2 * variance + noise**2
        errors.append(math.hypot(means[-2] - signal * mean, variances[-2] - there))
    assert order - 0.3 <= slope(counts, errors) <= order + 0.8
    assert errors[-1] < {1: 0.02, 2: 1e-3}[order]


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_on_uneven_steps_3s_is_of_second_order(solver_type):
    counts, errors = np.array([60, 84, 120, 168]), []
    for steps in counts + 1:
        place = np.linspace(0, 1, steps)
        place[1:-1] += 0.5 / steps * (np.arange(1, steps - 1) % 3 > 0)
        process = row_oracle.process(0.05 * 400.0**place, preserving=True)
        table = row_tools.table_of(process, "dpmsolver++3s", solver_type=solver_type)
        x = np.linspace(-2, 2, 9) * table.levels[0, 1]
        exact = row_oracle.along_the_flow(x, table.levels[0], table.levels[-1])
        seen = row_oracle.run(table, x, row_oracle.posterior_mean)
        errors.append(np.sqrt(np.mean((seen[-2] - exact) ** 2)))
    assert 1.75 <= slope(counts, errors) <= 2.5


def test_s_noise_multiplies_what_is_added():
    for method, options in (("heun", {"s_churn": 5.0}), ("euler_ancestral", {}), ("restart", {})):
        one = row_tools.table_of(row_oracle.evenly(12), method, **options)
        more = row_tools.table_of(row_oracle.evenly(12), method, s_noise=1.25, **options)
        assert one.is_noisy
        torch.testing.assert_close(more.sigma, 1.25 * one.sigma)
        torch.testing.assert_close(more.d, one.d)


@settings(max_examples=100, deadline=None)
@given(
    rises=st.lists(st.floats(0.05, 3.0), min_size=1, max_size=12),
    least=st.floats(-5.0, 1.0),
    preserving=st.booleans(),
    case=st.sampled_from([*NOISY, *ORDERS, ("predictor-corrector", {"snr": 1e-4}, 0)]),
)
def test_every_row_keeps_the_marginals_of_one_known_image(rises, least, preserving, case):
    """q(x | x_0) = N(signal·x_0, noise²) at every level, trial points included."""
    method, options, _ = case
    if method == "restart":
        options = {"restarts": [(0.5, 4.0, 3, 2), (0.1, 0.4, 4, 3)]}
    process = row_oracle.process(np.exp(least + np.cumsum(rises)), preserving=preserving)
    table = row_tools.table_of(process, method, **options)
    means, variances = row_oracle.moments(table, mean=0.7, variance=0.0)
    signal, noise = np.append(table.levels, [[1.0, 0.0]], 0).T
    np.testing.assert_allclose(means, 0.7 * signal, rtol=1e-9, atol=1e-11 * noise.max())
    np.testing.assert_allclose(variances, noise**2, rtol=1e-9, atol=1e-18 * noise.max() ** 2)


# --- Euler is DDIM ----------------------------------------------------------------------------

spreads = st.lists(st.floats(0.02, 3.0), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(rises=spreads, least=st.floats(-5.0, 1.0), preserving=st.booleans(), eta=st.floats(0, 1))
def test_eulers_steps_are_ddims(rises, least, preserving, eta):
    process = row_oracle.process(np.exp(least + np.cumsum(rises)), preserving=preserving)
    ddim = row_tools.table_of(process, "ddim", eta=eta)
    own = row_tools.table_of(process, "euler_ancestral", eta=eta)
    exact = [i for i, name in enumerate(COLUMNS) if name not in ("clip", "sigma")]
    torch.testing.assert_close(own.packed[:, exact], ddim.packed[:, exact], rtol=1e-9, atol=1e-9)
    # What is added is a difference of squared levels.
    off = (own.sigma**2 - ddim.sigma**2).numpy()
    assert (np.abs(off) <= 16 * np.finfo(float).eps * own.levels[:, 1] ** 2).all()
    if eta == 0:
        assert torch.equal(row_tools.table_of(process, "euler").packed, own.packed)


# --- Rows -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(rises=spreads, least=st.floats(-5.0, 1.0), preserving=st.booleans())
def test_an_ancestral_steps_middle_is_the_next_step_of_the_process(rises, least, preserving):
    """At eta 1: so a network that knows its own steps alone can be asked."""
    process = row_oracle.process(np.exp(least + np.cumsum(rises)), preserving=preserving)
    own = process.model_timesteps[::-1]
    del process.at_log_snr
    for method in ("dpm_2_ancestral", "dpmsolver++2s_ancestral"):
        table = row_tools.table_of(process, method)
        begins = np.array(table.begins)
        asked = table.timesteps.numpy()
        np.testing.assert_array_equal(asked[begins], own)
        np.testing.assert_array_equal(asked[~begins], own[1:])


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("method", ["heun", "dpm_2", "dpm_2_ancestral", "dpmsolver++2s_ancestral"])
def test_two_calls_a_step_but_the_last(method, steps):
    table = row_tools.table_of(row_oracle.evenly(steps), method)
    assert len(table) == 2 * steps - 1
    assert table.begins == (True, False) * (steps - 1) + (True,)
    assert table.keeps_x_start


@pytest.mark.parametrize(
    "order, steps, begins",
    [
        (2, 1, "b"), (2, 2, "bb"), (2, 3, "b.b"), (2, 4, "b.bb"), (2, 5, "b.b.b"),
        (3, 1, "b"), (3, 2, "bb"), (3, 3, "b.b"), (3, 4, "b..b"), (3, 5, "b..bb"),
        (3, 6, "b..b.b"), (3, 7, "b..b..b"),
    ],
)  # fmt: skip
def test_singlestep_solvers_group_their_steps(order, steps, begins):
    table = row_tools.table_of(row_oracle.evenly(steps), f"dpmsolver++{order}s")
    assert "".join("b" if first else "." for first in table.begins) == begins


@pytest.mark.parametrize("method", ["heun", "dpm_2", "dpmsolver++2s", "restart"])
def test_from_a_level_without_signal_the_first_step_is_eulers(method):
    process = row_oracle.evenly(6)
    process.signal_scale[-1], process.noise_scale[-1] = 0.0, 1.0
    table = row_tools.table_of(process, method)
    assert torch.isfinite(table.packed[:, : COLUMNS.index("clip")]).all()
    ddim = row_tools.table_of(process, "ddim")
    assert (table.c[0], table.d[0], table.begins[1]) == (ddim.c[0], ddim.d[0], True)


# --- Churn and restarts -----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 15),
    s_churn=st.floats(0, 40),
    ends=st.tuples(st.floats(0.01, 30), st.floats(0.01, 30)),
    method=st.sampled_from(["euler", "heun", "dpm_2"]),
)
def test_churn_lifts_every_step_within_its_bounds_but_the_first(steps, s_churn, ends, method):
    process = row_oracle.evenly(steps)
    table = row_tools.table_of(process, method, s_churn=s_churn, s_tmin=ends[0], s_tmax=ends[1])
    sigmas = (process.noise_scale / process.signal_scale)[::-1]
    gamma = min(s_churn / steps, math.sqrt(2) - 1)
    inside = (ends[0] <= sigmas) & (sigmas <= ends[1])
    lifted = np.minimum(sigmas * np.where(inside, 1 + gamma, 1), sigmas[0])
    lifted[0] = sigmas[0]
    begun = table.levels[np.array(table.begins)]
    np.testing.assert_allclose(begun[:, 1] / begun[:, 0], lifted, rtol=1e-12)
    # A row that makes a lifted x adds what is missing, in x / signal.
    added = table.sigma.numpy() / np.append(table.levels[1:, 0], 1.0)
    made = np.append(np.array(table.begins)[1:], True)
    expected = np.append(np.sqrt(lifted[1:] ** 2 - sigmas[1:] ** 2), 0.0)
    np.testing.assert_allclose(added[made], expected, rtol=1e-6, atol=1e-9)
    assert not added[~made].any()


@pytest.mark.parametrize("method", ["euler", "heun", "dpm_2"])
@pytest.mark.parametrize("spacing", ["trailing", "karras", "exponential", "beta"])
def test_churn_stays_below_a_step_without_signal(method, spacing):
    process = create_diffusion(mean_type="v", zero_terminal_snr=True).respace(18, spacing=spacing)
    plain = StepTable.from_process(process, method=method)
    table = StepTable.from_process(process, method=method, s_churn=40.0)
    begun, steps = (of.levels[np.array(of.begins)] for of in (table, plain))
    assert begun[0, 0] == 0 and np.array_equal(begun[1], steps[1])
    found, sigmas = (of[2:, 1] / of[2:, 0] for of in (begun, steps))
    most = steps[1, 1] / steps[1, 0]
    np.testing.assert_allclose(found, np.minimum(sigmas * math.sqrt(2), most), rtol=1e-9)


def test_restarts_go_where_they_are_published_to_go():
    process = row_oracle.evenly(10)
    sigmas = process.noise_scale / process.signal_scale
    table = row_tools.table_of(process, "restart", restarts=[(0.5, 2.0, 4, 2)])
    assert len(table) == 19 + 2 * 2 * 3
    found = table.levels[:, 1] / table.levels[:, 0]
    low = sigmas[np.abs(sigmas - 0.5).argmin()]
    tops = np.flatnonzero(np.isclose(found, 2.0, rtol=1e-12))
    again = (2.0 ** (1 / 7) + np.arange(4) / 3 * (low ** (1 / 7) - 2.0 ** (1 / 7))) ** 7
    assert len(tops) == 2
    for top in tops:  # one call at the top, two where a step ends and the next begins
        np.testing.assert_allclose(found[top : top + 6], np.repeat(again, 2)[1:-1], rtol=1e-12)
    assert np.flatnonzero(table.noisy_rows).tolist() == [top - 1 for top in tops]


@pytest.mark.parametrize(
    "sigmas, restarts",
    [
        ([0.05, 0.1, 0.25], ((0.06, 0.3, 3, 2),)),  # x never was as noisy as that
        ([0.4, 1.0, 3.0], ((0.06, 0.3, 3, 2),)),  # nor is led below it by the steps
        ([0.4], ((0.06, 0.3, 3, 2),)),
    ],
)
def test_restarts_off_the_path_are_left_out(sigmas, restarts):
    process = row_oracle.process(sigmas, preserving=False)
    table = row_tools.table_of(process, "restart", restarts=restarts)
    assert torch.equal(table.packed, row_tools.table_of(process, "heun").packed)


def test_churn_and_restarts_need_levels_between_the_steps():
    process = row_oracle.evenly(5)
    del process.at_log_snr
    assert len(StepTable.from_process(process, method="heun")) == 9
    for method, options in (("heun", {"s_churn": 1.0}), ("restart", {}), ("dpm_2", {})):
        with pytest.raises(InputError, match="SimpleNamespace has no at_log_snr"):
            StepTable.from_process(process, method=method, **options)


# --- Langevin ---------------------------------------------------------------------------------


def test_langevin_steps_stay_at_their_level_and_are_counted():
    predictor = row_tools.table_of(row_oracle.evenly(6), "euler_ancestral")
    for corrections in (0, 1, 3):
        table = row_tools.table_of(
            row_oracle.evenly(6), "predictor-corrector", corrections=corrections
        )
        assert len(table) == 6 + 5 * corrections and all(table.begins)
        kept = [0, *range(1 + corrections, len(table), 1 + corrections)]
        assert torch.equal(table.packed[kept], predictor.packed)


@pytest.mark.parametrize("snr", [0.05, 0.16, 0.4])
def test_langevin_steps_lead_to_the_marginal(snr):
    """For Gaussian data of variance Σ at a level, x' = (1 − ε/Σ)·x + √(2ε)·z leads from any
    variance to Σ / (1 − ε / 2Σ), with ε = 2·(snr·noise)²; the mean is left alone where it is right.
    """
    mean, variance, corrections = 0.4, 0.09, round(20 / snr**2)
    process = row_oracle.process([0.3, 1.0], preserving=True)
    table = row_tools.table_of(
        process, "predictor-corrector", corrections=corrections, snr=snr, eta=0.0
    )
    means, variances = row_oracle.moments(table, mean, variance)
    signal, noise = table.levels[-1]
    there = signal**2 * variance + noise**2
    step = 2 * (snr * noise) ** 2
    assert abs(variances[1] / there - 1) > 0.05  # one step of Euler's from far away
    assert variances[-2] == pytest.approx(there / (1 - step / (2 * there)), rel=1e-4)
    assert means[-2] == pytest.approx(signal * mean, rel=1e-4)


# --- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("heun", {"s_churn": -1}, "s_churn is -1; expected a finite number of at least 0"),
        ("euler", {"s_noise": math.nan}, "s_noise is nan"),
        ("dpm_2", {"s_tmin": "0.05"}, "s_tmin is '0.05'; expected a finite number of at least 0"),
        ("heun", {"s_tmax": None}, "s_tmax is None; expected a finite number of at least 0"),
        ("restart", {"restarts": None}, "restarts is None; expected a list of"),
        ("euler_ancestral", {"eta": 1.2}, "eta is 1.2; expected 0 .* … 1"),
        ("dpmsolver++3s", {"eta": -0.1}, "eta is -0.1"),
        (
            "dpmsolver++2s",
            {"solver_type": "bh1"},
            "solver_type is 'bh1'; expected midpoint or heun",
        ),
        ("heun", {"eta": 0.5}, "eta=0.5 belongs to method .*'euler_ancestral'"),
        ("restart", {"restarts": [(0.3, 0.06, 3, 2)]}, r"a restart is \(0.3, 0.06, 3, 2\)"),
        ("restart", {"restarts": [(0.06, 0.3, 1, 2)]}, "2 levels or more"),
        ("restart", {"restarts": [(0.06, 0.3, 3, 0)]}, "times of 1 or more"),
        ("restart", {"restarts": [(0.06, 0.3)]}, r"a restart is \(0.06, 0.3\)"),
        ("restart", {"s_noise": -1.0}, "s_noise is -1.0"),
        ("predictor-corrector", {"corrections": 1.5}, "corrections is 1.5"),
        ("predictor-corrector", {"snr": 0}, "snr is 0; expected a number above 0, at most 0.5"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(InputError, match=message):
        row_tools.table_of(row_oracle.evenly(8), method, **options)
