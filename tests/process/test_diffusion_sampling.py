"""Sampling: single steps, DDPM and DDIM loops, the order of random draws, zero to one step."""

import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusion_tools import gaussian, images
from fastdiff.errors import InputError
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.process.schedules import linear_betas

SHAPE = (2, 3, 4, 4)
LOOPS = ["p_sample_loop", "ddim_sample_loop"]


def model(x, t):
    return torch.tanh(x) * (0.6 + 0.4 * torch.cos(t / 100).view(-1, *[1] * (x.dim() - 1)))


def strided(steps="6", **kwargs):
    return create_diffusion(steps=100, timestep_respacing=steps, **kwargs)


# --- single steps ---


def test_p_sample_adds_the_std_times_the_noise_except_at_zero():
    diffusion = create_diffusion(steps=50)
    x, noise, t = images(3, 2, 4), gaussian(3, 2, 4), torch.tensor([0, 1, 49])
    out = diffusion.p_mean_variance(model, x, t)
    sample = diffusion.p_sample(model, x, t, noise=noise)["sample"]
    assert torch.equal(sample[0], out["mean"][0])
    expected = out["mean"] + out["variance"].sqrt() * noise
    torch.testing.assert_close(sample[1:], expected[1:])


def test_ddim_at_eta_one_is_ddpm_with_the_posterior_variance():
    # Song et al. 2020 section 4.1; without clipping the two are one formula.
    diffusion = create_diffusion(steps=50, sigma_small=True)
    x, noise = images(50, 2, 4, dtype=torch.float64), gaussian(50, 2, 4, dtype=torch.float64)
    t = torch.arange(50)
    ddpm = diffusion.p_sample(model, x, t, noise=noise)["sample"]
    ddim = diffusion.ddim_sample(model, x, t, eta=1.0, noise=noise)["sample"]
    torch.testing.assert_close(ddim, ddpm, rtol=1e-9, atol=1e-9)


def test_ddim_reverse_retraces_ddim():
    # With a constant ε both follow the same line, so going up and down again is exact.
    diffusion = create_diffusion(steps=50)
    eps = gaussian(1, 2, 4, dtype=torch.float64)
    x_start = images(1, 2, 4, dtype=torch.float64)
    x = diffusion.q_sample(x_start, torch.tensor([0]), eps)
    path = [x]
    for i in range(40):
        t = torch.tensor([i])
        x = diffusion.ddim_reverse_sample(lambda x, t: eps, x, t, clip_denoised=False)["sample"]
        torch.testing.assert_close(x, diffusion.q_sample(x_start, t + 1, eps))
        path.append(x)
    for i in range(40, 0, -1):
        t = torch.tensor([i])
        x = diffusion.ddim_sample(lambda x, t: eps, x, t, clip_denoised=False)["sample"]
        torch.testing.assert_close(x, path[i - 1])


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_steps_agree_with_diffusers(prediction):
    mean_type = {"epsilon": "epsilon", "sample": "x_start", "v_prediction": "v"}[prediction]
    diffusion = GaussianDiffusion(linear_betas(100), mean_type=mean_type)
    config = {
        "num_train_timesteps": 100,
        "trained_betas": linear_betas(100).tolist(),
        "prediction_type": prediction,
    }
    ddim, ddpm = DDIMScheduler(**config), DDPMScheduler(**config)
    ddim.set_timesteps(100)
    ddpm.set_timesteps(100)
    x, output = gaussian(2, 3, 4), gaussian(2, 3, 4, seed=8)
    for step in (99, 40, 1):
        t = torch.full((2,), step)
        mine = diffusion.ddim_sample(lambda x, t: output, x, t)
        theirs = ddim.step(output, step, x, use_clipped_model_output=True)
        torch.testing.assert_close(mine["sample"], theirs.prev_sample, rtol=2e-5, atol=2e-5)
        mine = diffusion.p_sample(lambda x, t: output, x, t, noise=torch.zeros_like(x))
        theirs = ddpm.step(output, step, x)
        torch.testing.assert_close(
            mine["pred_xstart"], theirs.pred_original_sample, rtol=2e-5, atol=2e-5
        )


def test_a_larger_eta_than_fits_names_the_largest_that_does():
    diffusion = strided()
    x, t = images(*SHAPE), torch.tensor([2, 3])
    with pytest.raises(InputError, match=r"eta is 5.0; .* at most \d") as caught:
        diffusion.ddim_sample(model, x, t, eta=5.0)
    largest = float(re.search(r"at most ([\d.]+)", str(caught.value))[1])
    assert largest >= 1
    assert diffusion.ddim_sample(model, x, t, eta=largest)["sample"].isfinite().all()


# --- loops ---


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_is_its_steps_and_asks_for_noise_by_index(name):
    diffusion = strided(learn_sigma=True)

    def learned(x, t):
        return torch.cat([model(x, t), x], dim=1)

    draws = gaussian(6, *SHAPE, seed=3)
    asked = []

    def step_noise(i):
        asked.append(i)
        return draws[i]

    kwargs = {"eta": 0.7} if name.startswith("ddim") else {}
    x_T = gaussian(*SHAPE)
    sample = getattr(diffusion, name)(learned, SHAPE, x_T, step_noise=step_noise, **kwargs)
    assert asked == [5, 4, 3, 2, 1, 0]
    step = getattr(diffusion, name.removesuffix("_loop"))
    x = x_T
    for i in reversed(range(6)):
        x = step(learned, x, torch.full((2,), i), noise=draws[i], **kwargs)["sample"]
    assert torch.equal(sample, x)
    everywhere = getattr(diffusion, name)(learned, SHAPE, x_T, step_noise=draws[0], **kwargs)
    assert not torch.equal(everywhere, sample)


@pytest.mark.parametrize("name", LOOPS)
def test_the_progressive_form_yields_every_step(name):
    diffusion = strided()
    x_T, z = gaussian(*SHAPE), gaussian(*SHAPE, seed=3)
    loop = getattr(diffusion, f"{name}_progressive")(model, SHAPE, x_T, step_noise=z)
    steps = list(loop)
    assert len(steps) == 6 and all(set(out) == {"sample", "pred_xstart"} for out in steps)
    final = getattr(diffusion, name)(model, SHAPE, x_T, step_noise=z)
    assert torch.equal(steps[-1]["sample"], final)
    assert all(out["pred_xstart"].abs().max() <= 1 for out in steps)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("own_generator", [False, True])
def test_random_draws_come_in_the_published_order(name, own_generator):
    # x_T, then one draw per step: also at t = 0, and for DDIM at eta = 0 where none is used.
    diffusion = strided()
    generator = torch.Generator().manual_seed(7) if own_generator else None
    if not own_generator:
        torch.manual_seed(7)
    sample = getattr(diffusion, name)(model, SHAPE, generator=generator)
    after = torch.randn(3, generator=generator)

    reference = torch.Generator().manual_seed(7)
    x_T = torch.randn(SHAPE, generator=reference)
    draws = {i: torch.randn(SHAPE, generator=reference) for i in reversed(range(6))}
    expected = getattr(diffusion, name)(model, SHAPE, x_T, step_noise=draws.__getitem__)
    assert torch.equal(sample, expected)
    assert torch.equal(after, torch.randn(3, generator=reference))


def test_channels_last_draws_the_same_numbers():
    diffusion = strided()
    x = images(*SHAPE).contiguous(memory_format=torch.channels_last)
    t = torch.tensor([3, 4])
    a, b = (
        diffusion.p_sample(model, value, t, generator=torch.Generator().manual_seed(1))["sample"]
        for value in (x, x.contiguous())
    )
    assert torch.equal(a, b) and a.is_contiguous(memory_format=torch.channels_last)


def test_samples_record_no_gradients_and_callers_keep_their_mode():
    weight = torch.ones((), requires_grad=True)
    loop = strided().p_sample_loop_progressive(lambda x, t: weight * x, SHAPE)
    for out in loop:
        assert torch.is_grad_enabled() and not out["sample"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_samples_come_in_the_dtype_of_x_T(dtype):
    diffusion = strided()
    x_T, z = gaussian(*SHAPE), gaussian(*SHAPE, seed=2)
    seen = set()

    def spy(x, t):
        seen.add(x.dtype)
        return model(x, t)

    exact = diffusion.p_sample_loop(model, SHAPE, x_T, step_noise=z)
    sample = diffusion.p_sample_loop(spy, SHAPE, x_T.to(dtype), step_noise=z.to(dtype))
    assert sample.dtype == dtype and seen == {dtype}
    torch.testing.assert_close(sample.float(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 7), (2, 1, 3, 3, 3), (0, 3, 4, 4)])
@pytest.mark.parametrize("name", LOOPS)
def test_any_number_of_dimensions(shape, name):
    sample = getattr(strided(), name)(model, shape)
    assert sample.shape == shape and sample.isfinite().all()


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("var_type", ["fixed_small", "fixed_large", "learned_range"])
def test_one_step_samples(name, var_type):
    diffusion = strided("1", var_type=var_type)

    def one(x, t):
        output = model(x, t)
        return torch.cat([output, x], dim=1) if diffusion.learns_variance else output

    x_T = gaussian(*SHAPE)
    sample = getattr(diffusion, name)(one, SHAPE, x_T)
    # No noise is left to add: the sample is the predicted x_0.
    t = torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(sample, diffusion.p_mean_variance(one, x_T, t)["pred_xstart"])
    terms = diffusion.training_losses(one, images(*SHAPE), t)
    assert terms["loss"].isfinite().all()
    bpd = diffusion.calc_bpd_loop(one, images(*SHAPE))
    assert bpd["vb"].shape == (2, 1) and bpd["total_bpd"].isfinite().all()


def test_perfect_networks_sample_their_image_whatever_the_sampler():
    x_start = images(*SHAPE)
    for name, kwargs in (("p_sample_loop", {}), ("ddim_sample_loop", {"eta": 0.5})):
        diffusion = strided("20", predict_xstart=True)
        sample = getattr(diffusion, name)(lambda x, t: x_start, SHAPE, **kwargs)
        torch.testing.assert_close(sample, x_start)


@pytest.mark.seconds
def test_ddim_needs_fewer_steps_than_ddpm_on_a_gaussian():
    # Data N(0, ½²): the best ε is known, so only the sampler's own error shows.
    diffusion = create_diffusion(steps=1000)
    alphas_cumprod = torch.from_numpy(diffusion.alphas_cumprod).float()

    def best(x, t):
        alpha_bar = alphas_cumprod[t.long()].view(-1, 1)
        return (1 - alpha_bar).sqrt() * x / (1 - alpha_bar + alpha_bar / 4)

    x_T = gaussian(1, 20_000)
    spread = {
        steps: diffusion.respace(steps)
        .ddim_sample_loop(best, (1, 20_000), x_T, clip_denoised=False)
        .std()
        .item()
        for steps in ("10", "100", "1000")
    }
    errors = [abs(value - 0.5) for value in spread.values()]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 5e-3
    ddpm = diffusion.respace("250").p_sample_loop(
        best,
        (1, 20_000),
        x_T,
        clip_denoised=False,
        generator=torch.Generator().manual_seed(0),
    )
    assert ddpm.std().item() == pytest.approx(0.5, rel=0.05)


def test_the_device_is_that_of_the_noise_or_the_parameters_or_as_said():
    layer = torch.nn.Conv2d(3, 3, 1, device="meta")

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, t):
            return self.layer(x)

    assert strided().p_sample_loop(Wrapped(), SHAPE).device.type == "meta"
    assert strided().p_sample_loop(model, SHAPE, device="meta").device.type == "meta"
    noise = torch.empty(SHAPE, device="meta")
    assert strided().p_sample_loop(model, SHAPE, noise).device.type == "meta"
    assert strided().p_sample_loop(model, list(SHAPE)).device.type == "cpu"


def test_progress_counts_the_steps(capsys):
    strided().p_sample_loop(model, SHAPE, progress=True)
    strided().calc_bpd_loop(model, images(*SHAPE), progress=True)
    assert capsys.readouterr().err.count("6/6") >= 2


GENERATOR_ELSEWHERE = type("Generator", (), {"device": torch.device("cuda:0")})()
BAD_CALLS = {
    r"shape is 5; expected \(N, C, ...\) in positive integers": lambda: strided().p_sample_loop(
        model, 5
    ),
    r"shape is \(2, -3, 4\); expected": lambda: strided().p_sample_loop(model, (2, -3, 4)),
    r"device is 'gpu'; expected 'cpu'": lambda: strided().p_sample_loop(model, SHAPE, device="gpu"),
    r"noise must be a floating-point tensor .* got list": lambda: strided().p_sample_loop(
        model, SHAPE, [0.0]
    ),
    r"the noise of step 5 must be a tensor, got NoneType": lambda: strided().p_sample_loop(
        model, SHAPE, step_noise=lambda i: None
    ),
    r"shape is \(\); expected": lambda: strided().p_sample_loop(model, ()),
    r"noise has shape \(2, 3\), but shape is": lambda: strided().ddim_sample_loop(
        model, SHAPE, torch.zeros(2, 3)
    ),
    r"noise must have the shape of x, \(2, 3, 4, 4\), got \(4, 4\)": lambda: (
        strided().p_sample_loop(model, SHAPE, step_noise=lambda i: torch.zeros(4, 4))
    ),
    r"eta is -0.5; expected ≥ 0": lambda: strided().ddim_sample_loop(model, SHAPE, eta=-0.5),
    r"eta is nan; expected ≥ 0": lambda: strided().ddim_sample_loop(model, SHAPE, eta=float("nan")),
    r"reverse DDIM is deterministic: eta must be 0, got 0.5": lambda: strided().ddim_reverse_sample(
        model, images(*SHAPE), torch.tensor([0, 1]), eta=0.5
    ),
    r"the generator is on cuda:0 but the samples are on cpu": lambda: strided().p_sample_loop(
        model, SHAPE, generator=GENERATOR_ELSEWHERE
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_gets_one_line(message):
    with pytest.raises(InputError, match=message) as caught:
        BAD_CALLS[message]()
    assert "\n" not in str(caught.value)


def test_the_reverse_reaches_the_prior_beyond_the_last_step():
    diffusion = strided()
    t = torch.full((2,), 5)
    x = images(*SHAPE)
    out = diffusion.ddim_reverse_sample(model, x, t)
    signal, sigma = np.sqrt(diffusion.alphas_cumprod[5]), np.sqrt(1 - diffusion.alphas_cumprod[5])
    torch.testing.assert_close(out["sample"], (x - signal * out["pred_xstart"]) / sigma)
