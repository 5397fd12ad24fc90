"""The q_sample operation: values, precision, layouts, noise, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import InputError
from fastdiff.ops.counters import training_step
from fastdiff.ops.q_sample.op import q_sample
from fastdiff.ops.q_sample.reference import q_sample as reference
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.schedules import cosine_betas, linear_betas
from kernel_tools import examples, noise_of

ALPHAS_CUMPROD = np.cumprod(1 - linear_betas(1000))
SIGNAL = torch.tensor(np.sqrt(ALPHAS_CUMPROD)).float()
SIGMA = torch.tensor(np.sqrt(1 - ALPHAS_CUMPROD)).float()
HALF = [torch.float16, torch.bfloat16]
# float64 is the reference's alone.
DTYPES = [pytest.param(d, marks=pytest.mark.any_backend) for d in (torch.float32, *HALF)]
DTYPES.append(torch.float64)
DEVICE = torch.get_default_device()


def inputs(shape=(6, 3, 5, 7), dtype=torch.float32):
    options = {"generator": torch.Generator("cpu").manual_seed(4), "device": "cpu"}
    x_start = torch.rand(shape, **options) * 2 - 1
    noise = torch.randn(shape, **options)
    t = torch.randint(1000, shape[:1], **options)
    return x_start.to(DEVICE, dtype), t.to(DEVICE), noise.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 3, 9), (6, 3, 5, 7), (2, 3, 2, 3, 4), (0, 3)])
def test_error_is_that_of_storing_the_exact_answer(dtype, shape):
    x_start, t, noise = inputs(shape, dtype)
    tables = (SIGNAL, SIGMA) if dtype != torch.float64 else (SIGNAL.double(), SIGMA.double())
    x_t, returned = q_sample(x_start, t, *tables, noise=noise)
    assert returned is noise and x_t.dtype == dtype and x_t.shape == x_start.shape
    rows = (-1,) + (1,) * (len(shape) - 1)
    signal, sigma = (table[t].double().view(rows) for table in tables)
    parts = signal * x_start.double(), sigma * noise.double()
    exact = parts[0] + parts[1]
    # The arithmetic rounds thrice; then half an ulp (or half the smallest step) of the storage.
    working = torch.float32 if dtype in HALF else dtype
    arithmetic = 1.5 * torch.finfo(working).eps * (parts[0].abs() + parts[1].abs())
    info = torch.finfo(dtype)
    storage = 0.5 * info.eps * exact.abs() + info.smallest_normal * info.eps if dtype in HALF else 0
    assert ((x_t.double() - exact).abs() <= arithmetic + storage).all()


@pytest.mark.any_backend
def test_bfloat16_images_get_noise_at_every_timestep():
    # Rounding alphas_cumprod to bfloat16 first, as diffusers does, leaves early timesteps clean.
    diffusion = GaussianDiffusion(cosine_betas(1000))
    x_start = torch.zeros(1000, 64, dtype=torch.bfloat16)
    noise = torch.ones_like(x_start)
    x_t = diffusion.q_sample(x_start, torch.arange(1000), noise).double()
    expected = torch.tensor(diffusion.sqrt_one_minus_alphas_cumprod)[:, None]
    assert (x_t > 0).all()
    assert ((x_t - expected).abs() <= expected * 2.0**-8).all()


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_timesteps_of_any_integer_type_in_every_call(dtype):
    # A first call plans, the next ones go by the plan.
    x_start, t, noise = inputs((5, 3, 4))
    t = t % 200
    expected = q_sample(x_start, t, SIGNAL, SIGMA, noise=noise)[0]
    for _ in range(3):
        assert torch.equal(q_sample(x_start, t.to(dtype), SIGNAL, SIGMA, noise=noise)[0], expected)


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_channels_last_and_strided_input_give_the_same_numbers(dtype):
    x_start, t, noise = inputs(dtype=dtype)
    expected, _ = q_sample(x_start, t, SIGNAL, SIGMA, noise=noise)
    last = x_start.contiguous(memory_format=torch.channels_last)
    x_t, _ = q_sample(last, t, SIGNAL, SIGMA, noise=noise)
    assert torch.equal(x_t, expected)
    wide = torch.stack([x_start, x_start], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(q_sample(wide, t, SIGNAL, SIGMA, noise=noise)[0], expected)


@pytest.mark.any_backend
def test_drawn_noise_is_what_x_t_holds():
    x_start, t, _ = inputs()
    for kwargs in ({}, {"seed": 9}):
        x_t, noise = q_sample(x_start, t, SIGNAL, SIGMA, **kwargs)
        assert torch.equal(x_t, q_sample(x_start, t, SIGNAL, SIGMA, noise=noise)[0])
    torch.manual_seed(3)
    _, noise = q_sample(x_start, t, SIGNAL, SIGMA)
    torch.manual_seed(3)
    assert torch.equal(noise, torch.randn(x_start.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_seeded_noise_is_the_counter_generators_for_a_training_step(dtype):
    x_start, t, _ = inputs(dtype=dtype)
    x_t, noise = q_sample(x_start, t, SIGNAL, SIGMA, seed=2**40 + 7, first_sample=5)
    expected = noise_of(
        tuple(x_start.shape),
        seed=2**40 + 7,
        step=training_step(0),
        first_sample=5,
        dtype=dtype,
        device=DEVICE,
    )
    assert noise.dtype == dtype and torch.equal(noise, expected)
    assert torch.equal(x_t, q_sample(x_start, t, SIGNAL, SIGMA, noise=noise)[0])


@pytest.mark.any_backend
@settings(deadline=None, max_examples=examples(100))
@given(batch=st.integers(1, 8), first=st.integers(0, 2**40), split=st.integers(0, 8))
def test_a_samples_noise_does_not_depend_on_its_batch(batch, first, split):
    split = min(split, batch)
    x_start, t = torch.zeros(batch, 2, 3), torch.arange(batch)
    whole, _ = q_sample(x_start, t, SIGNAL, SIGMA, seed=1, first_sample=first)
    parts = [
        q_sample(x_start[a:b], t[a:b], SIGNAL, SIGMA, seed=1, first_sample=first + a)[0]
        for a, b in ((0, split), (split, batch))
    ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.any_backend
def test_torch_noise_is_the_same_in_channels_last():
    x_start, t, _ = inputs()
    last = x_start.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(3)
    expected, _ = q_sample(x_start, t, SIGNAL, SIGMA)
    torch.manual_seed(3)
    x_t, noise = q_sample(last, t, SIGNAL, SIGMA)
    assert noise.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x_t, expected)


@pytest.mark.any_backend
def test_seeded_noise_is_the_same_in_channels_last():
    x_start, t, _ = inputs()
    expected, _ = q_sample(x_start, t, SIGNAL, SIGMA, seed=1)
    last = x_start.contiguous(memory_format=torch.channels_last)
    x_t, noise = q_sample(last, t, SIGNAL, SIGMA, seed=1)
    assert torch.equal(x_t, expected)
    assert noise.is_contiguous(memory_format=torch.channels_last)
    assert x_t.is_contiguous(memory_format=torch.channels_last)


def test_gradients_reach_x_start_and_noise():
    x_start, t, noise = inputs((6, 4), torch.float64)
    x_start.requires_grad_(), noise.requires_grad_()
    tables = SIGNAL.double(), SIGMA.double()
    q_sample(x_start, t, *tables, noise=noise)[0].sum().backward()
    torch.testing.assert_close(x_start.grad, tables[0][t][:, None].expand(6, 4))
    torch.testing.assert_close(noise.grad, tables[1][t][:, None].expand(6, 4))


def test_the_reference_answers_nan_for_a_timestep_out_of_range():
    # What the operation computes on a GPU, where looking at t would stall.
    x_start, _, noise = inputs((4, 3))
    x_t = reference(x_start, torch.tensor([-1, 0, 999, 1000]), SIGNAL, SIGMA, noise)
    assert x_t.isnan().all(dim=1).tolist() == [True, False, False, True]


def test_nothing_is_read_back_from_the_device():
    x_start, t, noise = (value.to("meta") for value in inputs())
    x_t, _ = q_sample(x_start, t, SIGNAL.to("meta"), SIGMA.to("meta"), noise=noise)
    assert x_t.shape == x_start.shape


def test_compiles_as_one_graph():
    x_start, t, noise = inputs()
    compiled = torch.compile(q_sample, fullgraph=True, backend="eager")
    x_t, _ = compiled(x_start, t, SIGNAL, SIGMA, noise=noise)
    assert torch.equal(x_t, q_sample(x_start, t, SIGNAL, SIGMA, noise=noise)[0])


X, T, NOISE = inputs()
BAD_CALLS = {
    "takes noise or seed, not both": lambda: q_sample(X, T, SIGNAL, SIGMA, noise=NOISE, seed=1),
    "t must lie in 0 … 999 .* got 1000": lambda: q_sample(X, T * 0 + 1000, SIGNAL, SIGMA),
    "t must be an integer tensor": lambda: q_sample(X, T.float(), SIGNAL, SIGMA),
    r"expected a shape \(6,\) for x_start": lambda: q_sample(X, T[:2], SIGNAL, SIGMA),
    "x_start must be a floating-point tensor .* torch.int64": lambda: q_sample(
        X.long(), T, SIGNAL, SIGMA
    ),
    "noise must have the shape of x_start": lambda: q_sample(X, T, SIGNAL, SIGMA, noise=NOISE[0]),
    "noise must be a floating-point tensor": lambda: q_sample(
        X, T, SIGNAL, SIGMA, noise=NOISE.long()
    ),
    r"tables must have shape \(K,\)": lambda: q_sample(X, T, SIGNAL[None], SIGMA[None]),
    "must have the shape of sqrt_alphas_cumprod": lambda: q_sample(X, T, SIGNAL, SIGMA[:5]),
    "sqrt_alphas_cumprod must be a floating-point tensor": lambda: q_sample(
        X, T, SIGNAL.numpy(), SIGMA
    ),
    "tables must have .* on x_start's device cpu, got .* on meta": lambda: q_sample(
        X, T, SIGNAL.to("meta"), SIGMA.to("meta")
    ),
    "seed": lambda: q_sample(X, T, SIGNAL, SIGMA, seed=-1),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_gets_one_line(message):
    with pytest.raises(InputError, match=message) as caught:
        BAD_CALLS[message]()
    assert "\n" not in str(caught.value)


@pytest.mark.cuda
def test_on_a_gpu_a_bad_timestep_is_nan_and_nothing_waits():
    diffusion = GaussianDiffusion(linear_betas(1000), var_type="learned_range")
    x_start = torch.rand(4, 3, 8, 8, device="cuda")
    t = torch.tensor([0, 999, 1000, -1], device="cuda")
    model = torch.nn.Conv2d(3, 6, 1).cuda()
    diffusion.training_losses(lambda x, t: model(x), x_start, t)  # tables go over once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x_t = diffusion.q_sample(x_start, t)
        loss = diffusion.training_losses(lambda x, t: model(x), x_start, t)["loss"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    bad = [False, False, True, True]
    assert x_t.isnan().all(dim=(1, 2, 3)).tolist() == bad
    assert loss.isnan().tolist() == bad
