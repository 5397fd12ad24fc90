"""What a sampler can be told beside the method: guidance, x_0 transforms, known regions, images."""

import numpy as np
import pytest
import torch

from fastdiff.errors import InputError
from fastdiff.methods.levels import MEAN_TYPES, VAR_TYPES
from fastdiff.methods.protocol import noise_levels
from fastdiff.methods.registry import METHODS
from fastdiff.ops.counters import known_step
from fastdiff.ops.normal import normal
from fastdiff.process.update import quantile
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas
from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, Tiny, closed_form, diffusion

NOISE, Z = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
GIVEN = {"noise": NOISE, "step_noise": lambda t: Z.roll(t)}


def loops(process, model, method, **options):
    """The reference loop's steps."""
    loop = process.p_sample_loop_progressive
    if method == "ddim":
        loop = process.ddim_sample_loop_progressive
    return list(loop(model, SHAPE, **GIVEN, **options))


def assert_same_steps(actual, expected):
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected, strict=True):
        for name in ("sample", "pred_xstart"):
            scale = max(1.0, theirs["sample"].abs().max(), theirs["pred_xstart"].abs().max())
            assert (ours[name] - theirs[name]).abs().max() <= 1e-4 * scale


# --- x_0 and the classifier -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("mean_type", MEAN_TYPES)
@pytest.mark.parametrize("var_type", VAR_TYPES)
def test_denoised_fn_and_cond_fn_are_the_loops(method, mean_type, var_type):
    process = diffusion(8, mean_type=mean_type, var_type=var_type)
    model = closed_form(doubled=process.learns_variance)

    def denoised_fn(x_start):
        return 0.5 * x_start.tanh()

    def cond_fn(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(-((x - t.view(-1, 1, 1, 1) / 10) ** 2).sum(), x)
        return 0.1 * gradient

    for options in (
        {"denoised_fn": denoised_fn},
        {"cond_fn": cond_fn},
        {"denoised_fn": denoised_fn, "cond_fn": cond_fn},
    ):
        sampler = Sampler(model, process, method=method, **options)
        expected = loops(process, model, method, **options)
        assert_same_steps(list(sampler.iterate(SHAPE, **GIVEN)), expected)
        plain = loops(process, model, method)
        if method == "ddpm" and mean_type == "previous_x" and "cond_fn" not in options:
            continue  # such a network is taken at its word, whatever x_0 is
        assert not torch.allclose(expected[-1]["sample"], plain[-1]["sample"], atol=1e-3)


def test_a_classifier_sees_the_networks_timesteps_and_arguments():
    model, seen = Tiny(), []

    def cond_fn(x, t, y):
        seen.append((t.tolist(), y.tolist()))
        return torch.zeros_like(x)

    labels = torch.tensor([0, 1, 2])
    process = diffusion(20, rescale_timesteps=True)
    sampler = Sampler(model, process, steps=3, cond_fn=cond_fn)
    sample = sampler.sample(SHAPE, model_kwargs={"y": labels})
    assert seen == [([t] * 3, [0, 1, 2]) for t in (950.0, 500.0, 0.0)]
    plain = Sampler(model, process, steps=3).sample(SHAPE, model_kwargs={"y": labels})
    assert torch.equal(sample, plain)
    with pytest.raises(InputError, match="what cond_fn returned must"):
        Sampler(model, process, steps=3, cond_fn=lambda x, t: x[:1]).sample(SHAPE)


def test_a_classifier_beside_guidance_sees_the_batch_itself():
    labels, seen = torch.tensor([0, 1, 2]), []

    def cond_fn(x, t, y):
        seen.append((len(x), len(t), y.tolist()))
        return torch.zeros_like(x)

    sampler = Sampler(Tiny(), diffusion(), steps=2, cond_fn=cond_fn, guidance_scale=2.0)
    sampler.sample(SHAPE, model_kwargs={"y": labels})
    assert seen == [(3, 3, [0, 1, 2])] * 2


@pytest.mark.parametrize("p", [0.5, 0.9, 0.995, 1.0])
def test_the_quantile_is_torchs(p):
    values = torch.randn(5, 37)
    torch.testing.assert_close(quantile(values, p), torch.quantile(values, p, dim=1))
    assert torch.equal(quantile(values[:, :1], p), values[:, 0])


@pytest.mark.parametrize("guided", [False, True])
def test_dynamic_thresholding_is_imagens(guided):
    """As a denoised_fn written out from Imagen's pseudo code."""

    def threshold(x):
        s = torch.quantile(x.abs().flatten(1), 0.9, dim=1).clamp(min=1).view(-1, 1, 1, 1)
        return x.clamp(-s, s) / s

    process, options, call = diffusion(12, var_type="learned_range"), {}, {}
    model = closed_form(doubled=True)
    if guided:
        options = {"guidance_scale": 3.0}
        call = {"model_kwargs": {"w": torch.ones(3, 1)}, "uncond_kwargs": {"w": torch.zeros(3, 1)}}
        inner = model

        def model(x, t, w):
            return inner(x, t) * (1 + w.view(-1, 1, 1, 1))

    for method in METHODS:
        written = Sampler(
            model, process, method=method, clip_denoised=False, denoised_fn=threshold, **options
        )
        fused = Sampler(model, process, method=method, dynamic_threshold=0.9, **options)
        expected = written.sample(SHAPE, seed=1, **call)
        actual = fused.sample(SHAPE, seed=1, **call)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert actual.abs().max() <= 3


# --- Guidance in an interval ------------------------------------------------------------------


def test_guidance_only_inside_its_interval():
    model, labels = Tiny().eval(), torch.tensor([0, 2, 1])
    inside = range(5, 13)
    batches = []

    def by_hand(x, t):
        null = torch.full_like(labels, model.null_label)
        conditional = model(x, t, labels)
        if int(t[0]) not in inside:
            return conditional
        unconditional = model(x, t, null)
        return unconditional + 4.0 * (conditional - unconditional)

    process = diffusion(20)
    expected = Sampler(by_hand, process, steps=10).sample(SHAPE, seed=2)
    model.seen.clear()
    sampler = Sampler(model, process, steps=10, guidance_scale=4.0, guidance_interval=(5, 12))
    actual = sampler.sample(SHAPE, seed=2, model_kwargs={"y": labels})
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    batches = [batch for _, _, batch, *_ in model.seen]
    steps = sampler.table.timesteps.tolist()
    assert batches == [6 if int(t) in inside else 3 for t in steps]  # half the work outside
    assert 3 in batches and 6 in batches


# --- Inpainting -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["counter", "torch"])
def test_the_known_region_comes_back_and_is_at_its_noise_level_between(method, kind):
    torch.manual_seed(0)
    process = diffusion(40)
    known = torch.randn(SHAPE).clamp(-1, 1)
    mask = torch.zeros(SHAPE[2:], dtype=torch.bool)
    mask[:, :2] = True
    sampler = Sampler(Tiny(), process, steps=6, method=method, rng=kind)
    steps = list(sampler.iterate(SHAPE, seed=3, known=known, known_mask=mask))
    last = steps[-1]["sample"]
    region = mask.expand(SHAPE)
    assert torch.equal(last[region], known[region])
    free = sampler.sample(SHAPE, seed=3)
    assert not torch.equal(last[~region], free[~region])  # the rest heard of it
    arrived = sampler.table.levels[1:]
    for i, (step, (signal, noise)) in enumerate(zip(steps, arrived, strict=False)):
        drawn = (step["sample"] - signal * known)[region] / noise
        assert 0.6 < drawn.std() < 1.4
        if kind == "counter":
            z = normal(SHAPE, seed=3, step=known_step(i))
            torch.testing.assert_close(drawn, z[region], rtol=1e-3, atol=1e-3)


def test_an_inpainted_sample_is_the_same_in_any_batch():
    known, mask = torch.randn(4, 2, 4, 4), torch.rand(4, 1, 4, 4) < 0.5
    sampler = Sampler(closed_form(), diffusion(), steps=5)
    whole = sampler.sample((4, 2, 4, 4), seed=1, known=known, known_mask=mask)
    parts = [
        sampler.sample(
            (1, 2, 4, 4), seed=1, first_sample=i, known=known[i], known_mask=mask[i].float()
        )
        for i in range(4)
    ]
    assert torch.equal(torch.cat(parts), whole)


# --- Image to image ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strength, taken", [(1.0, 10), (0.5, 5), (0.3, 3), (1e-6, 1)])
def test_an_image_is_noised_and_led_back(method, strength, taken):
    torch.manual_seed(0)
    process, image = diffusion(50), torch.randn(SHAPE).clamp(-1, 1)
    sampler = Sampler(closed_form(), process, steps=10, method=method)
    steps = list(sampler.iterate(SHAPE, image=image, strength=strength, noise=NOISE, seed=4))
    # The same as sampling the process over the remaining steps from the noised image.
    chosen = [int(t) for t in sampler.diffusion.model_timesteps[:taken]]
    rest = Sampler(closed_form(), process, timesteps=chosen, method=method)
    assert [step["timestep"] for step in steps] == rest.table.timesteps.tolist()
    x = process.q_sample(image, torch.full((3,), chosen[-1]), NOISE)
    expected = rest.sample(SHAPE, noise=x, seed=4)
    torch.testing.assert_close(steps[-1]["sample"], expected, rtol=1e-4, atol=1e-4)


def test_a_weak_change_keeps_the_image():
    image = torch.randn(SHAPE).clamp(-1, 1)

    def model(x, t):  # which knows the image
        signal, noise = (torch.tensor(level)[t.long()] for level in noise_levels(process))
        signal, noise = signal.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)
        return ((x - signal * image) / noise).float()

    process = diffusion(100)
    sampler = Sampler(model, process, steps=20, method="ddim")
    for strength in (0.2, 0.9):
        sample = sampler.sample(SHAPE, image=image, strength=strength)
        torch.testing.assert_close(sample, image, rtol=1e-3, atol=1e-3)


def test_images_and_known_regions_of_a_variance_exploding_process():
    process, image = VarianceExploding(geometric_sigmas(20)), torch.randn(SHAPE)
    sampler = Sampler(closed_form(), process, steps=5)
    sample = sampler.sample(SHAPE, image=image, strength=0.6, known=image, known_mask=torch.ones(1))
    assert torch.equal(sample, image)


# --- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dynamic_threshold": 1.5}, "dynamic_threshold is 1.5; expected a quantile"),
        ({"dynamic_threshold": "high"}, "dynamic_threshold is 'high'"),
        ({"guidance_interval": (0, 5)}, "give guidance_scale too"),
        ({"guidance_scale": 2.0, "guidance_interval": (5, 0)}, "low ≤ high"),
        ({"guidance_scale": 2.0, "guidance_interval": 5}, "guidance_interval is 5"),
        ({"spacing": "quadratic"}, "give steps="),
        ({"steps": 3, "timesteps": [0, 1]}, "both given"),
        ({"compile": "yes"}, "compile is 'yes'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        Sampler(closed_form(), diffusion(20), **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model_kwargs": [1]}, "model_kwargs is a list; expected a dict"),
        ({"known": torch.zeros(SHAPE)}, "belong together"),
        ({"known_mask": torch.ones(SHAPE)}, "belong together"),
        (
            {"known": torch.zeros(SHAPE), "known_mask": torch.ones(5)},
            r"known_mask has shape \(5,\)",
        ),
        ({"known": torch.zeros(4, 2, 4, 4), "known_mask": torch.ones(1)}, "known has shape"),
        ({"known": np.zeros(SHAPE), "known_mask": torch.ones(1)}, "known must be"),
        ({"known": torch.zeros(SHAPE), "known_mask": True}, "known_mask is a bool"),
        ({"image": torch.zeros(2, 2, 4, 4)}, "image has shape"),
        ({"image": torch.zeros(SHAPE), "strength": 0}, "strength is 0"),
        ({"image": torch.zeros(SHAPE), "strength": 1.1}, "strength is 1.1"),
        ({"image": torch.zeros(SHAPE), "strength": "all"}, "strength is 'all'"),
    ],
)
def test_bad_calls(arguments, message):
    with pytest.raises(InputError, match=message):
        Sampler(closed_form(), diffusion(), steps=2).sample(SHAPE, **arguments)


def test_no_classifier_without_signal():
    from fastdiff import GaussianDiffusion, linear_betas, rescale_zero_terminal_snr

    betas = rescale_zero_terminal_snr(linear_betas(20))
    process = GaussianDiffusion(betas, mean_type="v", var_type="fixed_small")
    with pytest.raises(InputError, match="zero terminal SNR"):
        Sampler(closed_form(), process, method="ddim", cond_fn=closed_form())
    Sampler(closed_form(), process, method="ddpm", cond_fn=closed_form()).sample(SHAPE)
