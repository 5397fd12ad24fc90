import copy
import json

import numpy as np
import pytest
import torch

from fastdiff.errors import InputError
from fastdiff.methods.table import StepTable
from fastdiff.process.variance_exploding import LOSS_WEIGHTINGS, VarianceExploding, geometric_sigmas


def process(steps=20, **options):
    return VarianceExploding(geometric_sigmas(steps, 0.05, 20.0), **options)


def test_geometric_sigmas():
    sigmas = geometric_sigmas(5, 0.01, 100.0)
    assert sigmas.dtype == np.float64
    np.testing.assert_allclose(sigmas, [1e-2, 1e-1, 1e0, 1e1, 1e2], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_q_sample_adds_the_levels_noise(dtype):
    ve = process()
    x_start, noise = torch.randn(2, 4, 3, 5, 5, dtype=dtype)
    t = torch.tensor([0, 7, 19, 7])
    x_t = ve.q_sample(x_start, t, noise)
    sigma = torch.tensor(ve.sigmas)[t].view(4, 1, 1, 1)
    assert x_t.dtype == dtype
    torch.testing.assert_close(x_t, (x_start.double() + sigma * noise.double()).to(dtype))
    mean, variance, log_variance = ve.q_mean_variance(x_start, t)
    assert torch.equal(mean, x_start) and variance.shape == x_start.shape
    torch.testing.assert_close(variance.double(), (sigma**2).expand_as(variance))
    torch.testing.assert_close(log_variance, variance.log())


def test_q_sample_draws_its_own_noise():
    ve = process()
    x_t = ve.q_sample(torch.zeros(2000, 3), torch.full((2000,), 19))
    assert x_t.std().item() == pytest.approx(20.0, rel=0.05)


class Perfect(torch.nn.Module):
    """The network that knows x_0: it checks what it is given and answers without an error."""

    def __init__(self, ve, x_start, noise, t):
        super().__init__()
        self.ve, self.x_start, self.noise, self.t = ve, x_start, noise, t

    def forward(self, x, timesteps, y=None):
        sigma = torch.tensor(self.ve.sigmas, dtype=torch.float32)[self.t].view(-1, 1)
        x_t = self.x_start + sigma * self.noise
        seen = x_t / torch.sqrt(1 + sigma**2) if self.ve.scale_input else x_t
        torch.testing.assert_close(x, seen)
        torch.testing.assert_close(timesteps, torch.tensor(self.ve.model_timesteps)[self.t])
        assert y == "label"
        return {
            "epsilon": self.noise,
            "x_start": self.x_start,
            "v": (self.noise - sigma * self.x_start) / torch.sqrt(1 + sigma**2),
        }[self.ve.mean_type]


@pytest.mark.parametrize("mean_type", ["epsilon", "x_start", "v"])
@pytest.mark.parametrize("conditioning", ["timestep", "log_sigma"])
@pytest.mark.parametrize("scale_input", [True, False])
def test_training_losses_are_zero_for_the_true_answer(mean_type, conditioning, scale_input):
    ve = process(mean_type=mean_type, conditioning=conditioning, scale_input=scale_input)
    x_start, noise = torch.randn(2, 6, 4)
    t = torch.tensor([0, 3, 8, 12, 19, 19])
    model = Perfect(ve, x_start, noise, t)
    losses = ve.training_losses(model, x_start, t, {"y": "label"}, noise)
    assert set(losses) == {"loss", "mse"} and losses["loss"].shape == (6,)
    assert losses["loss"].max() < 1e-10


@pytest.mark.parametrize("mean_type", ["epsilon", "x_start", "v"])
@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_a_weighting_weighs_the_error_of_x_start_whatever_is_predicted(mean_type, weighting):
    ve = process(mean_type=mean_type, loss_weighting=weighting, min_snr_gamma=5.0)
    x_start, noise = torch.randn(2, 20, 4)
    t = torch.arange(20)
    output = torch.randn(20, 4)
    losses = ve.training_losses(lambda x, t: output, x_start, t, noise=noise)
    table = StepTable.from_process(ve, clip_denoised=False)
    a, b = (getattr(table, name).flip(0).double()[:, None] for name in "ab")
    x_t = x_start.double() + torch.tensor(ve.sigmas)[:, None] * noise.double()
    x_start_error = ((a * x_t + b * output - x_start) ** 2).mean(1)
    snr = torch.tensor(ve.sigmas) ** -2
    weight = {"inverse_variance": snr, "edm": 1 + snr, "min_snr": snr.clamp(max=5.0)}[weighting]
    torch.testing.assert_close(losses["loss"].double(), weight * x_start_error, rtol=1e-3, atol=0)


def test_named_weightings_are_the_plain_losses_they_are_said_to_be():
    assert np.allclose(process(loss_weighting="inverse_variance").loss_weights, 1)
    assert np.allclose(process(mean_type="v", loss_weighting="edm").loss_weights, 1)
    assert np.array_equal(process().loss_weights, np.ones(20))


def test_training_losses_have_gradients_and_double_precision():
    ve = process()
    scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    x_start = torch.randn(8, 2, dtype=torch.float64)
    t = torch.randint(0, 20, (8,))
    losses = ve.training_losses(lambda x, t: scale * x, x_start, t)
    losses["loss"].mean().backward()
    assert losses["loss"].dtype == torch.float64 and scale.grad != 0


def test_respacing_keeps_levels_and_original_timesteps():
    ve = process(20, mean_type="v", conditioning="timestep", loss_weighting="edm")
    strided = ve.respace("5")
    assert strided.timestep_map.tolist() == [0, 5, 10, 14, 19]
    assert strided.model_timesteps.tolist() == [0, 5, 10, 14, 19]
    assert np.array_equal(strided.sigmas, ve.sigmas[[0, 5, 10, 14, 19]])
    assert strided.num_timesteps == 5 and strided.original_num_steps == 20
    assert strided.prior_std == ve.prior_std
    assert (strided.mean_type, strided.loss_weighting) == ("v", "edm")
    assert strided.respace("2").timestep_map.tolist() == [0, 19]


def test_config_round_trip_through_json():
    ve = process(
        mean_type="v",
        var_type="fixed_large",
        scale_input=False,
        conditioning="log_sigma",
        loss_weighting="min_snr",
        min_snr_gamma=3.0,
    ).respace("7")
    twin = VarianceExploding.from_config(json.loads(json.dumps(ve.to_config())))
    assert twin.to_config() == ve.to_config()
    assert np.array_equal(twin.sigmas, ve.sigmas)
    assert np.array_equal(twin.model_timesteps, ve.model_timesteps)


def test_device_tables_are_a_cache_that_copies_leave_behind():
    ve = process()
    with torch.inference_mode():
        ve.q_sample(torch.randn(2, 3), torch.tensor([0, 1]))
    weight = torch.ones(3, requires_grad=True)
    ve.training_losses(lambda x, t: x * weight, torch.randn(2, 3), torch.tensor([0, 1]))[
        "loss"
    ].sum().backward()
    assert ve._tables.copies and not copy.deepcopy(ve)._tables.copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_moments_share_one_dtype(dtype):
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    moments = process().q_mean_variance(torch.ones(2, 3, dtype=dtype), torch.tensor([0, 1]))
    assert [moment.dtype for moment in moments] == [wanted] * 3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: geometric_sigmas(1), "at least 2"),
        (lambda: geometric_sigmas(5, 1.0, 0.5), "0 < sigma_min < sigma_max"),
        (lambda: VarianceExploding([0.1, 0.1]), "rising"),
        (lambda: VarianceExploding([0.0, 0.1]), "positive"),
        (lambda: VarianceExploding([[0.1]]), "1-D"),
        (lambda: VarianceExploding("many"), "array of numbers"),
        (lambda: process(mean_type="previous_x"), "mean_type"),
        (lambda: process(var_type="learned"), "var_type"),
        (lambda: process(conditioning="time"), "conditioning"),
        (lambda: process(loss_weighting="snr"), "loss_weighting"),
        (lambda: process(loss_weighting="min_snr", min_snr_gamma=0), "min_snr_gamma"),
        (lambda: VarianceExploding([0.1, 0.2], timestep_map=[0]), "one number per step"),
        (lambda: VarianceExploding([0.1, 0.2], timestep_map=[3, 1]), "ascend"),
        (
            lambda: VarianceExploding([0.1, 0.2], timestep_map=[0, 5], original_num_steps=3),
            "ascend within 0 … 2",
        ),
        (lambda: VarianceExploding.from_config({"sigmas": [0.1]}), "expected 'variance_exploding'"),
        (
            lambda: VarianceExploding.from_config({"process": "variance_exploding", "size": 3}),
            "does not fit",
        ),
        (lambda: VarianceExploding.from_config(None), "expected 'variance_exploding'"),
        (lambda: VarianceExploding([0.1], original_num_steps="x"), "must be an integer, got 'x'"),
        (lambda: process(min_snr_gamma="5"), "min_snr_gamma"),
        (lambda: geometric_sigmas(5.5), "an integer"),
        (lambda: geometric_sigmas(5, "a", 1.0), "0 < sigma_min < sigma_max"),
        (lambda: process().respace("50"), "50"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_bad_calls():
    ve, x, t = process(), torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(InputError, match="t must lie in 0 … 19"):
        ve.q_sample(x, torch.tensor([0, 20]))
    with pytest.raises(InputError, match="one timestep per sample"):
        ve.q_mean_variance(x, torch.tensor([0]))
    with pytest.raises(InputError, match="noise must have the shape"):
        ve.training_losses(lambda x, t: x, x, t, noise=x[:1])
    with pytest.raises(InputError, match=r"answered shape \(2, 2\)"):
        ve.training_losses(lambda x, t: x[:, :2], x, t)
    with pytest.raises(InputError, match="floating-point"):
        ve.q_sample(torch.zeros(2, 3, dtype=torch.uint8), t)
    with pytest.raises(InputError, match="x_start must be a floating-point"):
        ve.training_losses(lambda x, t: x, torch.zeros(2, 3, dtype=torch.uint8), t)
    with pytest.raises(InputError, match="must answer a floating-point tensor, got torch.int64"):
        ve.training_losses(lambda x, t: x.long(), x, t)
