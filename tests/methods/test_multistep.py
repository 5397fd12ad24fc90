"""The multistep methods' orders of convergence, the line of a known x_0, first and last rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import InputError
from fastdiff.methods.rows import SLOTS, phi
from fastdiff.methods.table import StepTable
from fastdiff.process.edm import EDM
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.schedules import get_named_beta_schedule, rescale_zero_terminal_snr
from fastdiff.sampling.sampler import Sampler
from row_tools import Mixture, arrivals, exploding, preserving, process, run, table_of

NAMED = ("c", "d", "e0", "e1", "e2")
MIXTURE = Mixture([-0.6, 0.7], 0.25)
X = np.linspace(-2, 2, 9)
# Every method with options that change its rows, and the order that it converges with.
ORDERS = [
    ("dpmsolver++", {}, 2),
    ("dpmsolver++", {"solver_type": "heun"}, 2),
    ("dpmsolver++3m", {}, 2),  # as published; see dpmsolver.py
    ("sde-dpmsolver++", {"eta": 0.0}, 2),
    ("sde-dpmsolver++3m", {"eta": 0.0}, 2),
    ("unipc", {"order": 1, "corrector": False}, 1),
    ("unipc", {"order": 1}, 2),
    ("unipc", {"order": 2, "corrector": False}, 2),
    ("unipc", {"order": 2}, 3),
    ("unipc", {"order": 2, "variant": "bh1"}, 3),
    ("unipc", {"order": 3, "corrector": False}, 3),
    ("unipc", {}, 3),  # the step's is 4, but not that of the first two
    ("lms", {"order": 1}, 1),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 3}, 3),
    ("deis", {"order": 1}, 1),
    ("deis", {"order": 2}, 2),
    ("deis", {}, 3),
    ("pndm", {"order": 1}, 1),
    ("pndm", {"order": 2}, 2),
    ("pndm", {}, 2),  # its weights are of equal steps in t
    ("ipndm", {}, 2),
]
OPTIONS = [*ORDERS, ("lms", {}, 4), ("deis", {"order": 4}, 4), ("sde-dpmsolver++3m", {}, 0)]
every_method = pytest.mark.parametrize(
    "method, options", [case[:2] for case in OPTIONS], ids=lambda value: str(value)
)
chosen_methods = st.sampled_from([case[:2] for case in OPTIONS])


def stretched(count, low=3.0, high=-3.0):
    """λ of ascending t, not equally far apart."""
    u = np.linspace(0, 1, count)
    return low + (high - low) * (u + 0.3 * np.sin(2 * np.pi * u) / (2 * np.pi))


def before_the_data(space, steps, method, **options):
    """x at λ = 3 after so many steps from λ = −3, before the last row."""
    table = table_of(space(stretched(steps + 1)), method, **options)
    return run(table, X, MIXTURE.x_start)[-2]


@pytest.mark.parametrize("space", [preserving, exploding])
@pytest.mark.parametrize("method, options, order", ORDERS, ids=str)
def test_order_of_convergence(method, options, order, space):
    """Of two points' ODE, on unequal steps: four times the steps, an error of 4^−order."""
    exact = before_the_data(space, 2000, "unipc")
    most = 1024 if "3m" in method else 256  # its errors of order 2 and 3 are long of one size
    errors = [
        np.sqrt(np.mean((before_the_data(space, steps, method, **options) - exact) ** 2))
        for steps in (most // 4, most)
    ]
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("method, options", [("lms", {}), ("deis", {"order": 4})])
def test_order_four_after_its_first_rows(method, options):
    """One step from exact ε: the first rows, of lower orders, would hide the fourth."""

    def error_of_one_step(rise):
        table = table_of(preserving(-rise * np.arange(12.0)), method, **options)
        signal, noise = table.levels.T
        log_snr = np.log(signal / noise)

        def x_start(x, signal, noise):  # of an ε that depends on λ alone
            return (x - noise * np.cos(np.log(signal / noise))) / signal

        after = np.array(run(table, np.zeros(1), x_start)).ravel()
        rho = np.exp(-log_snr)
        points, shares = np.polynomial.legendre.leggauss(20)
        i = 8  # of 12: from level 8 to 9
        u = (rho[i] + rho[i + 1]) / 2 + points * (rho[i + 1] - rho[i]) / 2
        moved = np.sum(shares * np.cos(-np.log(u))) * (rho[i + 1] - rho[i]) / 2
        return abs(after[i] / signal[i + 1] - after[i - 1] / signal[i] - moved) / rho[i]

    errors = [error_of_one_step(rise) for rise in (0.1, 0.025)]
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(5, abs=0.3)


def moments(table, mean, std):
    """The mean and standard deviation of x before the last row, of data N(mean, std²).

    Their x_0 is linear in x, so that x is a sum over x_T, each row's z and 1: its coefficients.
    """

    def x_start(x, signal, noise):
        variance = signal**2 * std**2 + noise**2
        predicted = signal * std**2 / variance * x
        predicted[-1] += mean * noise**2 / variance
        return predicted

    signal, noise = table.levels[0]
    x_T = np.zeros(len(table) + 2)
    x_T[0], x_T[-1] = np.hypot(signal * std, noise), signal * mean
    *of_noise, constant = run(table, x_T, x_start, z=np.eye(len(table), len(x_T), 1))[-2]
    return np.array([constant, np.linalg.norm(of_noise)])


@pytest.mark.parametrize("space", [preserving, exploding])
@pytest.mark.parametrize(
    "method, options, order",
    [
        ("ddpm", {}, 1),
        ("sde-dpmsolver++", {}, 2),
        ("sde-dpmsolver++", {"solver_type": "heun"}, 2),
        ("sde-dpmsolver++", {"eta": 0.5}, 2),
        ("sde-dpmsolver++3m", {}, 2),  # as published; see dpmsolver.py
        ("sde-dpmsolver++3m", {"eta": 2.0}, 2),
    ],
    ids=str,
)
def test_order_of_convergence_of_the_marginal(method, options, order, space):
    """What SDE solvers are judged by: the distribution of x, here without a random number."""
    errors = []
    for steps in (64, 256):
        table = table_of(space(stretched(steps + 1)), method, **options)
        signal, noise = table.levels[-1]
        exact = np.array([signal * 0.4, np.hypot(signal * 0.3, noise)])
        errors.append(np.linalg.norm(moments(table, 0.4, 0.3) - exact))
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(order, abs=0.2)


@settings(deadline=None, max_examples=100)
@given(
    chosen=chosen_methods,
    drops=st.lists(st.floats(0.01, 3.0), min_size=1, max_size=18),
    first=st.floats(-1.0, 6.0),
    radii=st.lists(st.floats(0.3, 20.0), min_size=18, max_size=18),
)
def test_a_known_x_start_stays_on_its_line(chosen, drops, first, radii):
    """With one x_0 predicted throughout, each row leads from signal·x_0 + noise·ε to the next
    level's, for any signal and noise; of SDEs the mean, and the variance."""
    method, options = chosen
    log_snr = first - np.cumsum(drops)
    radius = np.array(radii[: len(drops)])
    noise = radius / np.hypot(1, np.exp(log_snr))
    made = process(noise * np.exp(log_snr), noise)
    table = table_of(made, method, **options)
    x_0, eps = np.array([0.7]), np.array([-0.4])
    x = table.levels[0] @ np.concatenate([x_0, eps])
    zeros = [np.zeros(1)] * len(table)
    after = run(table, np.array([x]), lambda *_: x_0, z=zeros)
    size = 1.0 + np.abs(table.levels).max() * sum(float(c.abs().max()) for c in factors(table))
    each = zip(arrivals(table), after, rows_of(table), grown_rounding(table), strict=True)
    left = eps.copy()
    for (s, n), made_x, row, grown in each:
        if row["sigma"]:  # of an SDE's row, which reads no ε: d·(what is left of it)
            left = left * row["d"] * row["noise"] / n if n else left
            assert (row["d"] * row["noise"]) ** 2 + row["sigma"] ** 2 == pytest.approx(n**2)
        bound = 1e-11 * size + 4 * grown
        np.testing.assert_allclose(made_x, s * x_0 + n * left, rtol=0, atol=bound)


def grown_rounding(table):
    """What an ulp of every term of an x of |x_0| and |ε| ≤ 1 has grown to after each row: rows hand
    errors on by d and e, and on uneven steps those of high order multiply them."""
    ulp, x_error, kept_error = np.finfo(float).eps, 0.0, np.zeros(SLOTS)
    kept, grown = np.zeros(SLOTS), []
    values = {name: getattr(table, name).double().abs().numpy() for name in (*NAMED, "k", "q")}
    for i, (signal, noise) in enumerate(table.levels):
        row = {name: value[i] for name, value in values.items()}
        e, x = np.array([row["e0"], row["e1"], row["e2"]]), signal + noise
        # d is itself a difference of numbers as large as e over the noise.
        terms = row["c"] + (row["d"] + e.sum() / noise) * x + e @ kept
        made_error = row["d"] * x_error + e @ kept_error + ulp * terms
        if (slot := int(table.slot[i])) >= 0:
            kept[slot] = row["k"] + row["q"] * x
            kept_error[slot] = row["q"] * x_error + ulp * kept[slot]
        x_error = made_error
        grown.append(made_error)
    return grown


def factors(table):
    return [getattr(table, name) for name in NAMED]


def rows_of(table):
    names = ("d", "sigma")
    return [
        {name: float(getattr(table, name)[i]) for name in names} | {"noise": table.levels[i, 1]}
        for i in range(len(table))
    ]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@every_method
def test_few_steps(method, options, steps):
    """Fewer than the order: the orders that there are, and a last row that is finite."""
    table = table_of(preserving(np.linspace(2, -2, steps)), method, **options)
    extra = 1 if method == "pndm" and steps > 1 and options.get("order") != 1 else 0
    assert len(table) == steps + extra and not table.reading_rows[0]
    assert table.begins == (True, *(False,) * extra, *(True,) * (steps - 1))
    after = run(table, X, MIXTURE.x_start, z=np.zeros((steps, 9)))  # NaN where unwritten is read
    assert np.isfinite(after).all()
    if method not in ("lms", "pndm", "ipndm"):  # the last row is of first order, x_0 itself
        np.testing.assert_array_equal(
            [float(column[-1]) for column in factors(table)], [1, 0, 0, 0, 0]
        )


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@every_method
def test_no_signal_at_the_first_level(method, options, steps):
    """λ = −∞: the first row is DDIM's (of SDEs the posterior's), the second reads nothing."""
    made = preserving(np.linspace(2, -2, steps))
    made.signal_scale = np.append(made.signal_scale[:-1], 0.0)
    made.noise_scale = np.append(made.noise_scale[:-1], 1.0)
    table = table_of(made, method, **options)
    assert len(table) == steps and torch.isfinite(table.packed[:, :-6]).all()
    assert not any(table.reading_rows[:2]) and table.slots_written[0] == -1
    eta = {"eta": 1.0} if options.get("eta", 1.0) and "sde" in method else {}
    first = table_of(made, "ddim", **eta)
    for name in ("c", "d", "sigma"):
        assert float(getattr(table, name)[0]) == pytest.approx(float(getattr(first, name)[0]))
    if steps > 1 and method != "pndm":  # what follows is the way without that level
        rest = table_of(process(made.signal_scale[:-1], made.noise_scale[:-1]), method, **options)
        z = np.cos(np.arange(9.0) * np.arange(steps)[:, None])
        beginning, *expected = run(table, X, MIXTURE.x_start, z=z)
        actual = run(rest, beginning, MIXTURE.x_start, z=z[1:])
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)


def test_zero_terminal_snr_of_a_schedule():
    betas = rescale_zero_terminal_snr(get_named_beta_schedule("linear", 1000))
    whole = GaussianDiffusion(betas, mean_type="v")
    exact = run(table_of(whole, "unipc"), X, MIXTURE.x_start)[-1]
    for method, options, _ in OPTIONS:
        table = table_of(whole.respace("50"), method, **options)
        last = run(table, X, MIXTURE.x_start, z=np.zeros((50, 9)))[-1]
        if table.is_noisy:
            assert np.isfinite(last).all()
        else:
            assert np.sqrt(np.mean((last - exact) ** 2)) < 0.12


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("mean_type", ["epsilon", "v"])
@every_method
def test_the_sampler_runs_the_rows(method, options, mean_type, clip):
    """In float32, with a network that says ε or v and not x_0, on memory of its own."""
    whole = GaussianDiffusion(get_named_beta_schedule("cosine", 100), mean_type=mean_type)
    scales = whole.signal_scale, whole.noise_scale
    narrow = Mixture([-0.9, 0.9], 0.2)  # x_0 beyond 1 at times, so that clipping counts

    def network(x, t):
        signal, noise = (scale[int(t[0])] for scale in scales)
        x = x.double().numpy()
        x_0 = narrow.x_start(x, signal, noise)
        eps = (x - signal * x_0) / noise
        return torch.from_numpy(eps if mean_type == "epsilon" else signal * eps - noise * x_0)

    made = whole.respace(timesteps=[1, 7, 20, 31, 45, 60, 77, 90])
    settings = {"method": method, "clip_denoised": clip} | options
    table = StepTable.from_process(made, **settings)
    noise = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
    z = torch.cos(torch.arange(len(table) * 9.0)).view(len(table), 1, 1, 3, 3)
    sampler = Sampler(lambda x, t: network(x, t).float(), table)
    sampled = sampler.sample((1, 1, 3, 3), noise=noise, step_noise=lambda t: z[len(table) - 1 - t])
    exact = table_of(made, **settings)
    wanted = run(exact, noise.double().numpy(), narrow.x_start, z=z.double().numpy())[-1]
    np.testing.assert_allclose(sampled, wanted, rtol=0, atol=2e-5)
    other = run(
        table_of(made, **settings | {"clip_denoised": not clip}),
        noise.double().numpy(), narrow.x_start, z=z.double().numpy(),
    )[-1]  # fmt: skip
    assert np.abs(other - wanted).max() > 1e-3


@settings(deadline=None, max_examples=60)
@given(chosen=chosen_methods, steps=st.integers(5, 20), data=st.data())
def test_a_later_start_is_the_shorter_way(chosen, steps, data):
    method, options = chosen
    start = data.draw(st.integers(0, steps - options.get("order", 1)))
    later = table_of(preserving(stretched(steps)), method, start=start, **options)
    shorter = table_of(preserving(stretched(steps)[: steps - start]), method, **options)
    assert torch.equal(later.packed, shorter.packed)


def test_order_by_row():
    """Which rows read how many kept values, from the first to the last."""

    def reads(steps, method, **options):
        table = table_of(preserving(stretched(steps)), method, **options)
        return [sum(bool(e) for e in row) for row in table.packed[:, 5:8].tolist()]

    assert reads(6, "dpmsolver++") == [0, 1, 1, 1, 1, 0]
    assert reads(6, "dpmsolver++3m") == [0, 1, 2, 2, 1, 0]
    assert reads(6, "dpmsolver++3m", lower_order_final=False) == [0, 1, 2, 2, 2, 0]
    assert reads(6, "sde-dpmsolver++3m") == [0, 1, 2, 2, 2, 0]
    assert reads(15, "dpmsolver++3m") == [0, 1] + [2] * 12 + [0]
    assert reads(6, "unipc", corrector=False) == [0, 1, 2, 2, 1, 0]
    assert reads(6, "unipc") == [0, 1, 2, 3, 3, 0]  # with the correction of the step before
    assert reads(6, "lms") == [0, 1, 2, 3, 3, 3]
    assert reads(6, "deis", order=4) == [0, 1, 2, 2, 1, 0]
    assert reads(16, "deis", order=4) == [0, 1, 2] + [3] * 12 + [0]
    assert reads(4, "pndm") == [0, 1, 1, 2, 3]
    assert reads(5, "ipndm") == [0, 1, 2, 3, 3]


def test_unipc_without_corrector_is_2m_at_order_two():
    """UniP-2 by B_2 = e^h − 1 is the midpoint form of DPM-Solver++(2M)."""
    for space in (preserving, exploding):
        made = space(stretched(12))
        unip = table_of(made, "unipc", order=2, corrector=False)
        solver = table_of(made, "dpmsolver++")
        np.testing.assert_allclose(unip.packed[:-1, 2:8], solver.packed[:-1, 2:8], atol=1e-14)


def test_at_eta_zero_the_sde_solvers_are_the_odes():
    made = preserving(stretched(16))
    for order in ("", "3m"):
        options = {"solver_type": "heun"} | ({"lower_order_final": False} if order else {})
        sde = table_of(made, f"sde-dpmsolver++{order}", eta=0.0, **options)
        ode = table_of(made, f"dpmsolver++{order}", **options)
        assert torch.equal(sde.packed, ode.packed) and not sde.is_noisy


def test_deis_in_t_is_in_log_rho_where_the_timestep_is_log_sigma():
    """EDM's c_noise = log(σ)/4, in float32, from which its timesteps come."""
    made = EDM(16)
    for order in (2, 3, 4):
        in_t, in_log_rho = (
            factors(table_of(made, "deis", variable=variable, order=order))
            for variable in ("t", "logrho")
        )
        for one, other in zip(in_t, in_log_rho, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("unipc", {"order": 4}, "order is 4; expected an integer from 1 to 3"),
        ("unipc", {"order": 0}, "order is 0; expected an integer from 1 to 3"),
        ("unipc", {"order": 2.0}, "order is 2.0; expected an integer from 1 to 3"),
        ("unipc", {"variant": "bh3"}, "variant is 'bh3'; expected bh1 or bh2"),
        ("lms", {"order": 5}, "order is 5; expected an integer from 1 to 4"),
        ("deis", {"order": True}, "order is True; expected an integer from 1 to 4"),
        ("deis", {"variable": "rho"}, "variable is 'rho'; expected logrho or t"),
        ("deis", {"variable": "t"}, "has no at_log_snr"),
        ("pndm", {"order": 5}, "order is 5; expected an integer from 1 to 4"),
        ("ipndm", {"order": -1}, "order is -1; expected an integer from 1 to 4"),
        ("dpmsolver++", {"solver_type": "euler"}, "solver_type is 'euler'; expected midpoint or"),
        ("sde-dpmsolver++3m", {"eta": -1.0}, "eta is -1.0; expected ≥ 0"),
        ("sde-dpmsolver++", {"eta": math.nan}, "eta is nan; expected ≥ 0"),
        ("dpmsolver++3m", {"eta": 0.5}, "eta=0.5 belongs to method"),
        ("dpmsolver++3m", {"order": 3}, "order=3 belongs to method"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(InputError, match=message):
        table_of(preserving(stretched(5)), method, **options)


@pytest.mark.parametrize("method, most", [("unipc", 3), ("deis", 4), ("lms", 4), ("ipndm", 4)])
def test_an_order_takes_as_many_steps(method, most):
    """The usual order is lowered where there are fewer; one that was asked for is not."""
    for steps in range(1, most + 2):
        made = preserving(stretched(steps) if steps > 1 else [0.0])
        assert len(StepTable.from_process(made, method=method)) == steps
        for order in range(1, most + 1):
            if order <= steps:
                assert len(StepTable.from_process(made, method=method, order=order)) == steps
                continue
            with pytest.raises(InputError, match=f"order is {order}.*; {steps} are taken"):
                StepTable.from_process(made, method=method, order=order)
    # A start in the middle leaves fewer steps, and takes what order it can.
    assert len(table_of(preserving(stretched(6)), method, order=most, start=5)) == 1


@settings(deadline=None)
@given(order=st.integers(0, 4), h=st.floats(-4.0, 8.0))
def test_phi_is_its_integral(order, h):
    """φ_k(−h) = ∫ e^(−h(1 − τ))·τ^(k − 1)/(k − 1)! dτ over 0 … 1, φ_0 = e^−h."""
    points, shares = np.polynomial.legendre.leggauss(40)
    tau = (1 + points) / 2
    wanted = math.exp(-h)
    if order:
        kernel = np.exp(-h * (1 - tau)) * tau ** (order - 1) / math.factorial(order - 1)
        wanted = float(np.sum(shares * kernel)) / 2
    assert phi(order, h) == pytest.approx(wanted, rel=1e-12)
