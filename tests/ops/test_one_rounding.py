"""Every operation computes in float32 and rounds once, the reference as the kernels do: in every
dtype its error against float64 is one rounding of the exact result and float32's arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_posterior_step import direct, table

import fastdiff
import rms_norm_cases
from attention_tools import head_by_head
from fastdiff.ops import attention, group_norm_silu, posterior_step, q_sample, rms_norm_silu
from norm_cases import LAYOUTS, case, doubled, equations, gradients, run

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF, torch.float64]
ROUNDINGS = 64  # of float32's on the way, of the largest number that is added

served = st.sampled_from(
    [("reference", dtype) for dtype in DTYPES] + [("native", dtype) for dtype in DTYPES[:3]]
)


# Relative error of the C++ kernels' SiLU in half precision, where AVX-512 has a reciprocal of its
# own (csrc/cpu/vector.h): an eighth of what rounding to float16 may cost.
HALF_SILU = 2.0**-14


def silu_error(served, activation):
    return HALF_SILU if served[0] == "native" and served[1] in HALF and activation else 0.0


def check(result, truth, largest, relative=0.0):
    """``truth`` in float64, and the size of what was added and cancels on the way to it."""
    dtype = result.dtype
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    on_the_way = ROUNDINGS * arithmetic.eps * largest + arithmetic.tiny
    if relative:  # times infinity it is no number
        on_the_way = on_the_way + relative * truth.abs()
    stored = torch.finfo(dtype)
    once = stored.eps / 2 * (truth.abs() + on_the_way) + stored.smallest_normal * stored.eps
    result = result.double()
    overflows = truth.abs() + once > stored.max
    error = torch.where(overflows, 0.0, (result - truth).abs())
    excess = error - once - on_the_way
    assert (excess <= 0).all(), f"{excess.max()} beyond what one rounding allows"


def per_channel(value, x):
    return value if value.shape == x.shape else value.reshape(*value.shape, *[1] * (x.dim() - 2))


def norm_terms(tensors, groups, eps):
    """What group_norm_silu adds up: (x + add) / σ · gain, and the offset."""
    wide = {k: v for k, v in doubled(tensors).items() if v is not None}
    x = wide["x"]
    size = x.abs()
    if "add" in wide:
        size = size + per_channel(wide["add"], x).abs()
    h = x + per_channel(wide["add"], x) if "add" in wide else x
    n = len(x)
    sigma = (h.reshape(n, groups, -1).var(2, correction=0, keepdim=True) + eps).sqrt()
    spread = size.reshape(n, groups, -1).amax(2, keepdim=True) / sigma
    spread = spread.expand(n, groups, h[0].numel() // groups).reshape(h.shape)
    gain = per_channel(wide["weight"][None], x).abs()
    offset = per_channel(wide["bias"][None], x).abs()
    if "scale" in wide:
        share = (1 + per_channel(wide["scale"], x)).abs()
        gain, offset = gain * share, offset * share + per_channel(wide["shift"], x).abs()
    return spread * gain + offset


@pytest.mark.seconds
@settings(deadline=None, max_examples=100)
@given(
    served=served,
    n=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 9),
    spatial=st.lists(st.integers(2, 6), min_size=1, max_size=3),
    parameters=st.sampled_from(DTYPES),
    film=st.sampled_from([None, "plain", "chunks"]),
    film_size=st.sampled_from([1.0, 1e-3, 100.0]),
    add=st.sampled_from([None, "embedding", "residual"]),
    add_size=st.sampled_from([1.0, 30.0, 3000.0]),
    mean=st.sampled_from([0.0, 10.0, 1000.0]),
    std=st.sampled_from([1e-3, 1.0, 100.0]),
    channels_last=st.booleans(),
    activation=st.sampled_from(["silu", None]),
)
def test_group_norm_silu(
    served, n, groups, width, spatial, parameters, film, film_size, add, add_size, mean, std,
    channels_last, activation,
):  # fmt: skip
    backend, dtype = served
    torch.manual_seed(0)
    tensors = case(
        n, groups * width, spatial, dtype=dtype, channels_last=channels_last, film=film, add=add,
        parameters=parameters, mean=mean, std=std,
    )  # fmt: skip
    for name, size in (("scale", film_size), ("shift", film_size), ("add", add_size)):
        if name in tensors:
            tensors[name] = tensors[name] * size
    with fastdiff.backend(backend):
        result = run(group_norm_silu, tensors, groups, activation=activation)
    assert result.dtype == dtype
    truth = run(equations, tensors, groups, activation=activation)
    check(result, truth, norm_terms(tensors, groups, 1e-5), silu_error(served, activation))


@pytest.mark.parametrize("dtype", HALF)
def test_an_embedding_is_added_in_float32(dtype):
    """Far from zero x + add has no more digits in half precision; the norm takes away the mean."""
    torch.manual_seed(0)
    tensors = case(2, 8, (4, 4), dtype=dtype, add="embedding")
    tensors["add"] = tensors["add"].float() + 300.0
    with fastdiff.backend("reference"):
        result = run(group_norm_silu, tensors, 2)
    assert (result.double() - run(equations, tensors, 2)).abs().max() < 0.01


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("add", [None, "embedding", "residual"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradients_of_group_norm_silu(dtype, parameters, add, channels_last):
    """Of the reference: the AVX-512 kernels take the sigmoid of half precision from fewer bits."""
    torch.manual_seed(0)
    tensors = case(
        2, 12, (5, 4), dtype=dtype, channels_last=channels_last, film="chunks", add=add,
        parameters=parameters,
    )  # fmt: skip
    if add == "embedding":
        tensors["add"] = tensors["add"] + 30
    upstream = torch.empty_like(tensors["x"]).copy_(torch.randn(tensors["x"].shape))
    with fastdiff.backend("reference"):
        found = gradients(group_norm_silu, tensors, 3, upstream)
    truth = gradients(equations, doubled(tensors), 3, upstream.double())
    for name, gradient in found.items():
        assert gradient.dtype == tensors[name].dtype
        terms = truth["x"] if name == "add" else truth[name]  # whose sum over a group is zero
        check(gradient, truth[name], 40 * terms.abs().max())


@settings(deadline=None, max_examples=80)
@given(
    served=served,
    n=st.integers(1, 3),
    c=st.integers(1, 40),
    spatial=st.lists(st.integers(1, 5), max_size=3),
    parameters=st.sampled_from(DTYPES),
    film=st.sampled_from([None, "rows", "chunks"]),
    film_size=st.sampled_from([1.0, 1e-3, 100.0]),
    std=st.sampled_from([1e-6, 1.0, 1e4]),
    channels_last=st.booleans(),
    activation=st.sampled_from(["silu", None]),
)
def test_rms_norm_silu(
    served, n, c, spatial, parameters, film, film_size, std, channels_last, activation
):
    backend, dtype = served
    torch.manual_seed(0)
    tensors = rms_norm_cases.case(
        n, c, spatial, dtype=dtype, channels_last=channels_last, film=film, parameters=parameters,
        std=std,
    )  # fmt: skip
    if film is not None:
        tensors["scale"], tensors["shift"] = (tensors[k] * film_size for k in ("scale", "shift"))
    with fastdiff.backend(backend):
        result = rms_norm_silu(**tensors, activation=activation)
    truth = rms_norm_cases.equations(**tensors, activation=activation)
    plain = dict(x=tensors["x"], weight=tensors["weight"], activation=None)
    terms = rms_norm_cases.equations(**plain).abs()
    if film is not None:
        rows = (n, c, *[1] * len(spatial))
        scale, shift = (tensors[k].double().reshape(rows) for k in ("scale", "shift"))
        terms = terms * (1 + scale).abs() + shift.abs()
    check(result, truth, terms, silu_error(served, activation))


def weighted_sizes(qkv, heads, order):
    """Σ softmax(q·k)·|v|: what attention adds up, where v has both signs and the sum cancels."""
    sizes = qkv.clone()
    parts = sizes.unflatten(1, (heads, 3, -1) if order == "heads_first" else (3, heads, -1))
    parts.select(2 if order == "heads_first" else 1, 2).abs_()  # v
    return head_by_head(sizes, heads, order)


@settings(deadline=None, max_examples=40)
@given(
    served=served,
    n=st.integers(1, 2),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    tokens=st.integers(1, 40),
    size=st.sampled_from([0.1, 1.0, 4.0]),
    order=st.sampled_from(["heads_first", "qkv_first"]),
)
def test_attention(served, n, heads, head_dim, tokens, size, order):
    backend, dtype = served
    qkv = torch.randn(n, 3 * heads * head_dim, tokens, generator=torch.Generator().manual_seed(0))
    qkv = (size * qkv).to(dtype)
    with fastdiff.backend(backend):
        result = attention(qkv, heads, order=order)
    # A score's rounding errors are its weight's relative ones.
    scores = 1 + size**2 * head_dim**0.5 * 10
    terms = scores * qkv.double().abs().max()
    if served == ("native", torch.bfloat16):  # in tiles the weights are bfloat16 too, as SDPA's
        rounded = weighted_sizes(qkv, heads, order) * torch.finfo(dtype).eps / 2
        terms = terms + rounded / (ROUNDINGS * torch.finfo(torch.float32).eps)
    check(result, head_by_head(qkv, heads, order), terms)


@settings(deadline=None, max_examples=40)
@given(
    served=served,
    noise_dtype=st.sampled_from(DTYPES),
    tables=st.sampled_from([torch.float32, torch.float64]),
    size=st.sampled_from([1e-4, 1.0, 3e4]),
    channels_last=st.booleans(),
)
def test_q_sample(served, noise_dtype, tables, size, channels_last):
    backend, dtype = served
    torch.manual_seed(0)
    x = (size * torch.randn(3, 4, 5, 3)).to(dtype)
    noise = torch.randn(3, 4, 5, 3).to(noise_dtype)
    if channels_last:
        x = x.contiguous(memory_format=LAYOUTS[2])
    t = torch.tensor([0, 2, 4])
    signal, sigma = torch.rand(2, 5).to(tables)
    with fastdiff.backend(backend):
        result, _ = q_sample(x, t, signal, sigma, noise=noise)
    a, b = (table.double()[t].view(3, 1, 1, 1) for table in (signal, sigma))
    terms = (a * x.double()).abs() + (b * noise.double()).abs()
    check(result, a * x.double() + b * noise.double(), terms)


TABLES = {
    "ddpm": table(6, var_type="fixed_large"),
    "learned": table(6, var_type="learned_range", clip_denoised=False),
    "ddim": table(6, method="ddim", eta=0.7),
    "sde-dpmsolver++": table(6, method="sde-dpmsolver++", clip_denoised=False),
}


@settings(deadline=None, max_examples=40)
@given(
    served=served.filter(lambda pair: pair[1] != torch.float64),
    name=st.sampled_from(sorted(TABLES)),
    i=st.integers(0, 5),
    size=st.sampled_from([0.1, 1.0, 50.0]),
    scale=st.sampled_from([None, 3.0]),
)
def test_posterior_step(served, name, i, size, scale):
    backend, dtype = served
    torch.manual_seed(0)
    rows = TABLES[name]
    x, noise, before = (size * torch.randn(3, 2, 3, 4, 5)).to(dtype)
    channels = 6 if rows.doubled_output else 3
    output = torch.randn(2 if scale is None else 4, channels, 4, 5).to(dtype)
    extras = dict(noise=noise, prev_x_start=before, guidance_scale=scale)
    with fastdiff.backend(backend):
        results = posterior_step(x, output, rows, i, **extras)
    x, output, noise, before = (v.double().numpy() for v in (x, output, noise, before))
    v = output[:2, 3:] if rows.learned_variance else None
    mean = output[:, :3]
    magnitude = np.abs(mean[:2])
    if scale is not None:
        mean = mean[2:] + scale * (mean[:2] - mean[2:])
        magnitude = (1 + scale) * np.abs(output[:2, :3]) + scale * np.abs(output[2:, :3])
    truths = direct(rows, i, x, mean, v=v, z=noise, before=before)
    a, b, c, d, o, e = (abs(getattr(rows, k)[i].item()) for k in (*"abcdo", "e0"))
    x_start = a * np.abs(x) + b * magnitude
    std = direct(rows, i, 0 * x, 0 * mean, v=v, z=np.abs(noise))[0]
    x_prev = c * x_start + d * np.abs(x) + o * magnitude + e * np.abs(before) + np.abs(std)
    for result, truth, terms in zip(results, truths, (x_prev, x_start), strict=True):
        check(result, torch.from_numpy(truth), torch.from_numpy(terms))
