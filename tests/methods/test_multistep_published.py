"""The multistep methods against their authors' code and diffusers, x after every row in float64.

Recorded: tests/recorded/multistep.json has what the authors' own functions answered on data of two
widened points, whose x_0 is known in closed form: each call's x, and the last one. The script that
made it set PyTorch's default dtype to float64, gave the functions that x_0 as their model, and let
them run over given λ: UniPC.sample and DPM_Solver.sample (method="multistep") with a noise schedule
of these λ and of λ = 40, noise 4e-18, as its end; k-diffusion's sample_* with σ = e^−λ and 0, and
with the noise cos(j + 1.3·i) for element j of step i. The commits stand in the file.

diffusers: the installed schedulers, whose tables of σ (or ᾱ) were exchanged for float64 ones.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paths import RECORDED
from row_tools import Mixture, exploding, preserving, run, table_of

DATA = json.loads((RECORDED / "multistep.json").read_text())
MIXTURE = Mixture(DATA["means"], DATA["std"])
SPACES = {"preserving": preserving, "exploding": exploding}
X = np.array([-1.7, 0.3, 1.2])
Z = [np.cos(np.arange(3) + 1.3 * i) for i in range(12)]


def rows_of(log_snr, method, space=preserving, x=X, **options):
    """x after every row; ``log_snr`` in sampling order."""
    table = table_of(space(log_snr[::-1]), method, **options)
    return table, run(table, x, MIXTURE.x_start, z=Z)


def name(case):
    options = "-".join(f"{key}={value}" for key, value in case["options"].items())
    return f"{case['method']}-{options}-{len(case['log_snr'])}"


@pytest.mark.parametrize("case", DATA["cases"], ids=name)
def test_every_row_is_the_authors(case):
    start = np.array(case["calls"][0])
    table, after = rows_of(
        case["log_snr"], case["method"], SPACES[case["signal"]], start, **case["options"]
    )
    assert len(table) == len(case["calls"])  # as many network calls
    expected = np.array([*case["calls"][1:], case["result"]])
    largest = np.abs([start, *expected]).max()
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-14 * largest)


def grids(fewest=1, least=0.05, most=2.0):
    """λ in sampling order, rising by ``least`` to ``most`` a step."""
    rises = st.lists(st.floats(least, most), min_size=fewest - 1, max_size=19)
    return st.builds(lambda first, r: np.cumsum([first, *r]), st.floats(-4.0, 0.0), rises)


def diffusers_of(kind, log_snr, **config):
    """diffusers' scheduler over these λ and the data, told x_0 in float64."""
    import diffusers  # takes seconds to import

    steps = len(log_snr)
    scheduler = getattr(diffusers, kind)(
        num_train_timesteps=max(steps, 2), prediction_type="sample", **config
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.tensor([*np.exp(-log_snr), 0.0], dtype=torch.float64)
    scheduler.timesteps = torch.arange(steps).flip(0)
    scheduler.num_inference_steps = steps
    scheduler.set_begin_index(0)
    return scheduler


def their_steps(scheduler, x, levels):
    """x after every step, with the closed form's x_0 at each level's (signal, noise)."""
    x, after = x[:, None], []
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of tensors that diffusers makes by the way
    try:
        for t, (signal, noise) in zip(scheduler.timesteps, levels, strict=True):
            x_start = torch.from_numpy(MIXTURE.x_start(x, signal, noise))
            x = scheduler.step(x_start, t, torch.from_numpy(x)).prev_sample.numpy()
            after.append(x[:, 0])
    finally:
        torch.set_default_dtype(before)
    return after


def rounding(grid, order):
    """What both computations are apart by: a step that is many times the one before gives kept
    values as large weights, of both signs."""
    rises = np.diff(grid)
    longer = max([1.0, *(rises[1:] / rises[:-1])])
    return 1e-11 * longer ** (order - 1)


def check_steps(actual, expected, rtol=1e-11):
    if expected:
        largest = max(1.0, np.abs(np.array(expected)).max())
        np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * largest)


@settings(deadline=None, max_examples=40)
@given(
    grid=grids(least=0.5),  # a step many times the last multiplies their rounding
    solver_type=st.sampled_from(["midpoint", "heun"]),
    lower=st.booleans(),
)
def test_third_order_dpmsolver_is_diffusers(grid, solver_type, lower):
    """To float32, in which this scheduler takes x. Its SDE's third order is left out: there the
    factor of the second difference has −½ where k-diffusion has +½, and is −1 at h = 0, not 0."""
    options = {"solver_type": solver_type, "lower_order_final": lower}
    table, after = rows_of(grid, "dpmsolver++3m", **options)
    scheduler = diffusers_of(
        "DPMSolverMultistepScheduler",
        grid,
        solver_order=3,
        final_sigmas_type="zero",
        **options,
    )
    check_steps(after, their_steps(scheduler, X, table.levels), rtol=2e-6)


@settings(deadline=None, max_examples=40)
@given(
    grid=grids(),
    order=st.integers(1, 3),
    variant=st.sampled_from(["bh1", "bh2"]),
    corrector=st.booleans(),
)
def test_unipc_is_diffusers(grid, order, variant, corrector):
    table, after = rows_of(grid, "unipc", order=order, variant=variant, corrector=corrector)
    scheduler = diffusers_of(
        "UniPCMultistepScheduler",
        grid,
        solver_order=order,
        solver_type=variant,
        disable_corrector=[] if corrector else list(range(len(grid))),
        final_sigmas_type="zero",
    )
    expected = their_steps(scheduler, X, table.levels)
    if variant == "bh1":  # diffusers' B(h) = −∞ times 0 is NaN in the last step
        assert np.isnan(expected.pop()).all()
        np.testing.assert_allclose(
            after.pop(), MIXTURE.x_start([X, *after][-1], *table.levels[-1]), rtol=1e-12
        )
    check_steps(after, expected, rounding(grid, order + 1))  # the corrector's


@settings(deadline=None, max_examples=40)
@given(grid=grids(), order=st.integers(1, 3))
def test_deis_is_diffusers_but_for_the_last_step(grid, order):
    """diffusers ends at its least σ again; ours arrives at the data, by DDIM."""
    table, after = rows_of(grid, "deis", order=order)
    scheduler = diffusers_of("DEISMultistepScheduler", grid, solver_order=order)
    scheduler.sigmas[-1] = scheduler.sigmas[-2] / 2  # where the last step goes does not count
    expected = their_steps(scheduler, X, table.levels)[:-1]
    check_steps(after[:-1], expected, rounding(grid, order))
    last = MIXTURE.x_start([X, *after][-2], *table.levels[-1])
    np.testing.assert_allclose(after[-1], last, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(grid=grids(), order=st.integers(1, 4))
def test_lms_is_diffusers(grid, order):
    table, after = rows_of(grid, "lms", exploding, x=5 * X, order=order)
    scheduler = diffusers_of("LMSDiscreteScheduler", grid)
    scheduler.is_scale_input_called = True
    step = scheduler.step
    scheduler.step = lambda *arguments: step(*arguments, order=order)
    check_steps(after, their_steps(scheduler, 5 * X, table.levels), rounding(grid, order))


@settings(deadline=None, max_examples=40)
@given(grid=grids(fewest=2, most=0.5))  # its list of steps needs two, and its 1 − ᾱ digits
def test_pndm_is_diffusers_without_its_runge_kutta_steps(grid):
    import diffusers  # takes seconds to import

    table, after = rows_of(grid, "pndm")
    scheduler = diffusers.PNDMScheduler(
        num_train_timesteps=len(grid),
        skip_prk_steps=True,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(len(grid))
    scheduler.alphas_cumprod = torch.tensor(1 / (1 + np.exp(-2 * grid[::-1])))
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    x, expected = X, []
    for t, (signal, noise) in zip(scheduler.timesteps, table.levels, strict=True):
        eps = (x - signal * MIXTURE.x_start(x, signal, noise)) / noise
        x = scheduler.step(torch.from_numpy(eps), int(t), torch.from_numpy(x)).prev_sample.numpy()
        expected.append(x)
    check_steps(after, expected, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_in_t_integrates_lagrange_polynomials_of_the_timestep(order):
    """The paper's C_ij by scipy, on the linear VP-SDE: ½∫ Ψ(t', τ)·β(τ)/σ(τ)·Π (τ − t_k)/(t_j −
    t_k) dτ, of which Ψ is signal'/signal(τ)."""
    integrate = pytest.importorskip("scipy.integrate")
    beta_0, beta_1 = 0.1, 20.0

    def signal(t):
        return np.exp(-(t**2) * (beta_1 - beta_0) / 4 - t * beta_0 / 2)

    def noise(t):
        return np.sqrt(-np.expm1(2 * np.log(signal(t))))

    def log_snr(t):
        return np.log(signal(t) / noise(t))

    def at_log_snr(values):
        grid = np.linspace(1e-4, 1, 20001)
        t = np.interp(-np.sort(values)[::-1], -log_snr(grid), grid)
        for _ in range(3):  # Newton's method; dλ/dt = −β(t) / (2·noise²)
            slope = -(beta_0 + t * (beta_1 - beta_0)) / (2 * noise(t) ** 2)
            t = t - (log_snr(t) - np.sort(values)[::-1]) / slope
        return process_at(t)

    def process_at(t):
        made = preserving(log_snr(t), at_log_snr=at_log_snr)
        made.model_timesteps = t
        return made

    t = np.linspace(0.02, 1, 17)
    table = table_of(process_at(t), "deis", order=order, variable="t")
    calls = []

    def x_start(x, s, n):
        calls.append((x, MIXTURE.x_start(x, s, n)))
        return calls[-1][1]

    after = run(table, X, x_start)
    down = t[::-1]
    eps = [(x - signal(u) * x_0) / noise(u) for (x, x_0), u in zip(calls, down, strict=True)]
    for i in range(16):
        nodes = [i - j for j in range(min(order, i + 1))]
        x = signal(down[i + 1]) / signal(down[i]) * calls[i][0]
        for j in nodes:

            def integrand(tau, j=j, nodes=nodes, i=i):
                others = [k for k in nodes if k != j]
                basis = np.prod([(tau - down[k]) / (down[j] - down[k]) for k in others])
                psi = signal(down[i + 1]) / signal(tau)
                return psi * (beta_0 + tau * (beta_1 - beta_0)) / (2 * noise(tau)) * basis

            x = x + integrate.quad(integrand, down[i], down[i + 1], epsabs=1e-13)[0] * eps[j]
        np.testing.assert_allclose(after[i], x, rtol=0, atol=1e-10)
    np.testing.assert_allclose(after[-1], calls[-1][1], rtol=1e-12)


def test_ipndm_is_adams_bashforth_over_equal_steps():
    """Of x/signal by σ, with σ a polynomial in the number of the step: exact for ε of degree 3."""
    table = table_of(exploding(-np.log(np.arange(1.0, 13))), "ipndm")
    sigma = table.levels[:, 1]

    def moving(u):  # ε as a function of σ alone
        return 0.3 - 0.2 * u + 0.05 * u**2 - 0.004 * u**3

    def x_start(x, signal, noise):
        return x - noise * moving(noise)

    after = np.array(run(table, np.zeros(1), x_start)).ravel()
    integral = np.polynomial.Polynomial([0.3, -0.2, 0.05, -0.004]).integ()
    exact = integral(np.append(sigma, 0.0))
    steps = np.diff(after[2:]) - np.diff(exact)[3:]  # the first three rows are of lower orders
    np.testing.assert_allclose(steps, 0, atol=1e-12)
    assert abs(np.diff(after[:3]) - np.diff(exact)[1:3]).min() > 1e-3


def test_the_recorded_cases_are_all_of_them():
    methods = {case["method"] for case in DATA["cases"]}
    assert methods == {
        "unipc", "lms", "dpmsolver++", "dpmsolver++3m", "sde-dpmsolver++", "sde-dpmsolver++3m",
    }  # fmt: skip
    pairs = itertools.product(("bh1", "bh2"), (1, 2, 3))
    seen = [case["options"] for case in DATA["cases"] if case["method"] == "unipc"]
    assert all({"order": order, "variant": variant} in seen for variant, order in pairs)
