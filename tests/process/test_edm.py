"""EDM against the paper (Karras et al. 2022, arXiv:2206.00364), its equations written plainly."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastdiff
from extent import examples
from fastdiff.checkpoints.config import process_from_config
from fastdiff.errors import InputError
from fastdiff.methods.levels import Levels
from fastdiff.methods.registry import METHODS
from fastdiff.methods.table import StepTable
from fastdiff.process.edm import EDM, karras_sigmas
from fastdiff.process.gaussian import create_diffusion
from fastdiff.process.protocol import Trainable
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas
from fastdiff.sampling.sampler import Sampler


class EDMPrecond(nn.Module):
    """Table 1's last column, by hand: D(x; sigma) of a network F, in float64."""

    def __init__(self, network, sigma_data):
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

    def forward(self, x, sigma):
        sigma = sigma.double().reshape(-1, *[1] * (x.dim() - 1))
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()
        c_noise = sigma.log() / 4
        return c_skip * x + c_out * self.network(c_in * x, c_noise.flatten())


def network(x, t):
    """Some F, the same in every dtype up to rounding."""
    t = t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return torch.tanh(x) * (0.6 + 0.4 * torch.cos(t)) + 0.1 * torch.sin(5 * x)


# --- The levels to sample at


@pytest.mark.parametrize("steps, rho", [(2, 7.0), (18, 7.0), (40, 3.0), (256, 1.0)])
def test_the_levels_are_equation_5s(steps, rho):
    i, low, high = np.arange(steps), 0.002, 80.0
    falling = (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    process = EDM(steps, rho=rho)
    np.testing.assert_allclose(process.sigmas, falling[::-1], rtol=1e-10)
    assert process.num_timesteps == process.original_num_steps == steps
    assert process.prior_std == pytest.approx(80.0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.1])
def test_a_table_has_table_1s_preconditioning(sigma_data):
    process = EDM(30, sigma_data=sigma_data)
    table = StepTable.from_process(process, dtype=torch.float64)
    s = process.sigmas[::-1]
    total = s**2 + sigma_data**2
    np.testing.assert_allclose(table.a, sigma_data**2 / total, rtol=1e-13)
    np.testing.assert_allclose(table.b, s * sigma_data / np.sqrt(total), rtol=1e-13)
    np.testing.assert_allclose(table.input_scale, 1 / np.sqrt(total), rtol=1e-13)
    np.testing.assert_allclose(table.timesteps, np.log(s) / 4, rtol=1e-6)  # a float32


def test_unit_data_variance_is_v_prediction_sign_apart():
    process = EDM(25, sigma_data=1.0)
    v = StepTable.from_process(VarianceExploding(process.sigmas, mean_type="v"))
    ours = StepTable.from_process(process)
    torch.testing.assert_close(ours.a, v.a)
    torch.testing.assert_close(ours.b, -v.b)
    torch.testing.assert_close(ours.input_scale, v.input_scale)


# --- Training


def test_quantiles_are_those_of_a_log_normal_sigma():
    process = EDM(P_mean=-0.7, P_std=1.9)
    t = torch.tensor([0.5, 0.1586552539, 0.9772498681], dtype=torch.float64)
    ln_sigma = process.sigma_of(t).log()
    torch.testing.assert_close(
        ln_sigma, torch.tensor([-0.7, -0.7 - 1.9, -0.7 + 2 * 1.9]).double(), rtol=1e-7, atol=1e-7
    )
    even = (torch.arange(200_000) + 0.5) / 200_000
    ln_sigma = process.sigma_of(even).log()
    assert ln_sigma.mean().item() == pytest.approx(-0.7, abs=1e-3)
    assert ln_sigma.std().item() == pytest.approx(1.9, rel=1e-3)


def test_the_quantiles_ends_are_finite_and_no_other_float32_is_moved():
    process = EDM()
    ends = torch.tensor([0.0, 1.0, torch.finfo(torch.float32).tiny])
    sigma = process.sigma_of(ends)
    assert sigma.isfinite().all() and (sigma > 0).all()
    inner = torch.tensor([2**-25, 1 - 2**-24])
    ordered = torch.cat([sigma[:1], process.sigma_of(inner), sigma[1:2]])
    assert (ordered.diff() > 0).all()


SHAPES = {"1-D": (5, 3, 7), "2-D": (5, 3, 4, 6), "3-D": (5, 2, 3, 4, 2), "vectors": (5, 8)}


def losses_by_hand(process, x_start, t, noise):
    """Eq. 8 in float64, of a denoiser preconditioned by hand."""
    x_start, noise = x_start.double(), noise.double()
    sd = process.sigma_data
    standard = torch.special.ndtri(t.double())
    sigma = torch.exp(process.P_mean + process.P_std * standard)
    per_sample = sigma.reshape(-1, *[1] * (x_start.dim() - 1))
    denoised = EDMPrecond(network, sd)(x_start + per_sample * noise, sigma)
    error = ((denoised - x_start) ** 2).flatten(1).mean(1)
    return (sigma**2 + sd**2) / (sigma * sd) ** 2 * error


@settings(max_examples=examples(25, 200), deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    sigma_data=st.floats(0.05, 3.0),
    P_mean=st.floats(-3.0, 2.0),
    P_std=st.floats(0.1, 2.0),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_the_loss_is_equation_8s(shape, sigma_data, P_mean, P_std, dtype, seed):
    process = EDM(10, sigma_data=sigma_data, P_mean=P_mean, P_std=P_std)
    generator = torch.Generator().manual_seed(seed)
    x_start, noise = torch.randn(2, *SHAPES[shape], generator=generator).to(dtype)
    x_start = (x_start * sigma_data).to(dtype)
    t = torch.rand(5, generator=generator).clamp(0.001, 0.999)
    losses = process.training_losses(network, x_start, t, noise=noise)
    assert set(losses) == {"loss", "mse"} and torch.equal(losses["loss"], losses["mse"])
    assert losses["loss"].shape == (5,)
    assert losses["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # c_noise is a float32 whatever the samples are.
    rtol = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
    expected = losses_by_hand(process, x_start, t, noise)
    torch.testing.assert_close(losses["loss"].double(), expected, rtol=rtol, atol=rtol)


def test_the_loss_is_exact_where_there_is_hardly_any_noise():
    """At sigma 3e-6 x_start − c_skip·x_t, divided by c_out, has one digit in float32."""
    process, (x_start, noise) = EDM(P_mean=-12.7), torch.randn(2, 5, 100)
    t = torch.full((5,), 0.5)
    losses = process.training_losses(lambda x, t: torch.zeros_like(x), x_start, t, noise=noise)
    expected = (noise.double() ** 2).mean(1)  # F's target is −ε
    torch.testing.assert_close(losses["loss"].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 0.05, 2.0])
def test_a_network_that_knows_nothing_has_unit_loss_at_every_level(sigma_data):
    """λ·c_out² = 1: F = 0 on data of that standard deviation."""
    process = EDM(sigma_data=sigma_data)
    t = torch.linspace(0, 1, 9)
    x_start = sigma_data * torch.randn(9, 40_000, generator=torch.Generator().manual_seed(0))
    losses = process.training_losses(lambda x, t: torch.zeros_like(x), x_start, t)
    np.testing.assert_allclose(losses["loss"], np.ones(9), atol=0.05)


def test_the_network_sees_unit_variance_and_a_quarter_of_ln_sigma():
    process, seen = EDM(), {}

    def model(x, c_noise, y):
        seen.update(std=x.std(dim=1), c_noise=c_noise, y=y)
        return x

    t = torch.tensor([0.01, 0.5, 0.99])
    process.training_losses(model, 0.5 * torch.randn(3, 20_000), t, {"y": "label"})
    np.testing.assert_allclose(seen["std"], np.ones(3), atol=0.05)
    assert seen["c_noise"].dtype == torch.float32 and seen["y"] == "label"
    torch.testing.assert_close(seen["c_noise"].double(), process.sigma_of(t).log() / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_q_sample_adds_the_quantiles_noise(shape, dtype):
    process, (x_start, noise) = EDM(), torch.randn(2, *shape, dtype=dtype)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    x_t = process.q_sample(x_start, t, noise)
    sigma = process.sigma_of(t).reshape(-1, *[1] * (len(shape) - 1))
    assert x_t.dtype == dtype
    torch.testing.assert_close(x_t, (x_start.double() + sigma * noise.double()).to(dtype))
    assert process.q_sample(x_start, t).shape == shape


def test_no_samples_have_no_losses():
    losses = EDM().training_losses(lambda x, t: x, torch.empty(0, 3, 4, 4), torch.empty(0))
    assert losses["loss"].shape == (0,)


def test_losses_have_gradients_and_take_float64_through():
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    x_start = torch.randn(8, 2, dtype=torch.float64)
    losses = EDM().training_losses(lambda x, t: scale * x, x_start, torch.rand(8))
    losses["loss"].mean().backward()
    assert losses["loss"].dtype == torch.float64 and scale.grad != 0


@pytest.mark.seconds
def test_a_compiled_step_has_the_same_losses_and_nan_for_a_t_out_of_range():
    process = EDM()

    def losses(x_start, t, noise):
        return process.training_losses(network, x_start, t, noise=noise)["loss"]

    compiled = torch.compile(losses, fullgraph=True, backend="eager")
    x_start, noise = torch.randn(2, 3, 4)
    t = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(compiled(x_start, t, noise), losses(x_start, t, noise))
    bad = compiled(x_start, torch.tensor([0.1, 1.5, math.nan]), noise)
    assert bad.isnan().tolist() == [False, True, True]


@pytest.mark.cuda
def test_a_gpu_has_the_cpus_losses_and_nan_for_a_t_out_of_range():
    process, (x_start, noise) = EDM(), torch.randn(2, 4, 3, 8, 8)
    t = torch.tensor([0.0, 0.3, 0.9, 1.0])
    expected = process.training_losses(network, x_start, t, noise=noise)["loss"]
    moved = [tensor.cuda() for tensor in (x_start, t)]
    actual = process.training_losses(network, *moved, noise=noise.cuda())["loss"]
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert process.q_sample(moved[0], moved[1] + 2).isnan().all()


def test_a_trainer_can_ask_what_t_is():
    processes: list[Trainable] = [
        create_diffusion(steps=4, noise_schedule="cosine"),
        VarianceExploding(geometric_sigmas(4)),
        EDM(4),
    ]
    assert [process.continuous for process in processes] == [False, False, True]
    for process in processes:
        t = torch.rand(2) if process.continuous else torch.tensor([0, 3])
        assert process.training_losses(lambda x, t: x, torch.randn(2, 3), t)["loss"].shape == (2,)
        assert process_from_config(process.to_config()).num_timesteps == 4


# --- Sampling


def euler(process, x):
    """Algorithm 1 without its correction, S_churn = 0: in float64, from the paper's sigmas to 0."""
    denoise = EDMPrecond(network, process.sigma_data)
    falling = [*process.sigmas[::-1], 0.0]
    for sigma, following in zip(falling, falling[1:], strict=False):
        slope = (x - denoise(x, torch.full((len(x),), sigma))) / sigma
        x = x + (following - sigma) * slope
    return x


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 8), (2, 3, 4, 4)])
def test_ddim_is_eulers_method(shape, sigma_data):
    process = EDM(18, sigma_data=sigma_data)
    x_T = 80 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampler = Sampler(network, process, method="ddim", clip_denoised=False)
    sample = sampler.sample(shape, noise=x_T.float())
    torch.testing.assert_close(sample.double(), euler(process, x_T), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("var_type", ["fixed_small", "fixed_large"])
def test_every_method_samples_gaussian_data(method, var_type):
    """F of the exact denoiser of N(0.2, 0.3²), whose D is x_0's posterior mean."""
    mean, std, process = 0.2, 0.3, EDM(var_type=var_type)
    sd = process.sigma_data

    def exact(x, c_noise):
        sigma = (4 * c_noise.double()).exp().reshape(-1, 1)
        total = sigma**2 + sd**2
        x = x.double() * total.sqrt()
        denoised = (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)
        return ((denoised - sd**2 / total * x) / (sigma * sd / total.sqrt())).float()

    sampler = Sampler(exact, process, steps=500, method=method, clip_denoised=False)
    samples = sampler.sample((100, 100), seed=2)
    assert samples.mean().item() == pytest.approx(mean, abs=0.015)
    assert samples.std().item() == pytest.approx(std, rel=0.03)


def test_x_start_is_clipped_as_elsewhere():
    sampler = Sampler(lambda x, t: 9 * torch.ones_like(x), EDM(), steps=5, method="ddim")
    steps = list(sampler.iterate((2, 3)))
    assert all(step["pred_xstart"].abs().max() <= 1 for step in steps)
    assert steps[0]["pred_xstart"].max() == 1


def test_respacing_keeps_levels():
    process = EDM(100, sigma_data=0.7, P_mean=-0.4, var_type="fixed_large")
    strided = process.respace("7")
    assert strided.timestep_map.tolist() == fastdiff.space_timesteps(100, "7")
    assert np.array_equal(strided.sigmas, process.sigmas[strided.timestep_map])
    assert (strided.num_timesteps, strided.original_num_steps) == (7, 100)
    assert (strided.sigma_data, strided.P_mean, strided.var_type) == (0.7, -0.4, "fixed_large")
    assert strided.prior_std == process.prior_std
    assert strided.respace(timesteps=[0, 6]).timestep_map.tolist() == [0, 99]
    chosen = process.respace(9, spacing="logsnr").sigmas
    np.testing.assert_allclose(np.diff(np.log(chosen)), np.log(4e4) / 8, rtol=0.3)
    # Strides of the default levels are nearly the paper's levels for as many steps.
    np.testing.assert_allclose(EDM().respace(18).sigmas, EDM(18).sigmas, rtol=0.02)


@pytest.mark.parametrize("choice", [None, {"sections": "5,3"}, {"timesteps": [2, 30]}])
def test_config_round_trip_through_json(choice):
    process = EDM(
        40,
        sigma_min=0.01,
        sigma_max=50,
        rho=5,
        sigma_data=1,
        P_mean=0,
        P_std=2,
        var_type="fixed_large",
    )
    process = process.respace(**choice) if choice else process
    twin = process_from_config(json.loads(json.dumps(process.to_config())))
    assert isinstance(twin, EDM) and twin.to_config() == process.to_config()
    for name in ("sigmas", "model_timesteps", "input_scale", "timestep_map"):
        assert np.array_equal(getattr(twin, name), getattr(process, name))


def test_levels_of_any_rho_are_a_process():
    for rho in (0.05, 1, 7, 1000):
        Levels.of(np.ones(10), karras_sigmas(10, rho=rho))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EDM(1), "number of steps is 1; expected an integer, at least 2"),
        (lambda: EDM(2.5), "number of steps is 2.5"),
        (lambda: EDM(sigma_min=0), "0 < sigma_min < sigma_max"),
        (lambda: EDM(sigma_max="80"), "0 < sigma_min < sigma_max"),
        (lambda: EDM(rho=0), "rho must be a positive number, got 0"),
        (lambda: EDM(rho=1e-3), "do not all differ in float64; expected a rho nearer to 7"),
        (lambda: karras_sigmas(5, 1.0, 1.0 + 1e-16 * 4), "do not all differ|0 < sigma_min"),
        (lambda: EDM(sigma_data=-1), "sigma_data must be a positive number, got -1"),
        (lambda: EDM(sigma_data=math.nan), "sigma_data"),
        (lambda: EDM(P_mean=math.inf), "P_mean must be a finite number, got inf"),
        (lambda: EDM(P_mean="-1.2"), "P_mean must be a finite number, got '-1.2'"),
        (lambda: EDM(P_std=0), "P_std must be a positive number, got 0"),
        (lambda: EDM(P_std=50), "natural logarithms of sigma"),
        (lambda: EDM(var_type="learned"), "var_type must be one of fixed_small, fixed_large"),
        (lambda: EDM(4, timestep_map=[0, 4]), "ascend within 0 … 3"),
        (lambda: EDM(4, timestep_map=[]), "one number per step"),
        (lambda: EDM(4, timestep_map=[[0], [1, 2]]), "one number per step"),
        (lambda: EDM(4, timestep_map=3), "one number per step"),
        (lambda: EDM.from_config({"steps": 4}), "config has process None, expected 'edm'"),
        (
            lambda: EDM.from_config({"process": "edm", "size": 4}),
            "config of process 'edm' does not fit",
        ),
        (lambda: EDM.from_config(None), "config has process None"),
        (lambda: EDM().respace("5000"), "5000"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"t": torch.tensor([0, 1])}, "float tensor of quantiles in .*, got torch.int64: .*rand"),
        ({"t": 0.5}, "float tensor of quantiles in .*, got float"),
        ({"t": torch.tensor([0.5, 1.5])}, r"t must lie in \[0, 1\], got 1.5"),
        ({"t": torch.tensor([-0.1, 0.5])}, r"t must lie in \[0, 1\], got -0.1"),
        ({"t": torch.tensor([0.5, math.nan])}, r"t must lie in \[0, 1\], got nan"),
        ({"t": torch.tensor([0.5])}, r"one quantile per sample of x_start.*\(2, 3\), got \(1,\)"),
        ({"t": torch.rand(2, 1)}, r"one quantile per sample .* got \(2, 1\)"),
        ({"t": torch.rand(2, device="meta")}, "t is on meta but x_start is on cpu"),
        ({"noise": torch.randn(1, 3)}, "noise must have the shape"),
        ({"x_start": torch.zeros(2, 3, dtype=torch.uint8)}, "x_start must be a floating-point"),
        ({"model": lambda x, t: x[:, :2]}, r"answered shape \(2, 2\) .* an edm process needs"),
        ({"model": lambda x, t: x.long()}, "must answer a floating-point tensor"),
    ],
)
def test_bad_calls(changes, message):
    call = {"model": lambda x, t: x, "x_start": torch.randn(2, 3), "t": torch.tensor([0.2, 0.7])}
    with pytest.raises(InputError, match=message) as caught:
        EDM().training_losses(**call | changes)
    assert "\n" not in str(caught.value)
