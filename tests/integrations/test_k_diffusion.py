"""k-diffusion's samplers by rows, against what k-diffusion itself gave and asked for."""

import inspect
import math
import sys
import types

import numpy as np
import pytest
import torch

from fastdiff.errors import InputError
from fastdiff.integrations import k_diffusion
from k_diffusion_cases import NOISY, SHAPE, SIGMAS, answers, cases, model, noise_sampler, start
from page_tools import blocks, run
from paths import RECORDED

CASES = {case[0]: case for case in cases()}


@pytest.fixture(scope="module")
def recorded():
    return np.load(RECORDED / "k_diffusion.npz")


@pytest.mark.parametrize("name", CASES)
def test_as_recorded(recorded, name):
    """x, and of each step σ, σ̂ and the sum of x_0 that the callback saw, with all steps' arithmetic
    in float32 against float64: 1e-6 of the largest x, which each step rounds a few times."""
    case = CASES[name]
    x, seen = answers(k_diffusion, case, torch.float32)
    sigmas = case[2]
    scale = float(start(sigmas, torch.float64).abs().max())
    expected = torch.from_numpy(recorded[name])
    assert x.dtype == torch.float32
    # Rounding of x is divided by σ as the network reads it, wherever x is small beside its start.
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=2e-6 * scale)
    levels = [[float(call["sigma"]), float(call["sigma_hat"])] for call in seen]
    np.testing.assert_allclose(levels, recorded[f"{name} levels"], rtol=1e-5)
    sums = [float(call["denoised"].double().sum()) for call in seen]
    np.testing.assert_allclose(sums, recorded[f"{name} denoised"], atol=96 * 2e-6 * scale)
    assert [call["i"] for call in seen] == list(range(len(sigmas) - 1))
    assert set(seen[0]) == {"x", "i", "sigma", "sigma_hat", "denoised"}


@pytest.mark.parametrize("name", NOISY)
def test_its_own_noise(name):
    """Without a sampler the noise is torch's: of one seed the same, of another another; and without
    η nothing depends on it."""
    sampler, sigmas = getattr(k_diffusion, name), torch.tensor(SIGMAS["zero"])
    x = start(sigmas.tolist(), torch.float32)

    def drawn(seed, eta):
        torch.manual_seed(seed)
        return sampler(model, x, sigmas, eta=eta, disable=True)

    assert torch.equal(drawn(0, 1.0), drawn(0, 1.0))
    assert not torch.allclose(drawn(0, 1.0), drawn(1, 1.0), atol=1e-3)
    assert torch.equal(drawn(0, 0.0), drawn(1, 0.0))


def test_noise_of_the_middle_is_a_brownian_motions():
    """By its own noise ``sample_dpmpp_sde`` draws from the distribution that a sampler with one
    motion gives: of a model that answers 0 x is Gaussian, and its variance is compared."""
    sigmas, x = torch.tensor([4.0, 1.0]), torch.zeros(20000, 1, 2)

    def brownian(sigma, sigma_next):
        key = (round(float(sigma), 5), round(float(sigma_next), 5))
        if key not in motion:
            done = [v * math.sqrt(a - b) for (a, b), v in motion.items()]
            rest = key[0] - key[1] - sum(a - b for a, b in motion)
            motion[key] = (sum(done) + torch.randn_like(x) * math.sqrt(rest)) / math.sqrt(
                key[0] - key[1]
            )
        return motion[key]

    def zero(x, sigma):
        return -x  # x_0 that counts on what the middle was given

    variances = []
    for sampler in (None, brownian):
        torch.manual_seed(5)
        motion = {}
        result = k_diffusion.sample_dpmpp_sde(zero, x, sigmas, noise_sampler=sampler, disable=True)
        variances.append(float(result.var()))
    # Of n draws the variance has a relative standard deviation of √(2/n).
    assert variances[0] == pytest.approx(variances[1], rel=5 * math.sqrt(2 / x.numel()) * 2**0.5)


def test_low_precision():
    sigmas = torch.tensor(SIGMAS["zero"])
    x = start(sigmas.tolist(), torch.float32)
    exact = k_diffusion.sample_dpmpp_2m(model, x, sigmas, disable=True)
    given = k_diffusion.sample_dpmpp_2m(model, x.bfloat16(), sigmas, disable=True)
    assert given.dtype == torch.bfloat16
    assert (given.float() - exact).abs().max() < 0.02


def test_names_and_arguments_are_k_diffusions():
    churn = ["s_churn", "s_tmin", "s_tmax", "s_noise"]
    noisy = ["eta", "s_noise", "noise_sampler"]
    own = {
        "sample_euler": churn,
        "sample_heun": churn,
        "sample_dpm_2": churn,
        "sample_euler_ancestral": noisy,
        "sample_dpm_2_ancestral": noisy,
        "sample_dpmpp_2s_ancestral": noisy,
        "sample_lms": ["order"],
        "sample_dpmpp_sde": [*noisy, "r"],
        "sample_dpmpp_2m": [],
        "sample_dpmpp_2m_sde": [*noisy, "solver_type"],
        "sample_dpmpp_3m_sde": noisy,
    }
    theirs = {name for name in vars(k_diffusion) if name.startswith("sample_")}
    assert theirs - {"sample_dpm_fast", "sample_dpm_adaptive"} == set(own)
    shared = ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    for name, arguments in own.items():
        assert list(inspect.signature(getattr(k_diffusion, name)).parameters) == shared + arguments


def test_the_page(monkeypatch):
    """Its example, with k-diffusion's sigmas."""
    sigmas = torch.tensor(SIGMAS["zero"])
    sampling = types.SimpleNamespace(get_sigmas_karras=lambda n, low, high, device: sigmas)
    package = types.ModuleType("k_diffusion")
    package.sampling = sampling
    monkeypatch.setitem(sys.modules, "k_diffusion", package)
    _, after = blocks("docs/k_diffusion.md", "python")
    x = start([1.0], torch.float32)
    images = run("docs/k_diffusion.md", after, x=x, model=model)["images"]
    assert torch.equal(images, k_diffusion.sample_dpmpp_2m(model, x * 80, sigmas, disable=True))


def test_a_progress_bar(capsys):
    x, sigmas = torch.zeros(SHAPE), torch.tensor(SIGMAS["once"])
    k_diffusion.sample_euler(model, x, sigmas, disable=False)
    assert "1/1" in capsys.readouterr().err
    k_diffusion.sample_euler(model, x, sigmas, disable=True)
    assert not capsys.readouterr().err


REFUSED = [
    ({"sigmas": torch.tensor([1.0])}, r"sigmas: \(1,\); expected a tensor \(K \+ 1,\)"),
    ({"sigmas": [1.0, 0.0]}, "sigmas: list; expected a tensor"),
    ({"sigmas": torch.tensor([1.0, 1.0, 0.0])}, "sigmas are .*; expected finite numbers that fall"),
    ({"sigmas": torch.tensor([1.0, -1.0])}, "sigmas are .*; expected finite numbers that fall"),
    ({"sigmas": torch.tensor([math.inf, 0.0])}, "sigmas are .*; expected finite"),
    ({"x": torch.zeros(4)}, "x is a Tensor; expected a tensor"),
    ({"x": torch.zeros(SHAPE).double()}, "float32, bfloat16 or float16"),
    ({"r": 0.3}, "r is 0.3; expected 0.5"),
    ({"eta": 1.5}, "eta is 1.5"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_what_is_refused(given, message):
    call = {"x": torch.zeros(SHAPE), "sigmas": torch.tensor([2.0, 1.0, 0.0])} | given
    with pytest.raises(InputError, match=message):
        k_diffusion.sample_dpmpp_sde(model, **call, noise_sampler=noise_sampler, disable=True)


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2"])
def test_churn_above_the_first_level_is_refused_not_cut(name):
    sigmas, x = torch.tensor([80.0, 70.0, 10.0, 0.0]), torch.zeros(SHAPE)
    with pytest.raises(InputError, match="churn takes sigma 70 to 98.9949, above the first, 80"):
        getattr(k_diffusion, name)(model, x, sigmas, disable=True, s_churn=9.0, s_tmax=75.0)
    for options in ({"s_churn": 9.0}, {"s_churn": 0.3, "s_tmax": 75.0}):
        getattr(k_diffusion, name)(model, x, sigmas, disable=True, **options)


OF_SIGMAS = [
    name
    for name in k_diffusion.__all__
    if "sigmas" in inspect.signature(getattr(k_diffusion, name)).parameters
]


@pytest.mark.parametrize("name", OF_SIGMAS)
def test_every_sampler_says_what_is_no_schedule_and_no_x(name):
    sampler = getattr(k_diffusion, name)
    for sigmas, came in (([1.0, 0.0], "list"), (3.0, "float"), (None, "NoneType")):
        with pytest.raises(InputError, match=f"sigmas: {came}; expected a tensor"):
            sampler(model, torch.zeros(SHAPE), sigmas, disable=True)
    with pytest.raises(InputError, match="x is a float; expected a tensor"):
        sampler(model, 3.0, torch.tensor([1.0, 0.0]), disable=True)


def test_an_order_above_the_steps_is_lowered_and_another_refused():
    x, sigmas = start([1.0], torch.float32), torch.tensor([2.0, 1.0, 0.0])
    usual = k_diffusion.sample_lms(model, x, sigmas, disable=True)
    assert torch.equal(usual, k_diffusion.sample_lms(model, x, sigmas, disable=True, order=2))
    for order in (0, 5, 2.0):
        with pytest.raises(InputError, match=f"order is {order}; expected an integer from 1 to 4"):
            k_diffusion.sample_lms(model, x, sigmas, disable=True, order=order)
