import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import InputError
from fastdiff.methods import registry
from fastdiff.methods.levels import MEAN_TYPES, VAR_TYPES
from fastdiff.methods.registry import METHODS
from fastdiff.methods.rows import SLOTS
from fastdiff.methods.table import COLUMNS, StepTable
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.schedules import get_named_beta_schedule, rescale_zero_terminal_snr
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas

# Methods that take networks off the process's steps.
BETWEEN = ("dpm_2", "restart", "sde-dpmsolver++2s")


def levels(signal, noise, mean_type="epsilon", var_type="fixed_small", **extra):
    """Any Gaussian process, by its two scales; between its steps it preserves variance."""
    extra = {"input_scale": np.ones(len(signal))} | extra

    def at_log_snr(values):
        sigma = np.exp(-np.sort(values)[::-1])
        return levels((1 + sigma**2) ** -0.5, (1 + sigma**-2) ** -0.5, mean_type, var_type)

    return SimpleNamespace(
        at_log_snr=at_log_snr,
        signal_scale=np.asarray(signal, dtype=np.float64),
        noise_scale=np.asarray(noise, dtype=np.float64),
        model_timesteps=np.arange(len(signal), dtype=np.float32),
        mean_type=mean_type,
        var_type=var_type,
        **extra,
    )


def cosine(steps=40, **types):
    return GaussianDiffusion(get_named_beta_schedule("cosine", steps), **types)


def ascending(column):
    """A column of the table in the order of t, as float64."""
    return column.flip(0).double().numpy()


@pytest.mark.parametrize("schedule, steps", [("linear", 1000), ("cosine", 4000), ("cosine", 7)])
@pytest.mark.parametrize("respacing", ["", "5"])
def test_ddpm_rows_are_the_posterior_and_the_prediction(schedule, steps, respacing):
    diffusion = GaussianDiffusion(get_named_beta_schedule(schedule, steps)).respace(respacing)
    table = StepTable.from_process(diffusion)
    assert len(table) == diffusion.num_timesteps
    expected = {
        "a": 1 / diffusion.sqrt_alphas_cumprod,
        "b": -np.sqrt(1 / diffusion.alphas_cumprod - 1),
        "c": diffusion.posterior_mean_coef1,
        "d": diffusion.posterior_mean_coef2,
        "o": np.zeros(len(table)),
        "e0": np.zeros(len(table)),
        "sigma": np.sqrt(diffusion.posterior_variance),
        "clip": np.ones(len(table)),
        "timesteps": diffusion.model_timesteps,
        "input_scale": np.ones(len(table)),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            ascending(getattr(table, name)), values, rtol=1e-6, atol=1e-12, err_msg=name
        )
    assert table.sigma[-1] == 0 and table.noisy_rows == (True,) * (len(table) - 1) + (False,)


def test_fixed_large_learned_and_learned_range_variances():
    large = StepTable.from_process(cosine(var_type="fixed_large"))
    diffusion = cosine(var_type="learned_range")
    np.testing.assert_allclose(ascending(large.sigma)[1:], np.sqrt(diffusion.betas[1:]), rtol=1e-6)
    assert large.sigma[-1] == 0 and not large.doubled_output

    ranged = StepTable.from_process(diffusion)
    assert ranged.learned_variance and ranged.doubled_output
    np.testing.assert_allclose(ascending(ranged.log_max), np.log(diffusion.betas), rtol=1e-6)
    np.testing.assert_allclose(
        ascending(ranged.log_min), diffusion.posterior_log_variance_clipped, rtol=1e-6
    )
    assert ranged.sigma.tolist() == [1.0] * 39 + [0.0]

    learned = StepTable.from_process(cosine(var_type="learned"))
    assert learned.log_max.unique().tolist() == [1.0] and learned.log_min.unique().tolist() == [
        -1.0
    ]


def test_ddim_rows_follow_equation_12():
    diffusion = cosine()
    ac, prev = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    for eta in (0.0, 0.3, 1.0):
        table = StepTable.from_process(diffusion, method="ddim", eta=eta)
        sigma = eta * np.sqrt((1 - prev) / (1 - ac) * (1 - ac / prev))
        towards_x_t = np.sqrt(np.maximum(1 - prev - sigma**2, 0))  # the coefficient of ε
        d = towards_x_t / np.sqrt(1 - ac)
        np.testing.assert_allclose(ascending(table.sigma), sigma, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(ascending(table.d), d, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(
            ascending(table.c), np.sqrt(prev) - d * np.sqrt(ac), rtol=1e-6, atol=1e-7
        )
        assert any(table.noisy_rows) == (eta > 0)


def test_ddim_with_eta_one_is_ddpm_with_the_small_variance():
    for process in (cosine(), VarianceExploding(geometric_sigmas(30))):
        ddim = StepTable.from_process(process, method="ddim", eta=1.0)
        ddpm = StepTable.from_process(process)
        torch.testing.assert_close(ddim.packed, ddpm.packed, rtol=1e-6, atol=1e-6)


def test_ddim_with_the_networks_own_eps_differs_only_where_x_start_is_clipped():
    rng = np.random.default_rng(0)
    x_t, output = rng.normal(size=(2, 50))
    for mean_type in MEAN_TYPES:
        process = cosine(mean_type=mean_type)
        plain = StepTable.from_process(process, method="ddim", eta=0.4)
        own = StepTable.from_process(process, method="ddim", eta=0.4, clipped_eps=False)
        for i in range(len(plain)):
            answers = []
            for table in (plain, own):
                row = {name: float(getattr(table, name)[i]) for name in COLUMNS}
                x_0 = row["a"] * x_t + row["b"] * output
                answers.append(row["c"] * x_0 + row["d"] * x_t + row["o"] * output)
            np.testing.assert_allclose(*answers, rtol=2e-4, atol=2e-4 * np.abs(x_0).max())
        if mean_type == "epsilon":  # then ε is the output itself
            assert not own.d.any()


def test_previous_x_takes_the_output_as_the_mean():
    diffusion = cosine(mean_type="previous_x")
    table = StepTable.from_process(diffusion)
    assert table.o.unique().tolist() == [1.0]
    assert not table.c.any() and not table.d.any()
    # x_0 = (x_prev − coef2·x_t)/coef1 undoes the posterior mean coef1·x_0 + coef2·x_t.
    coef1, coef2 = diffusion.posterior_mean_coef1, diffusion.posterior_mean_coef2
    np.testing.assert_allclose(ascending(table.b) * coef1, 1, rtol=1e-6)
    np.testing.assert_allclose(ascending(table.a) + ascending(table.b) * coef2, 0, atol=1e-5)


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_true_prediction_returns_x_start_and_arrives_at_it(mean_type, method):
    """With the network's exact answer for one x_0, every row finds x_0 and keeps the marginals."""
    if mean_type == "previous_x" and method in BETWEEN:
        pytest.skip("such a network knows its own steps alone")
    for process in (
        cosine(30, mean_type=mean_type),
        levels(np.ones(30), geometric_sigmas(30), mean_type),
    ):
        table = StepTable.from_process(process, method=method, clip_denoised=False)
        signal, noise = process.signal_scale, process.noise_scale
        # A row of this one repeats noise of the row before, which no x on a line through ε tells.
        x_0, eps = 0.7, 0.0 if method == "sde-dpmsolver++2s" else -0.4
        posterior = StepTable.from_process(levels(signal, noise))
        memory = [math.nan] * SLOTS
        arrivals = [*table.levels[1:], (1.0, 0.0)]
        for i, ((s, n), (s_prev, n_prev)) in enumerate(zip(table.levels, arrivals, strict=True)):
            step = len(noise) - 1 - int(np.searchsorted(noise, n))  # the row of a one-row method
            x_t = s * x_0 + n * eps
            r = np.hypot(s, n)
            previous_mean = float(posterior.c[step]) * x_0 + float(posterior.d[step]) * x_t
            output = {
                "epsilon": eps,
                "x_start": x_0,
                "v": (s * eps - n * x_0) / r,
                "previous_x": previous_mean,
            }[mean_type]
            row = {name: float(getattr(table, name)[i]) for name in COLUMNS}
            pred = row["a"] * x_t + row["b"] * output
            scale = abs(row["a"] * x_t) + abs(row["b"] * output)
            assert pred == pytest.approx(x_0, abs=1e-6 * scale)
            read = [row[f"e{k}"] * kept for k, kept in enumerate(memory) if row[f"e{k}"]]
            terms = [row["c"] * x_0, row["d"] * x_t, row["o"] * output, *read]
            # The marginal q(x_prev | x_0): what is left of ε and the fresh noise make its variance.
            left = np.sqrt(max(n_prev**2 - row["sigma"] ** 2, 0))
            if method == "predictor-corrector" and (s_prev, n_prev) == (s, n):
                left = (1 - 2 * 0.16**2) * n  # Langevin's step adds 4·0.16⁴ of the variance
            line = s_prev * x_0 + left * eps
            rounding = 1e-5 * (abs(line) + sum(map(abs, terms)))
            assert math.fsum(terms) == pytest.approx(line, abs=rounding)
            if row["slot"] >= 0:
                memory[int(row["slot"])] = row["k"] * x_0 + row["q"] * x_t
        assert math.fsum(terms) == pytest.approx(x_0, abs=rounding)


def test_a_process_may_say_itself_how_x_start_follows_from_the_output():
    process = levels([0.9, 0.8], [0.1, 0.5], "mine", x_start_coefficients=([2, 3], [-1, 4]))
    for method in METHODS:
        if method in BETWEEN:  # where nothing says how
            continue
        table = StepTable.from_process(process, method=method)
        answers = zip(table.levels.tolist(), table.a.tolist(), table.b.tolist(), strict=True)
        expected = {0.8: (3, 4), 0.9: (2, -1)}
        assert all(expected[signal] == (a, b) for (signal, _), a, b in answers)
    process.x_start_coefficients = ([2, 3], [1])
    with pytest.raises(InputError, match=r"b has shape \(1,\); expected \(2,\)"):
        StepTable.from_process(process)


@pytest.mark.parametrize("mean_type", ["v", "x_start", "previous_x"])
@pytest.mark.parametrize("var_type", VAR_TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_zero_terminal_snr_gives_finite_rows(mean_type, var_type, method):
    betas = rescale_zero_terminal_snr(get_named_beta_schedule("linear", 1000))
    diffusion = GaussianDiffusion(betas, mean_type=mean_type, var_type=var_type).respace("10")
    assert diffusion.alphas_cumprod[-1] == 0
    if mean_type == "previous_x" and method in BETWEEN:
        with pytest.raises(InputError, match="predicts the x of its own steps"):
            StepTable.from_process(diffusion, method=method)
        return
    table = StepTable.from_process(diffusion, method=method, clip_denoised=False)
    assert torch.isfinite(table.packed[:, : COLUMNS.index("clip")]).all()
    if mean_type == "v":  # at no signal, v is −x_0
        assert (table.a[0], table.b[0]) == (0, -1)
    if "dpmsolver++" in method:  # λ = −∞ before row 1 makes it first order; the next is second
        assert table.reading_rows[:3] == (False, False, True)


def test_zero_terminal_snr_refuses_epsilon():
    with pytest.raises(InputError, match="zero terminal SNR.*'v' or 'x_start'"):
        StepTable.from_process(levels([0.9, 0.0], [0.4, 1.0]))
    with pytest.raises(InputError, match="zero terminal SNR"):  # 1/signal overflows float32
        StepTable.from_process(levels([0.9, 1e-42], [0.4, 1.0]))


def test_dpmsolver_orders_and_its_agreement_with_ddim_at_first_order():
    process = cosine(12)
    solver = StepTable.from_process(process, method="dpmsolver++")
    ddim = StepTable.from_process(process, method="ddim")
    assert solver.reading_rows == (False,) + (True,) * 10 + (False,)
    assert not any(solver.noisy_rows)
    # Taking both x_0 as equal leaves the first-order step, which is DDIM's.
    torch.testing.assert_close(solver.c + solver.e0, ddim.c, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solver.d, ddim.d, rtol=1e-6, atol=1e-7)


def test_the_sde_solver_is_the_posterior_at_first_order():
    for process in (cosine(12, var_type="learned_range"), VarianceExploding(geometric_sigmas(12))):
        sde = StepTable.from_process(process, method="sde-dpmsolver++")
        solver = StepTable.from_process(process, method="dpmsolver++")
        ddpm = StepTable.from_process(process, method="ddim", eta=1.0)
        assert sde.reading_rows == (False,) + (True,) * 10 + (False,)
        assert sde.noisy_rows == (True,) * 11 + (False,)  # the last arrives at noise 0
        assert not sde.learned_variance
        torch.testing.assert_close(sde.c + sde.e0, ddpm.c, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sde.d, ddpm.d, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(sde.sigma, ddpm.sigma, rtol=1e-6, atol=1e-7)
        # Both solvers extrapolate x_0 alike.
        torch.testing.assert_close(sde.e0 * solver.c, solver.e0 * sde.c, rtol=1e-5, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(list(METHODS)),
    steps=st.integers(1, 30),
    var_type=st.sampled_from(VAR_TYPES),
    data=st.data(),
)
def test_a_later_start_is_the_table_of_a_process_that_ends_there(method, steps, var_type, data):
    """What a start in the middle means: the rows of the same steps without the noisier ones."""
    process = cosine(steps, var_type=var_type)
    start = data.draw(st.integers(0, steps - 1))
    later = StepTable.from_process(process, method=method, start=start)
    shorter = GaussianDiffusion(process.betas[: steps - start], var_type=var_type)
    expected = StepTable.from_process(shorter, method=method)
    torch.testing.assert_close(later.packed, expected.packed, rtol=1e-6, atol=1e-6)
    for name in ("noisy_rows", "reading_rows", "slots_written", "slots", "begins"):
        assert getattr(later, name) == getattr(expected, name)
    np.testing.assert_allclose(later.levels, expected.levels, rtol=1e-12)
    assert not later.reading_rows[0]


@pytest.mark.parametrize(
    "start, message",
    [
        (40, "start is 40; the process has steps 0 … 39"),
        (-1, "start is -1; the process has steps 0 … 39"),
        (1.0, "start must be an integer, got 1.0"),
        (None, "start must be an integer, got None"),
    ],
)
def test_a_start_that_is_no_step(start, message):
    with pytest.raises(InputError, match=message):
        StepTable.from_process(cosine(), start=start)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("var_type", VAR_TYPES)
def test_one_step_process(method, var_type):
    table = StepTable.from_process(cosine(1, var_type=var_type), method=method)
    assert len(table) == 1 and not table.noisy_rows[0]
    assert torch.isfinite(table.packed).all()
    assert (table.c[0], table.d[0]) == (1, 0)  # straight to x_0


def test_learned_variance_is_read_by_ddpm_only():
    process = cosine(var_type="learned_range")
    for method in ("ddim", "dpmsolver++", "sde-dpmsolver++"):
        table = StepTable.from_process(process, method=method)
        assert table.doubled_output and not table.learned_variance
        assert not table.log_max.any() and not table.log_min.any()


def test_clip_and_input_scale_columns():
    assert StepTable.from_process(cosine(), clip_denoised=False).clip.isinf().all()
    ve = VarianceExploding(geometric_sigmas(5))
    table = StepTable.from_process(ve)
    assert table.scales_input
    np.testing.assert_allclose(ascending(table.input_scale), (1 + ve.sigmas**2) ** -0.5, rtol=1e-6)
    assert not StepTable.from_process(cosine()).scales_input


def test_packed_rows_copies_and_devices():
    table = StepTable.from_process(cosine())
    assert table.packed.shape == (40, 17) and table.packed.dtype == torch.float32
    assert table.packed.is_contiguous()
    for i, name in enumerate(COLUMNS):
        assert torch.equal(getattr(table, name), table.packed[:, i])
    moved = table.to("meta")
    assert moved.device.type == "meta" and moved.noisy_rows == table.noisy_rows
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(twin.packed, table.packed) and twin.method == table.method


@settings(max_examples=60, deadline=None)
@given(
    log_snr_drops=st.lists(st.floats(0.01, 4.0), min_size=1, max_size=12),
    start=st.floats(-3.0, 8.0),
    radii=st.lists(st.floats(0.3, 20.0), min_size=12, max_size=12),
    eta=st.floats(0.0, 1.0),
)
def test_every_gaussian_process_keeps_its_marginals(log_snr_drops, start, radii, eta):
    """A step must carry q(x_t | x_0) exactly into q(x_prev | x_0): mean and variance, any eta."""
    half_log_snr = start - np.cumsum(log_snr_drops)
    angle = np.arctan(np.exp(-half_log_snr))
    radius = np.array(radii[: len(angle)])
    signal, noise = radius * np.cos(angle), radius * np.sin(angle)
    process = levels(signal, noise, "x_start")
    for table in (
        StepTable.from_process(process),
        StepTable.from_process(process, method="ddim", eta=eta),
        StepTable.from_process(process, method="sde-dpmsolver++"),
    ):
        signal_prev = np.append(1.0, signal[:-1])
        noise_prev = np.append(0.0, noise[:-1])
        c, d, e, sigma = (ascending(getattr(table, name)) for name in ("c", "d", "e0", "sigma"))
        scale = np.abs(c) + np.abs(e) + np.abs(d * signal) + signal_prev
        c = c + e  # the row before has the same x_0
        np.testing.assert_array_less(np.abs(c + d * signal - signal_prev), 1e-6 * scale + 1e-12)
        np.testing.assert_allclose(
            (d * noise) ** 2 + sigma**2, noise_prev**2, rtol=1e-5, atol=1e-12
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "eulr"}, "method is 'eulr'; expected one of .*ddim, ddpm, "),
        ({"method": "ddpm", "eta": 0.5}, "eta=0.5 belongs to method 'ddim'"),
        ({"method": "ddim", "eta": -0.1}, "eta is -0.1"),
        ({"method": "ddim", "eta": float("nan")}, "eta is nan"),
        ({"method": "ddim", "eta": 3.0}, "allows at most"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        StepTable.from_process(cosine(), **arguments)


@pytest.mark.parametrize(
    "process, message",
    [
        (levels([0.9, 0.95], [0.1, 0.2], "score"), "mean_type is 'score'"),
        (levels([0.9, 0.8], [0.1, 0.2], var_type="tiny"), "var_type is 'tiny'"),
        (levels([0.9, 0.8], [0.1, 0.05]), "does not at step 1"),
        (levels([0.9, 0.8], [0.0, 0.1]), "must be positive"),
        (levels([0.9, 0.0, 0.0], [0.1, 0.5, 1.0]), "must be positive"),
        (levels([0.9, np.nan], [0.1, 0.5]), "must be finite"),
        (levels([0.9, 0.8], [0.1, 0.2, 0.3]), "of one length"),
        (levels([], []), "not empty"),
        (levels([0.9, 0.8], [0.1, 0.2], input_scale=np.ones(3)), "input_scale has shape"),
        (SimpleNamespace(mean_type="v", var_type="learned"), "it has no signal_scale, noise_scale"),
    ],
)
def test_bad_processes(process, message):
    with pytest.raises(InputError, match=message):
        StepTable.from_process(process)


def test_a_method_of_ones_own_with_an_option(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    @registry.method("half-noise")
    def half_noise(source, *, share=0.5):
        levels = source.levels
        left = levels.noise_prev * np.sqrt(1 - share**2)
        return {
            "c": levels.signal_prev - left * levels.signal / levels.noise,
            "d": left / levels.noise,
            "sigma": levels.noise_prev * share,
        }

    table = StepTable.from_process(cosine(10), method="half-noise")
    stronger = StepTable.from_process(cosine(10), method="half-noise", share=0.6)
    torch.testing.assert_close(stronger.sigma, table.sigma * 1.2)
    with pytest.raises(InputError, match="share=0.6 belongs to method 'half-noise', not to 'ddim'"):
        StepTable.from_process(cosine(10), method="ddim", share=0.6)
    with pytest.raises(InputError, match="shar=0.6 belongs to method none that there is"):
        StepTable.from_process(cosine(10), method="half-noise", shar=0.6)
