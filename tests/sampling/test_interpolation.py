"""Between images: DDIM's way to the noise and back, shared noise, and what lies between."""

import math

import pytest
import torch

from diffusion_tools import gaussian, images
from fastdiff.errors import InputError
from fastdiff.methods.inversion import encoding_table
from fastdiff.methods.table import StepTable
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.process.schedules import linear_betas
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas
from fastdiff.sampling.interpolation import encode, lerp, slerp, through_noise
from fastdiff.sampling.sampler import Sampler

SPREAD = 0.3  # standard deviation of the pixels in ``gaussian_sampler``


def gaussian_sampler(steps, method="ddim"):
    """With the exact network of pixels N(0, SPREAD²), along whose ODE x_t scales with its
    deviation."""
    diffusion = GaussianDiffusion(linear_betas(steps))
    alphas_cumprod = torch.from_numpy(diffusion.alphas_cumprod)
    log_snr = torch.logit(alphas_cumprod)  # between two steps it is linear in t

    def exact(x, t):
        below = t.long().clamp(max=len(log_snr) - 2)
        between = torch.lerp(log_snr[below], log_snr[below + 1], t.double() - below)
        alpha_bar = torch.sigmoid(between).float().view(-1, 1, 1, 1)
        return (1 - alpha_bar).sqrt() * x / (1 - alpha_bar + alpha_bar * SPREAD**2)

    return Sampler(exact, diffusion, method=method, clip_denoised=False)


@pytest.mark.parametrize("method", ["ddim", "euler"])
def test_encoding_follows_the_ode_and_its_error_falls_with_the_steps(method):
    x = gaussian(2, 1, 4, 4).float() * SPREAD
    one_way, there_and_back = [], []
    for steps in (50, 100, 200):
        sampler = gaussian_sampler(steps, method)
        last = sampler.diffusion.alphas_cumprod[-1]
        deviation = math.sqrt(1 - last + last * SPREAD**2)
        latent = encode(sampler, x)
        one_way.append((latent / (x / SPREAD * deviation) - 1).abs().max().item())
        again = sampler.sample(x.shape, noise=latent)
        there_and_back.append((again - x).abs().max().item())
    for errors in (one_way, there_and_back):
        assert errors[0] < 0.1
        for coarse, fine in zip(errors, errors[1:], strict=False):
            assert 1.7 < coarse / fine < 2.4  # first order, as Euler's steps are


def test_methods_of_higher_order_lead_back_better():
    x = gaussian(2, 1, 4, 4).float() * SPREAD
    higher = ("heun", "dpmsolver++", "dpmsolver++3m", "dpmsolver++2s", "unipc", "deis", "pndm")
    for steps in (50, 200):
        off = {}
        for method in ("ddim", *higher):
            sampler = gaussian_sampler(steps, method)
            again = sampler.sample(x.shape, noise=encode(sampler, x))
            off[method] = (again - x).abs().max().item()
        assert max(off[method] for method in higher) < 0.7 * off["ddim"]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "auto", "steps": 40},
        {"method": "dpm_2", "steps": 20, "spacing": "logsnr"},
        {"method": "deis", "method_options": {"variable": "t", "order": 2}, "timesteps": range(30)},
        {"method": "sde-dpmsolver++", "eta": 0.0, "steps": 20, "spacing": "karras"},
    ],
)
def test_the_way_back_is_of_the_samplers_own_settings(options):
    sampler = gaussian_sampler(100)
    sampler.configure(**options)
    x = gaussian(2, 1, 4, 4).float() * SPREAD
    again = sampler.sample(x.shape, noise=encode(sampler, x))
    torch.testing.assert_close(again, x, rtol=0, atol=0.05)


PROCESSES = {
    "linear": lambda: create_diffusion(steps=30, timestep_respacing="12"),
    "learned": lambda: create_diffusion(steps=12, noise_schedule="cosine", learn_sigma=True),
    "one step": lambda: create_diffusion(steps=100, timestep_respacing=[50]).respace([1]),
    "exploding": lambda: VarianceExploding(geometric_sigmas(12)),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_with_a_constant_network_the_way_back_is_exact(name):
    process = PROCESSES[name]()
    eps, x = gaussian(3, 1, 4, 4).float(), images(3, 1, 4, 4).float() * 0.9
    output = torch.cat([eps, eps], dim=1) if name == "learned" else eps
    sampler = Sampler(lambda x, t: output, process, method="ddim")
    latent = encode(sampler, x)
    level = {"rtol": 1e-4, "atol": 1e-4 * float(process.noise_scale[-1])}
    torch.testing.assert_close(
        latent, x * float(process.signal_scale[-1]) + eps * float(process.noise_scale[-1]), **level
    )
    torch.testing.assert_close(sampler.sample(x.shape, noise=latent), x, rtol=0, atol=2e-3)


def test_encoding_is_guided_as_the_way_back_is():
    process = PROCESSES["linear"]()
    strong, weak = gaussian(3, 1, 4, 4).float(), gaussian(1, 1, 4, 4).float()
    sampler = Sampler(
        lambda x, t: strong,
        process,
        method="ddim",
        guidance_scale=2.0,
        guide=lambda x, t: weak.expand_as(x),
        guidance_rescale=0.5,
        clip_denoised=False,
    )
    guided = 2 * strong - weak
    factor = 0.5 * strong.flatten(1).std(1) / guided.flatten(1).std(1) + 0.5
    eps, x = factor.view(-1, 1, 1, 1) * guided, images(3, 1, 4, 4).float()
    latent = encode(sampler, x)
    expected = x * float(process.signal_scale[-1]) + eps * float(process.noise_scale[-1])
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sampler.sample(x.shape, noise=latent), x, rtol=0, atol=2e-3)


def test_its_steps_are_the_published_ones():
    process = create_diffusion(steps=100, timestep_respacing="6")
    model = lambda x, t: torch.tanh(x) * (0.6 + 0.4 * torch.cos(t / 20)).view(-1, 1, 1, 1)  # noqa: E731
    start = images(2, 1, 4, 4).float() * 0.5
    x = process.signal_scale[0] * start + process.noise_scale[0] * model(start, torch.zeros(2))
    for t in range(5):
        x = process.ddim_reverse_sample(model, x, torch.full((2,), t))["sample"]
    found = encode(Sampler(model, process, method="ddim"), start)
    torch.testing.assert_close(found, x.float(), rtol=1e-5, atol=1e-5)


def test_the_network_is_asked_at_the_steps_on_the_way_and_never_beyond():
    process = create_diffusion(steps=100, timestep_respacing="4")
    table = encoding_table(process)
    assert table.timesteps.tolist() == [0, 0, 33, 66] and not table.is_noisy
    assert process.timestep_map.tolist() == [0, 33, 66, 99]


def test_encoding_knows_what_the_sampler_gives_its_network():
    seen = []

    def model(x, t, y, before):
        seen.append((y.tolist(), before.abs().max().item() > 0))
        return 0.5 * x

    process = create_diffusion(steps=3, noise_schedule="cosine")
    sampler = Sampler(model, process, method="ddim", self_condition="before")
    encode(sampler, images(2, 1, 4, 4).float(), {"y": torch.tensor([4, 5])})
    assert seen == [([4, 5], False), ([4, 5], True), ([4, 5], True)]


@pytest.mark.parametrize(
    "of, options, said",
    [
        ("process", {"method": "ddpm"}, "'ddpm' draws noise here"),
        ("process", {"method": "ddim", "eta": 0.5}, "'ddim' draws noise here"),
        ("process", {"method": "ddim", "cond_fn": lambda x, t: x}, "has a cond_fn"),
        ("table", {"method": "ddim"}, "is of a StepTable"),
    ],
)
def test_what_cannot_be_led_back(of, options, said):
    process = create_diffusion(steps=30)
    given = process if of == "process" else StepTable.from_process(process, **options)
    sampler = Sampler(lambda x, t: x, given, **options)
    with pytest.raises(InputError, match=said):
        encode(sampler, images(1, 1, 4, 4).float())


def test_mixtures_end_at_the_images():
    first, second = images(2, 3, 4, 4).float()
    weights = torch.linspace(0, 1, 5)
    for mix in (lerp, slerp):
        mixed = mix(first, second, weights)
        assert mixed.shape == (5, 3, 4, 4)
        torch.testing.assert_close(mixed[[0, 4]], torch.stack([first, second]))
    exact = lerp(first, second, weights)
    assert torch.equal(exact[0], first) and torch.equal(exact[4], second)
    assert torch.equal(exact[2], (first + second) / 2)


def test_slerp_goes_along_the_circle():
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    mixed = slerp(first, second, torch.tensor([1 / 3]))
    torch.testing.assert_close(mixed, 2 * torch.tensor([[math.cos(math.pi / 6), 0.5]]))
    for other in (first, -first, 0 * first):  # where there is no circle
        torch.testing.assert_close(
            slerp(first, other, torch.tensor([0.25])), lerp(first, other, torch.tensor([0.25]))
        )
    with pytest.raises(InputError, match="second must have the shape of first"):
        slerp(first, torch.ones(3), torch.tensor([0.5]))


@pytest.mark.parametrize("method", ["ddpm", "sde-dpmsolver++"])
def test_shared_noise_is_that_of_the_sampler_s_own_sample(method):
    sampler = Sampler(lambda x, t: 0.3 * x, create_diffusion(steps=40), steps=8, method=method)
    x = images(3, 1, 4, 4).float()
    x[2] = x[0]
    moved = through_noise(sampler, x, 5, seed=7, number=2)
    for image, found in zip(x, moved, strict=True):
        alone = sampler.sample(
            (1, 1, 4, 4), image=image[None], strength=5 / 8, seed=7, first_sample=2
        )
        torch.testing.assert_close(found[None], alone, rtol=0, atol=1e-4)
    assert torch.equal(moved[0], moved[2]) and not torch.allclose(moved[0], x[0], atol=0.05)


def test_steps_of_noise_from_none_to_all():
    sampler = Sampler(lambda x, t: x, create_diffusion(steps=40), steps=8)
    x = images(2, 1, 4, 4).float()
    assert torch.equal(through_noise(sampler, x, 0), x)
    for steps in (-1, 9):
        with pytest.raises(InputError, match=f"steps is {steps}; expected 0 … 8"):
            through_noise(sampler, x, steps)


@pytest.mark.parametrize("method", ["heun", "predictor-corrector", "restart"])
def test_shared_noise_of_a_method_with_several_rows_a_step(method):
    sampler = Sampler(lambda x, t: 0.3 * x, create_diffusion(steps=40), steps=8, method=method)
    x = images(2, 1, 4, 4).float()
    moved = through_noise(sampler, x, 5, seed=7, number=2)
    for image, found in zip(x, moved, strict=True):
        given = {"image": image[None], "strength": 5 / 8, "seed": 7, "first_sample": 2}
        alone = sampler.sample((1, 1, 4, 4), **given)
        torch.testing.assert_close(found[None], alone, rtol=0, atol=1e-4)
    assert len(sampler.table) > 8
    through_noise(sampler, x, 8)
    with pytest.raises(InputError, match="steps is 9; expected 0 … 8"):
        through_noise(sampler, x, 9)
