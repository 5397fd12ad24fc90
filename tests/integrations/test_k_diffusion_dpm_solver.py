"""The samplers that choose their σ: ``sample_dpm_fast`` and ``sample_dpm_adaptive``."""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import row_oracle
import row_tools
from fastdiff.errors import InputError
from fastdiff.integrations import k_diffusion
from fastdiff.integrations.k_diffusion import dpm_solver
from k_diffusion_cases import CONTROL, ENDS, SHAPE, model, solver_answers, solver_cases, start
from paths import RECORDED

CASES = {case[0]: case for case in solver_cases()}
EXACT = [name for name, case in CASES.items() if not case[-1]]  # recorded in float64
# Where an error is as small as float32's rounding of x, so is the step's length that it decides.
ROUNDED = [name for name in EXACT if "fast" in name or name.split()[-1] in ("pid", "lenient", "up")]


@pytest.fixture(scope="module")
def recorded():
    return np.load(RECORDED / "k_diffusion.npz")


class Float64Walk:
    """``walk.Walk`` by the row's equation in float64, from rows that no table has rounded."""

    def __init__(self, model, x, rows, extra_args):
        self.model, self.rows, self.extra_args = model, rows, extra_args
        self.table = SimpleNamespace(noisy_rows=[row.sigma != 0 for row in rows])
        self.memory = [torch.full_like(x, math.nan) for _ in range(3)]

    def denoised(self, x, row):
        sigma = x.new_full((len(x),), self.rows[row].at.timestep)
        return self.model(x, sigma, **self.extra_args)

    def step(self, x, denoised, row, noise=None):
        row = self.rows[row]
        read = sum(factor * kept for factor, kept in zip(row.e, self.memory, strict=True) if factor)
        if row.slot is not None:
            self.memory[row.slot] = row.k * denoised + row.q * x
        after = row.c * denoised + row.d * x + read
        return after + row.sigma * noise if row.sigma else after


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr(dpm_solver, "Walk", Float64Walk)
    torch.set_default_dtype(torch.float64)  # that of σ and t, as it was recorded
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", EXACT)
def test_in_float64_as_recorded(recorded, in_float64, name):
    """x, and of every step σ, the sum of x_0, and what the controller says."""
    x, seen = solver_answers(k_diffusion, CASES[name], torch.float64)
    close(x, recorded[name])
    close([call["sigma"] for call in seen], recorded[f"{name} levels"])
    close([call["denoised"].sum() for call in seen], recorded[f"{name} denoised"])
    assert [call["i"] for call in seen] == list(range(len(seen)))
    keys = {"x", "i", "t", "t_up", "sigma", "sigma_hat", "denoised"}
    if "adaptive" in name:
        control = [[float(call[key]) for key in CONTROL] for call in seen]
        close(control, recorded[f"{name} control"])
        keys |= {"h", *CONTROL}
    for call in seen:
        assert set(call) == keys
        assert call["t"] == call["t_up"] and call["sigma"] == call["sigma_hat"]
        assert call["sigma"] == (-call["t"]).exp()


def close(values, expected):
    """To 1e-9 of the largest: one rounding of x, 80 ε, is divided by the least σ at most."""
    atol = 1e-9 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(values, dtype=np.float64), expected, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("name", ROUNDED)
def test_in_float32_as_recorded(recorded, name):
    x, seen = solver_answers(k_diffusion, CASES[name], torch.float32)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.double(), recorded[name], rtol=0, atol=1e-5)
    sigmas = [float(call["sigma"]) for call in seen]
    np.testing.assert_allclose(sigmas, recorded[f"{name} levels"], rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[-1]])
def test_its_own_noise_is_torchs(recorded, name):
    """Both in float32, each with its own rounding, which decides the length of small steps."""
    x, _ = solver_answers(k_diffusion, CASES[name], torch.float32)
    np.testing.assert_allclose(x, recorded[name], rtol=0, atol=1e-3)


# --- The equations --------------------------------------------------------------------------------


def table_of(rows):
    """What ``row_oracle.run`` reads, in float64."""
    columns = [row.columns() | {"clip": math.inf} for row in rows]
    factors = {
        name: torch.tensor([row[name] for row in columns], dtype=torch.float64)
        for name in row_tools.NAMES
    }
    return SimpleNamespace(**factors, levels=[(row.at.signal, row.at.noise) for row in rows])


def by_eps(x, begin, end, order):
    """DPM-Solver-1, -2 and -3 as arXiv:2206.00927 has them (eq. 3.7, algorithms 1 and 2)."""

    def eps(x, log_snr):
        sigma = np.exp(-log_snr)
        return (x - row_oracle.posterior_mean(x, 1.0, sigma)) / sigma

    def sigma(part):
        return np.exp(-begin - part * h)

    h, eps_0 = end - begin, eps(x, begin)
    if order == 1:
        return x - sigma(1) * np.expm1(h) * eps_0
    if order == 2:
        u = x - sigma(1 / 2) * np.expm1(h / 2) * eps_0
        return x - sigma(1) * np.expm1(h) * eps(u, begin + h / 2)
    r_1, r_2 = 1 / 3, 2 / 3
    u_1 = x - sigma(r_1) * np.expm1(r_1 * h) * eps_0
    D_1 = eps(u_1, begin + r_1 * h) - eps_0
    bend = r_2 / r_1 * (np.expm1(r_2 * h) / (r_2 * h) - 1)
    u_2 = x - sigma(r_2) * (np.expm1(r_2 * h) * eps_0 + bend * D_1)
    D_2 = eps(u_2, begin + r_2 * h) - eps_0
    return x - sigma(1) * (np.expm1(h) * eps_0 + (np.expm1(h) / h - 1) / r_2 * D_2)


ways = st.tuples(st.floats(-4, 4), st.floats(0.01, 3) | st.floats(-3, -0.01))


@given(ways, st.sampled_from([1, 2, 3]))
@settings(deadline=None)
def test_rows_are_the_published_steps(way, order):
    begin, h = way
    leg = dpm_solver._leg(begin, begin + h, begin + h, 0.0, 1.0)
    rows = dpm_solver._rows(leg, dpm_solver.POINTS[order])
    assert [row.begins for row in rows] == [True, *[False] * (order - 1)]
    x = np.linspace(-2, 2, 9) * math.exp(-begin)
    seen = row_oracle.run(table_of(rows), x, row_oracle.posterior_mean)
    # A sum of a few terms of this size, and of their like with other points' σ.
    largest = max(1.0, np.abs(x).max()) * math.exp(2 * abs(h))
    np.testing.assert_allclose(
        seen[-1], by_eps(x, begin, begin + h, order), rtol=0, atol=1e-13 * largest
    )


@given(st.integers(1, 300))
def test_n_is_how_often_the_model_is_called(n):
    orders = dpm_solver._orders(n)
    assert sum(orders) == n
    assert set(orders[:-2]) <= {3} and (len(orders) < 2 or orders[-1] < 3)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_error_falls_with_the_order(order):
    counts, errors = np.array([20, 28, 40, 56]), []
    x = np.linspace(-2, 2, 9) * 20.0
    exact = row_oracle.along_the_flow(x, (1.0, 20.0), (1.0, 0.05))
    for steps in counts:
        log_snr, rows = np.linspace(-math.log(20.0), -math.log(0.05), steps + 1), []
        for at, to in zip(log_snr, log_snr[1:], strict=False):
            leg = dpm_solver._leg(at, to, log_snr[-1], 0.0, 1.0)
            rows += dpm_solver._rows(leg, dpm_solver.POINTS[order])
        last = row_oracle.run(table_of(rows), x, row_oracle.posterior_mean)[-1]
        errors.append(np.sqrt(np.mean((last - exact) ** 2)))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.25 <= slope <= order + 0.6


# --- What is around them --------------------------------------------------------------------------


def x_of(sigma):
    return start([sigma], torch.float32)


@pytest.mark.parametrize("order", [2, 3])
def test_a_tolerance_is_kept(order):
    """Against so many steps that they count as exact; and info says how often the model was
    called."""
    x, errors, calls = x_of(80.0), [], 0

    def counted(x, sigma):
        nonlocal calls
        calls += 1
        return model(x, sigma)

    exact = k_diffusion.sample_dpm_fast(model, x, *ENDS, 300, disable=True)
    for tolerance in (0.1, 0.01, 0.001):
        calls = 0
        given = {"rtol": tolerance, "atol": tolerance, "order": order, "return_info": True}
        result, info = k_diffusion.sample_dpm_adaptive(counted, x, *ENDS, disable=True, **given)
        assert calls == info["nfe"] == order * info["steps"]
        assert info["steps"] == info["n_accept"] + info["n_reject"]
        errors.append(float((result - exact).abs().max()))
        # The tolerance is one step's, and the error of its lower order.
        assert errors[-1] < 3 * tolerance
    assert errors == sorted(errors, reverse=True)


def test_there_and_back():
    """From noise to data, and from these up again."""
    x = x_of(80.0)
    for sampler, options in (
        (k_diffusion.sample_dpm_fast, {"n": 480}),
        (k_diffusion.sample_dpm_adaptive, {"rtol": 1e-3, "atol": 1e-3}),
    ):
        data = sampler(model, x, *ENDS, disable=True, **options)
        again = sampler(model, data, *ENDS[::-1], disable=True, **options)
        assert (data - x).abs().max() > 10
        # What rounding does to the data is there σ's 1600 times as much.
        torch.testing.assert_close(again, x, rtol=0, atol=2e-3 * float(x.abs().max()))


@pytest.mark.parametrize("left, steps", [(5e-5, 5), (5e-6, 4)])
def test_it_ends_where_less_than_1e_5_is_left(left, steps):
    """By steps of one length, which no coefficient changes, over 1 in λ."""
    given = {"icoeff": 0.0, "h_init": (1 - left) / 4, "return_info": True, "disable": True}
    _, info = k_diffusion.sample_dpm_adaptive(model, x_of(math.e), 1.0, math.e, **given)
    assert info["n_accept"] == info["steps"] == steps


def test_levels_may_be_tensors():
    x, ends = x_of(64.0), (0.0625, 64.0)  # the same numbers in float32
    for sampler, options in (("fast", {"n": 4}), ("adaptive", {})):
        sample = getattr(k_diffusion, f"sample_dpm_{sampler}")
        by_numbers = sample(model, x, *ends, disable=True, **options)
        by_tensors = sample(model, x, *torch.tensor(ends), disable=True, **options)
        assert torch.equal(by_tensors, by_numbers)


def test_low_precision():
    x = x_of(80.0)
    for sampler, options in (("fast", {"n": 9}), ("adaptive", {})):
        sample = getattr(k_diffusion, f"sample_dpm_{sampler}")
        exact = sample(model, x, *ENDS, disable=True, **options)
        given = sample(model, x.bfloat16(), *ENDS, disable=True, **options)
        assert given.dtype == torch.bfloat16
        assert (given.float() - exact).abs().max() < 0.05


def test_progress_bars(capsys):
    """A step of theirs is a call of the model."""
    x = torch.zeros(SHAPE)
    k_diffusion.sample_dpm_fast(model, x, *ENDS, 7, disable=False)
    assert "7/7" in capsys.readouterr().err
    _, info = k_diffusion.sample_dpm_adaptive(model, x, *ENDS, disable=False, return_info=True)
    assert f"{info['nfe']}it" in capsys.readouterr().err
    k_diffusion.sample_dpm_fast(model, x, *ENDS, 7, disable=True)
    k_diffusion.sample_dpm_adaptive(model, x, *ENDS, disable=True)
    assert not capsys.readouterr().err


def test_arguments_and_defaults_are_k_diffusions():
    both = "model, x, sigma_min, sigma_max, {}extra_args=None, callback=None, disable=None, "
    noise = "eta=0.0, s_noise=1.0, noise_sampler=None"
    own = (
        "order=3, rtol=0.05, atol=0.0078, h_init=0.05, pcoeff=0.0, icoeff=1.0, dcoeff=0.0, "
        "accept_safety=0.81, "
    )
    expected = {
        k_diffusion.sample_dpm_fast: both.format("n, ") + noise,
        k_diffusion.sample_dpm_adaptive: both.format("") + own + noise + ", return_info=False",
    }
    for sampler, arguments in expected.items():
        parameters = inspect.signature(sampler).parameters.values()
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        assert ", ".join(str(p).replace(" = ", "=") for p in plain) == arguments


SHARED = [
    ({"sigma_min": 0.0}, "sigma_min must be a positive number, got 0.0"),
    ({"sigma_max": math.inf}, "sigma_max must be a positive number, got inf"),
    ({"sigma_max": torch.zeros(2)}, "sigma_max must be a positive number, got tensor"),
    ({"sigma_min": 2.0, "sigma_max": 2.0}, "sigma_min and sigma_max are both 2.0; expected two"),
    ({"sigma_min": 8.0, "eta": 0.5}, "eta is 0.5, and sigma_min 8.0 is above sigma_max 2.0"),
    ({"eta": -0.1}, "eta is -0.1; expected a finite number of at least 0"),
    ({"s_noise": math.nan}, "s_noise is nan; expected"),
    ({"x": torch.zeros(4)}, "x is a Tensor; expected a tensor"),
    ({"x": torch.zeros(SHAPE).double()}, "float32, bfloat16 or float16"),
]
FAST = [({"n": n}, "n is .*; expected how often the model is called") for n in (0, -3, 2.5, None)]
ADAPTIVE = [
    ({"order": 1}, "order is 1; expected 2 or 3"),
    ({"order": 4}, "order is 4; expected 2 or 3"),
    ({"rtol": -1.0}, "rtol is -1.0; expected a finite number of at least 0"),
    ({"atol": math.inf}, "atol is inf; expected"),
    ({"h_init": 0.0}, "h_init must be a positive number, got 0.0"),
    ({"icoeff": math.nan}, "icoeff is nan; expected a finite number"),
    ({"accept_safety": "no"}, "accept_safety is 'no'; expected a finite number"),
    ({"accept_safety": 1.5}, "accept_safety is 1.5; expected at most 1"),
    ({"icoeff": -1.0, "h_init": 0.1}, "the step from sigma 2 has shrunk to nothing; expected larg"),
    ({"rtol": 0.0, "atol": 0.0}, "the step from sigma 2 has the error (inf|nan); expected"),
    ({"model": lambda x, sigma: x / 0}, "the step from sigma 2 has the error nan; expected"),
]


@pytest.mark.parametrize(
    "sampler, given, message",
    [
        *(("fast", *case) for case in SHARED + FAST),
        *(("adaptive", *case) for case in SHARED + ADAPTIVE),
    ],
)
def test_what_is_refused(sampler, given, message):
    call = {"model": model, "x": torch.ones(SHAPE), "sigma_min": 0.1, "sigma_max": 2.0}
    call |= {"n": 5} if sampler == "fast" else {}
    with pytest.raises(InputError, match=message):
        getattr(k_diffusion, f"sample_dpm_{sampler}")(**(call | given), disable=True)
