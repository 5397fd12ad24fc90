"""Training losses: the four types, their weights, zero terminal SNR; nothing waits for a device."""

import itertools

import numpy as np
import pytest
import torch

from diffusion_tools import gaussian, images, output_for
from fastdiff.process.forward import mean_flat
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.process.likelihood import vb_terms_bpd
from fastdiff.process.losses import LOSS_TYPES
from fastdiff.process.reverse import MEAN_TYPES, VAR_TYPES
from fastdiff.process.schedules import (
    cosine_betas,
    jsd_betas,
    linear_betas,
    rescale_zero_terminal_snr,
)
from fastdiff.process.tables import TablesAt

# --- losses ---


@pytest.mark.parametrize(
    ("mean_type", "var_type", "loss_type"),
    list(itertools.product(MEAN_TYPES, VAR_TYPES, LOSS_TYPES)),
)
def test_every_combination_trains(mean_type, var_type, loss_type):
    diffusion = GaussianDiffusion(
        linear_betas(30), mean_type=mean_type, var_type=var_type, loss_type=loss_type
    )
    weight = torch.full((2 if diffusion.learns_variance else 1,), 0.5, requires_grad=True)
    x_start, t = images(4, 3, 8, 8), torch.tensor([0, 1, 15, 29])

    def model(x, t):
        return torch.cat([w * x for w in weight], dim=1)

    terms = diffusion.training_losses(model, x_start, t)
    is_bound = loss_type in ("kl", "rescaled_kl")
    expected = {"loss"} if is_bound else {"loss", "mse"}
    expected |= {"vb"} if is_bound or diffusion.learns_variance else set()
    assert set(terms) == expected
    for value in terms.values():
        assert value.shape == (4,) and value.dtype == torch.float32 and value.isfinite().all()
    terms["loss"].mean().backward()
    assert weight.grad.isfinite().all() and (weight.grad != 0).all()


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
def test_a_perfect_network_has_no_squared_error(mean_type):
    diffusion = GaussianDiffusion(cosine_betas(40), mean_type=mean_type)
    x_start, noise = images(40, 2, 5, dtype=torch.float64), gaussian(40, 2, 5, dtype=torch.float64)
    t = torch.arange(40)
    x_t = diffusion.q_sample(x_start, t, noise)
    output = output_for(diffusion, x_start, x_t, t)
    terms = diffusion.training_losses(lambda x, t: output, x_start, t, noise=noise)
    assert terms["loss"].max() < 1e-15
    off = diffusion.training_losses(lambda x, t: output + 0.5, x_start, t, noise=noise)
    torch.testing.assert_close(off["mse"], torch.full((40,), 0.25, dtype=torch.float64))


def test_hybrid_detaches_the_mean_does_not_clip_and_scales_by_steps_over_1000():
    arguments = {"var_type": "learned_range", "mean_type": "x_start"}
    rescaled = GaussianDiffusion(linear_betas(40), loss_type="rescaled_mse", **arguments)
    x_start, noise = images(4, 3, 4), gaussian(4, 3, 4)
    t = torch.tensor([0, 3, 20, 39])
    mean = (3 * images(4, 3, 4, seed=2)).requires_grad_()  # well outside [-1, 1]
    values = images(4, 3, 4, seed=3).requires_grad_()

    def model(x, t):
        return torch.cat([mean, values], dim=1)

    terms = rescaled.training_losses(model, x_start, t, noise=noise)
    grad_mean, grad_values = torch.autograd.grad(
        terms["vb"].sum(), (mean, values), retain_graph=True
    )
    assert (grad_mean == 0).all() and (grad_values[1:] != 0).all()
    grad_loss, _ = torch.autograd.grad(terms["loss"].sum(), (mean, values), retain_graph=True)
    grad_mse, _ = torch.autograd.grad(terms["mse"].sum(), (mean, values), retain_graph=True)
    assert torch.equal(grad_loss, grad_mse)
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])

    x_t = rescaled.q_sample(x_start, t, noise)
    bound = vb_terms_bpd(rescaled, model, x_start, x_t, t, clip_denoised=False)[0]
    clipped = vb_terms_bpd(rescaled, model, x_start, x_t, t, clip_denoised=True)[0]
    torch.testing.assert_close(terms["vb"], bound * 40 / 1000)
    assert not torch.isclose(clipped, bound)[1:].any()
    plain = GaussianDiffusion(linear_betas(40), loss_type="mse", **arguments)
    torch.testing.assert_close(plain.training_losses(model, x_start, t, noise=noise)["vb"], bound)


def test_kl_losses_are_the_bound_in_bits_and_its_estimate():
    x_start, noise, t = images(4, 3, 4), gaussian(4, 3, 4), torch.tensor([0, 3, 20, 39])

    def model(x, t):
        return torch.tanh(x)

    kl = GaussianDiffusion(linear_betas(40), loss_type="kl")
    bound = vb_terms_bpd(kl, model, x_start, kl.q_sample(x_start, t, noise), t, False)[0]
    terms = kl.training_losses(model, x_start, t, noise=noise)
    torch.testing.assert_close(terms["loss"], bound)
    rescaled = GaussianDiffusion(linear_betas(40), loss_type="rescaled_kl")
    torch.testing.assert_close(
        rescaled.training_losses(model, x_start, t, noise=noise)["loss"], 40 * bound
    )


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_same_guess_the_same_whatever_is_predicted(gamma):
    betas = linear_betas(60)
    x_start, noise = images(60, 2, 3, dtype=torch.float64), gaussian(60, 2, 3, dtype=torch.float64)
    guess, t = images(60, 2, 3, dtype=torch.float64, seed=5), torch.arange(60)
    alphas_cumprod = np.cumprod(1 - betas)
    snr = torch.from_numpy(alphas_cumprod / (1 - alphas_cumprod))
    expected = snr.clamp(max=gamma) * mean_flat((guess - x_start) ** 2)
    for mean_type in MEAN_TYPES:
        diffusion = GaussianDiffusion(
            betas, mean_type=mean_type, loss_weighting="min_snr", min_snr_gamma=gamma
        )
        x_t = diffusion.q_sample(x_start, t, noise)
        output = output_for(diffusion, guess, x_t, t)
        terms = diffusion.training_losses(lambda x, t, o=output: o, x_start, t, noise=noise)
        torch.testing.assert_close(terms["loss"], expected, rtol=1e-8, atol=1e-12)
        target = output_for(diffusion, x_start, x_t, t)
        torch.testing.assert_close(terms["mse"], mean_flat((output - target) ** 2))


def test_min_snr_leaves_the_variance_term_alone():
    arguments = {"var_type": "learned_range", "loss_type": "rescaled_mse"}
    plain = GaussianDiffusion(linear_betas(40), **arguments)
    weighted = GaussianDiffusion(linear_betas(40), loss_weighting="min_snr", **arguments)
    x_start, noise, t = images(3, 2, 4), gaussian(3, 2, 4), torch.tensor([0, 10, 39])
    model = lambda x, t: torch.cat([x, x], dim=1)  # noqa: E731
    a = plain.training_losses(model, x_start, t, noise=noise)
    b = weighted.training_losses(model, x_start, t, noise=noise)
    assert torch.equal(a["vb"], b["vb"]) and torch.equal(a["mse"], b["mse"])
    assert b["loss"][0] < a["loss"][0]
    torch.testing.assert_close(b["loss"][2], a["loss"][2])


def test_losses_in_bfloat16_and_under_autocast_are_float32():
    diffusion = create_diffusion(steps=40, learn_sigma=True, rescale_learned_sigmas=True)
    x_start, noise, t = images(4, 3, 8, 8), gaussian(4, 3, 8, 8), torch.tensor([0, 1, 20, 39])
    model = torch.nn.Conv2d(3, 6, 3, padding=1)

    def call(x, t):
        return model(x)

    exact = diffusion.training_losses(call, x_start, t, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = diffusion.training_losses(call, x_start, t, noise=noise)
    model.bfloat16()
    stored = diffusion.training_losses(call, x_start.bfloat16(), t, noise=noise.bfloat16())
    for terms in (mixed, stored):
        for name, value in terms.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, exact[name], rtol=0.05, atol=1e-4)


# --- zero terminal SNR ---


@pytest.mark.parametrize("mean_type", ["v", "x_start", "previous_x"])
@pytest.mark.parametrize("betas", [rescale_zero_terminal_snr(linear_betas(50)), jsd_betas(50)])
@pytest.mark.parametrize("steps", ["50", "7", "2"])
def test_a_last_step_without_signal_trains_samples_and_scores(mean_type, betas, steps):
    diffusion = GaussianDiffusion(
        betas, mean_type=mean_type, loss_weighting="min_snr", var_type="fixed_large"
    ).respace(steps)
    assert diffusion.alphas_cumprod[-1] == 0
    x_start, last = images(3, 2, 4), diffusion.num_timesteps - 1
    t = torch.full((3,), last)
    noise = gaussian(3, 2, 4)
    x_t = diffusion.q_sample(x_start, t, noise)
    assert torch.equal(x_t, noise)

    def model(x, t):
        return 0.5 * torch.tanh(x)

    assert diffusion.training_losses(model, x_start, t)["loss"].isfinite().all()
    for name in ("p_sample_loop", "ddim_sample_loop"):
        assert getattr(diffusion, name)(model, (3, 2, 4)).isfinite().all()
    step = diffusion.ddim_sample(model, x_t, t)
    # All that x_t holds is noise: DDIM keeps it and adds the predicted x_0.
    signal, sigma = diffusion.alphas_cumprod[-2] ** 0.5, (1 - diffusion.alphas_cumprod[-2]) ** 0.5
    torch.testing.assert_close(step["sample"], signal * step["pred_xstart"] + sigma * x_t)
    for value in diffusion.calc_bpd_loop(model, x_start).values():
        assert value.isfinite().all()


def test_v_at_zero_snr_is_minus_x_start():
    diffusion = GaussianDiffusion(jsd_betas(20), mean_type="v")
    x, t = images(2, 3), torch.tensor([19, 19])
    assert torch.equal(diffusion.p_mean_variance(lambda x, t: x, x, t)["pred_xstart"], -x)


# --- no waiting for a device ---


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_training_reads_nothing_back_from_the_device(loss_type):
    """Tensors on the meta device have no values: any read-back would raise."""
    diffusion = GaussianDiffusion(linear_betas(30), var_type="learned_range", loss_type=loss_type)
    x_start = torch.empty(4, 3, 8, 8, device="meta")
    t = torch.empty(4, dtype=torch.int64, device="meta")
    terms = diffusion.training_losses(lambda x, t: torch.cat([x, x], 1), x_start, t)
    assert terms["loss"].device.type == "meta" and terms["loss"].shape == (4,)


@pytest.mark.seconds
def test_losses_compile_as_one_graph():
    diffusion = GaussianDiffusion(linear_betas(30), var_type="learned_range")
    x_start, noise, t = images(3, 2, 4), gaussian(3, 2, 4), torch.tensor([0, 10, 29])

    def losses(x_start, t, noise):
        return diffusion.training_losses(lambda x, t: torch.cat([x, x], 1), x_start, t, None, noise)

    compiled = torch.compile(losses, fullgraph=True, backend="eager")
    for _ in range(2):  # before and after the tables are on the device
        torch.testing.assert_close(compiled(x_start, t, noise), losses(x_start, t, noise))


def test_rows_out_of_range_become_nan_where_nobody_may_look():
    """What a GPU computes for a bad t (tables end in a NaN row), exercised on the CPU."""
    diffusion = create_diffusion(steps=30)
    x = torch.zeros(5, 1)
    at = TablesAt(diffusion._tables.on(x), torch.tensor([-7, -1, 3, 30, 99]), x)
    values = at["alphas_cumprod"].flatten()
    assert values.isnan().tolist() == [True, True, False, True, True]
    assert values[2] == np.float32(diffusion.alphas_cumprod[3])
