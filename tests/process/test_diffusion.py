"""Tables, configuration, the forward process, what a network's output means, and bad input."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_tools import gaussian, images, output_for, with_variance
from fastdiff.errors import InputError
from fastdiff.models.blocks import timestep_embedding
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.process.reverse import MEAN_TYPES, VAR_TYPES
from fastdiff.process.schedules import cosine_betas, jsd_betas, linear_betas

SHAPES = [(4, 3), (4, 2, 9), (4, 3, 8, 8), (2, 1, 4, 4, 4)]


# --- tables ---


def test_tables_are_float64_and_gathered_before_they_are_cast():
    diffusion = create_diffusion(steps=4000, noise_schedule="cosine")
    t = torch.arange(4000)
    expected = np.sqrt(1 - np.cumprod(1 - cosine_betas(4000)))
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        at = diffusion._tables.at(t, torch.zeros(4000, 1, dtype=dtype))
        gathered = at["sqrt_one_minus_alphas_cumprod"]
        assert gathered.dtype == dtype
        assert (gathered.flatten().numpy() == expected.astype(name)).all()
    for name in ("betas", "alphas_cumprod", "posterior_variance", "posterior_mean_coef1"):
        assert getattr(diffusion, name).dtype == np.float64


def test_ddim_sigma_comes_from_float64():
    # In float32, 1 - alphas_cumprod is off by 0.5 % at the first step of this schedule.
    diffusion = create_diffusion(steps=4000, noise_schedule="cosine")
    x, t = torch.zeros(1, 1), torch.tensor([1])
    diffusion.ddim_sample(lambda x, t: x, x, t, eta=1.0)
    ((table, _),) = diffusion._step_tables.values()
    sigma = np.sqrt(diffusion.posterior_variance).astype(np.float32)
    assert (table.sigma.flip(0).numpy() == sigma).all()


def test_the_first_log_variances_are_those_of_step_one():
    diffusion = create_diffusion(steps=100)
    assert diffusion.posterior_variance[0] == 0
    second = diffusion.posterior_variance[1]
    assert diffusion.posterior_log_variance_clipped[0] == np.log(second)
    assert diffusion.fixed_large_variance[0] == second
    assert (diffusion.fixed_large_variance[1:] == diffusion.betas[1:]).all()
    x, t = images(2, 1, 3), torch.tensor([0, 7])
    out = diffusion.p_mean_variance(lambda x, t: x, x, t)
    assert out["variance"][:, 0, 0].numpy() == pytest.approx([second, diffusion.betas[7]])
    small = GaussianDiffusion(diffusion.betas).p_mean_variance(lambda x, t: x, x, t)
    assert small["variance"][0, 0, 0] == 0
    assert small["log_variance"][0, 0, 0] == pytest.approx(math.log(second))


def test_tables_are_copied_to_a_device_once_and_usable_after_inference_mode():
    diffusion = create_diffusion(steps=30)
    x, t = images(3, 2), torch.tensor([1, 2, 3])
    with torch.inference_mode():
        diffusion.q_sample(x, t)
        diffusion.ddim_sample(lambda x, t: x, x, t, eta=0.5)
    tables = diffusion._tables.on(x)
    assert not any(table.is_inference() for table in tables.values())
    weight = torch.ones((), requires_grad=True)
    diffusion.training_losses(lambda x, t: weight * x, x, t)["loss"].sum().backward()
    diffusion.ddim_sample(lambda x, t: weight * x, x, t, eta=0.5)["sample"].sum().backward()
    assert weight.grad is not None
    assert diffusion._tables.on(x) is tables


def test_copies_and_pickles_compute_the_same():
    diffusion = create_diffusion(steps=30, timestep_respacing="5")
    x, t = images(3, 2), torch.tensor([0, 2, 4])
    expected = diffusion.q_sample(x, t, x)
    for twin in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        assert not twin._tables.copies and not twin._step_tables
        assert torch.equal(twin.q_sample(x, t, x), expected)


# --- configuration ---

CONFIGURED = [
    create_diffusion(),
    create_diffusion(learn_sigma=True, timestep_respacing="10,20", steps=100),
    create_diffusion(mean_type="v", zero_terminal_snr=True, loss_weighting="min_snr"),
    create_diffusion(rescale_timesteps=True).respace([50]),
    create_diffusion(steps=np.int64(60)).respace(np.int64(5)),
    create_diffusion(timestep_respacing=(3, np.int64(4))),
    create_diffusion(timestep_respacing="100").respace("ddim20"),
    GaussianDiffusion(linear_betas(30), mean_type="x_start", var_type="learned", loss_type="kl"),
    GaussianDiffusion(jsd_betas(30), mean_type="previous_x", loss_type="rescaled_mse").respace(7),
]


@pytest.mark.parametrize("diffusion", CONFIGURED)
def test_a_config_survives_json_and_builds_the_same_process(diffusion):
    text = json.dumps(diffusion.to_config())
    twin = GaussianDiffusion.from_config(json.loads(text))
    assert json.dumps(twin.to_config()) == text
    for name in ("betas", "timestep_map", "model_timesteps"):
        assert (getattr(twin, name) == getattr(diffusion, name)).all()
    for name in ("mean_type", "var_type", "loss_type", "loss_weighting", "original_num_steps"):
        assert getattr(twin, name) == getattr(diffusion, name)


def test_create_diffusion_reads_the_published_flags():
    plain = create_diffusion()
    assert (plain.mean_type, plain.var_type, plain.loss_type) == ("epsilon", "fixed_large", "mse")
    assert create_diffusion(sigma_small=True).var_type == "fixed_small"
    hybrid = create_diffusion(learn_sigma=True, sigma_small=True, rescale_learned_sigmas=True)
    assert (hybrid.var_type, hybrid.loss_type) == ("learned_range", "rescaled_mse")
    bound = create_diffusion(use_kl=True, rescale_learned_sigmas=True, predict_xstart=True)
    assert (bound.mean_type, bound.loss_type) == ("x_start", "rescaled_kl")
    assert create_diffusion(timestep_respacing="ddim50").num_timesteps == 50
    assert create_diffusion(timestep_respacing=[5, 10]).num_timesteps == 15


# --- the forward process ---


@pytest.mark.seconds
@settings(deadline=None)
@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=5), data=st.data())
def test_forward_methods_keep_any_shape(shape, data):
    diffusion = create_diffusion(steps=30)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    x = images(*shape).to(dtype)
    t = torch.tensor(
        data.draw(st.lists(st.integers(0, 29), min_size=shape[0], max_size=shape[0])),
        dtype=torch.int64,
    )
    noise = torch.randn(shape).to(dtype)
    x_t = diffusion.q_sample(x, t, noise)
    assert x_t.shape == x.shape and x_t.dtype == dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for value in diffusion.q_mean_variance(x, t) + diffusion.q_posterior_mean_variance(x, x_t, t):
        assert value.shape == x.shape and value.dtype == exact and value.isfinite().all()
    for i, step in enumerate(t.tolist()):
        one = diffusion.q_sample(x[i : i + 1], torch.tensor([step]), noise[i : i + 1])
        assert torch.equal(one[0], x_t[i])


def test_the_posterior_is_bayes_rule():
    # q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0), for scalars.
    diffusion = create_diffusion(steps=50)
    x_start, x_t, t = 0.3, -0.8, 20
    beta, prev = diffusion.betas[t], diffusion.alphas_cumprod[t - 1]
    precision = (1 - beta) / beta + 1 / (1 - prev)
    mean = (math.sqrt(1 - beta) * x_t / beta + math.sqrt(prev) * x_start / (1 - prev)) / precision
    got = diffusion.q_posterior_mean_variance(
        *(torch.tensor([[v]], dtype=torch.float64) for v in (x_start, x_t)), torch.tensor([t])
    )
    assert got[0].item() == pytest.approx(mean, rel=1e-10)
    assert got[1].item() == pytest.approx(1 / precision, rel=1e-10)


# --- what the network's output means ---


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
@pytest.mark.parametrize("var_type", VAR_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_perfect_network_recovers_x_start_and_the_posterior(mean_type, var_type, shape):
    diffusion = GaussianDiffusion(linear_betas(40), mean_type=mean_type, var_type=var_type)
    x_start = images(*shape, dtype=torch.float64)
    t = torch.arange(shape[0]) * 13 % 40
    x_t = diffusion.q_sample(x_start, t, gaussian(*shape, dtype=torch.float64))
    output = with_variance(diffusion, output_for(diffusion, x_start, x_t, t))
    out = diffusion.p_mean_variance(lambda x, t: output, x_t, t)
    assert {value.dtype for value in out.values()} == {torch.float64}
    assert {value.shape for value in out.values()} == {x_t.shape}
    torch.testing.assert_close(out["pred_xstart"], x_start, rtol=1e-9, atol=1e-9)
    true_mean = diffusion.q_posterior_mean_variance(x_start, x_t, t)[0]
    torch.testing.assert_close(out["mean"], true_mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean_type", MEAN_TYPES)
@pytest.mark.parametrize("var_type", VAR_TYPES)
def test_a_half_precision_network_is_computed_with_in_float32(mean_type, var_type):
    diffusion = GaussianDiffusion(linear_betas(40), mean_type=mean_type, var_type=var_type)
    x, t = images(3, 2, 4), torch.tensor([0, 11, 39])
    output = with_variance(diffusion, gaussian(3, 2, 4)).bfloat16()
    half = diffusion.p_mean_variance(lambda x, t: output, x, t)
    full = diffusion.p_mean_variance(lambda x, t: output.float(), x, t)
    for name, value in half.items():
        assert value.dtype == torch.float32 and torch.equal(value, full[name])


def test_learned_range_interpolates_respaced_logs_and_is_not_clamped():
    diffusion = create_diffusion(steps=400, learn_sigma=True, timestep_respacing="20")
    t = torch.tensor([0, 5, 19])
    for value in (-1.0, 0.0, 1.0, 3.0):
        values = torch.full((3, 1), value)
        model = lambda x, t, values=values: torch.cat([x, values], dim=1)  # noqa: E731
        out = diffusion.p_mean_variance(model, images(3, 1), t)
        fraction = (value + 1) / 2
        low = diffusion.posterior_log_variance_clipped[t]
        expected = fraction * np.log(diffusion.betas[t]) + (1 - fraction) * low
        assert out["log_variance"][:, 0].numpy() == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(out["variance"], out["log_variance"].exp())


def test_learned_is_the_log_variance_itself():
    diffusion = GaussianDiffusion(linear_betas(40), var_type="learned")
    out = diffusion.p_mean_variance(
        lambda x, t: torch.cat([x, torch.full_like(x, -2.5)], dim=1),
        images(2, 3),
        torch.tensor([0, 9]),
    )
    assert (out["log_variance"] == -2.5).all()
    torch.testing.assert_close(out["variance"], torch.full((2, 3), math.exp(-2.5)))


def test_denoised_fn_runs_before_the_clip_and_clip_can_be_off():
    diffusion = GaussianDiffusion(linear_betas(40), mean_type="x_start")
    x, t = images(2, 3), torch.tensor([3, 30])
    seen = []

    def triple(x_start):
        seen.append(x_start)
        return 3 * x_start

    out = diffusion.p_mean_variance(lambda x, t: 2 * torch.ones_like(x), x, t, True, triple)
    assert (seen[0] == 2).all() and (out["pred_xstart"] == 1).all()
    out = diffusion.p_mean_variance(lambda x, t: 2 * torch.ones_like(x), x, t, False, triple)
    assert (out["pred_xstart"] == 6).all()


def test_previous_x_keeps_its_mean_whatever_is_done_to_x_start():
    diffusion = GaussianDiffusion(linear_betas(40), mean_type="previous_x")
    x, t = images(2, 3), torch.tensor([3, 30])
    out = diffusion.p_mean_variance(lambda x, t: 5 * x, x, t)
    assert torch.equal(out["mean"], 5 * x) and out["pred_xstart"].abs().max() <= 1


def test_the_network_gets_float32_timesteps_and_model_kwargs():
    diffusion = create_diffusion(steps=4000, rescale_timesteps=True, timestep_respacing="50")
    seen = []

    def model(x, timesteps, y, scale=1.0):
        seen.append((x.dtype, timesteps, y, scale))
        return x

    y = torch.tensor([1, 2])
    t = torch.tensor([0, 49], dtype=torch.int32)
    diffusion.p_mean_variance(model, images(2, 3), t, model_kwargs={"y": y, "scale": 2.0})
    diffusion.training_losses(model, images(2, 3).bfloat16(), t, {"y": y})
    assert seen[0][0] == torch.float32 and seen[1][0] == torch.bfloat16
    for _, timesteps, labels, _ in seen:
        assert timesteps.dtype == torch.float32 and labels is y
        assert timesteps.tolist() == [0.0, 3999 * 0.25]
    assert [entry[3] for entry in seen] == [2.0, 1.0]


def test_timestep_embedding_is_cos_then_sin_with_divisor_half():
    t = torch.tensor([0.0, 2.5, 999.75])
    frequencies = np.exp(-math.log(10000) * np.arange(4) / 4)
    angles = t.numpy()[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    assert timestep_embedding(t, 8).numpy() == pytest.approx(expected, abs=1e-4)


# --- bad input ---

PLAIN = GaussianDiffusion(linear_betas(30))
LEARNED = GaussianDiffusion(linear_betas(30), var_type="learned_range")
X, T = torch.zeros(2, 3, 4), torch.tensor([0, 29])


def identity(x, t):
    return x


BAD_CALLS = {
    r"t must lie in 0 … 29 .* got 30": lambda: PLAIN.q_sample(X, T + 1),
    r"t must lie in 0 … 29 .* got -1": lambda: PLAIN.p_mean_variance(identity, X, T - 1),
    r"t must be an integer tensor .* got torch.float32": lambda: PLAIN.q_sample(X, T.float()),
    r"t must be an integer tensor .* got torch.bool": lambda: PLAIN.q_sample(X, T > 0),
    r"t must be an integer tensor .* got int": lambda: PLAIN.training_losses(identity, X, 3),
    r"expected a shape \(2,\) for x_start of shape \(2, 3, 4\), got \(1, 2\)": lambda: (
        PLAIN.training_losses(identity, X, T[None])
    ),
    r"expected a shape \(N,\) for x of shape \(\)": lambda: PLAIN._tables.at(T, torch.tensor(0.0)),
    r"x_start must be a floating-point tensor .* got torch.uint8": lambda: PLAIN.training_losses(
        identity, X.byte(), T
    ),
    r"noise must have the shape of x_start, \(2, 3, 4\), got \(2, 3\)": lambda: PLAIN.q_sample(
        X, T, X[..., 0]
    ),
    r"x_start must have the shape of x_t": lambda: PLAIN.q_posterior_mean_variance(X[:, :1], X, T),
    r"noise must have the shape of x, ": lambda: PLAIN.p_sample(identity, X, T, noise=X[:1]),
    r"t is on meta but x is on cpu": lambda: PLAIN.p_sample(identity, X, T.to("meta")),
    r"answered shape \(2, 3, 4\).*'learned_range' \(mean, then .* needs \(2, 6, 4\)": lambda: (
        LEARNED.p_sample(identity, X, T)
    ),
    r"the model answered shape \(2, 6, 4\).*'fixed_small' needs \(2, 3, 4\)": lambda: (
        PLAIN.training_losses(lambda x, t: torch.cat([x, x], 1), X, T)
    ),
    r"the model must answer a floating-point tensor, got dict": lambda: PLAIN.p_sample(
        lambda x, t: {}, X, T
    ),
    r"needs x of shape \(N, C, ...\) to split channels": lambda: LEARNED.p_sample(
        identity, X[:, 0, 0], T
    ),
    r"what denoised_fn returned must have the shape of x": lambda: PLAIN.p_mean_variance(
        identity, X, T, True, lambda x: x[:1]
    ),
    r"mean_type must be one of epsilon, .*, got 'eps'": lambda: GaussianDiffusion(
        [0.1], mean_type="eps"
    ),
    r"var_type must be one of": lambda: GaussianDiffusion([0.1], var_type="large"),
    r"loss_type must be one of": lambda: GaussianDiffusion([0.1], loss_type="l2"),
    r"loss_weighting must be None or 'min_snr'": lambda: GaussianDiffusion(
        [0.1], loss_weighting="p2"
    ),
    r"loss_weighting applies to the mse losses, not to 'kl'": lambda: GaussianDiffusion(
        [0.1], loss_type="kl", loss_weighting="min_snr"
    ),
    r"min_snr_gamma must be a positive number": lambda: GaussianDiffusion([0.1], min_snr_gamma=0),
    r"betas must lie in \(0, 1\], got 1.5 at step 1": lambda: GaussianDiffusion([0.1, 1.5]),
    r"betas must lie in \(0, 1\], got nan at step 0": lambda: GaussianDiffusion([math.nan]),
    r"betas must be one-dimensional": lambda: GaussianDiffusion([[0.1]]),
    r"betas must be an array of numbers, got str": lambda: GaussianDiffusion("linear"),
    r"too small to add noise": lambda: GaussianDiffusion([1e-17, 0.1]),
    r"no signal is left at step 0 of 2": lambda: GaussianDiffusion([1.0, 0.1], mean_type="v"),
    r"epsilon prediction cannot recover x_0 .* use mean_type 'v' or 'x_start'": lambda: (
        create_diffusion(zero_terminal_snr=True)
    ),
    r"epsilon prediction cannot recover x_0": lambda: create_diffusion(noise_schedule="jsd"),
    r"timestep_map must hold one number per step, 2 in all": lambda: GaussianDiffusion(
        [0.1, 0.2], timestep_map=[0]
    ),
    r"timestep_map must ascend within 0 … 4": lambda: GaussianDiffusion(
        [0.1, 0.2], timestep_map=[4, 2], original_num_steps=5
    ),
    r"timestep_map must hold one number per step, got \[\[0\], \[1, 2\]\]": lambda: (
        GaussianDiffusion([0.1, 0.2], timestep_map=[[0], [1, 2]])
    ),
    r"original_num_steps must be an integer, got 10.5": lambda: GaussianDiffusion(
        [0.1, 0.2], original_num_steps=10.5
    ),
    r"min_snr_gamma must be a positive number, got '5'": lambda: GaussianDiffusion(
        [0.1], min_snr_gamma="5"
    ),
    r"unknown noise schedule \['linear'\]": lambda: GaussianDiffusion.from_config(
        {"noise_schedule": ["linear"]}
    ),
    r"eta is '0'; expected ≥ 0": lambda: PLAIN.ddim_sample(identity, X, T, eta="0"),
    r"floating-point tensor, got torch.int64": lambda: PLAIN.p_sample(lambda x, t: x.long(), X, T),
    r"mean_type='v' contradicts the flag that chooses 'x_start'": lambda: create_diffusion(
        mean_type="v", predict_xstart=True
    ),
    r"the sections choose no timesteps": lambda: create_diffusion(timestep_respacing=0),
    r"not a diffusion config: .*'colour'": lambda: GaussianDiffusion.from_config({"colour": 3}),
    r"a diffusion config must be a dict, got list": lambda: GaussianDiffusion.from_config([]),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_gets_one_line(message):
    with pytest.raises(InputError, match=message) as caught:
        BAD_CALLS[message]()
    assert "\n" not in str(caught.value)
