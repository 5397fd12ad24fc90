"""Whatever a call is given, every backend gives the same answer or the same refusal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_posterior_step import table

import fastdiff
from fastdiff.errors import InputError
from fastdiff.ops import attention, group_norm_silu, posterior_step, q_sample, rms_norm_silu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TABLES = {
    "ddpm": table(6, var_type="fixed_large"),
    "learned": table(6, var_type="learned"),
    "sde-dpmsolver++": table(6, method="sde-dpmsolver++"),
}
SIGNAL, SIGMA = torch.linspace(1, 0.1, 6), torch.linspace(0.1, 1, 6)

inputs = st.fixed_dictionaries(
    {
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 4, 6]), max_size=5),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(["contiguous", "reversed", "channels_last", "every second"]),
        "expanded": st.lists(st.integers(0, 4), max_size=5),  # dimensions of stride 0
        "value": st.sampled_from([None, float("nan"), float("inf"), -float("inf"), 6e4]),
    }
)


def tensor(shape, dtype, layout, expanded, value, seed=0):
    """Normal numbers, one of them ``value``."""
    sizes = [1 if dim in expanded else size for dim, size in enumerate(shape)]
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if value is not None and x.numel():
        x.view(-1)[-1] = value
    dims = list(range(x.dim()))
    if layout == "channels_last" and len(dims) > 2:
        order = [0, *dims[2:], 1]
    else:
        order = dims[::-1] if layout == "reversed" else dims
    x = x.permute(order).contiguous().permute([order.index(dim) for dim in dims])
    if layout == "every second" and dims:
        x = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    return x.expand(shape)


def outcome(call, backend):
    """(results, None), or (None, the refusal)."""
    with fastdiff.backend(backend):
        try:
            results = call()
        except InputError as error:
            return None, str(error)
    return results if isinstance(results, tuple) else (results,), None


def agree(call, x):
    expected, refusal = outcome(call, "reference")
    for backend in (None, "native"):
        results, said = outcome(call, backend)
        assert said == refusal
        if results is None:
            continue
        for result, wanted in zip(results, expected, strict=True):
            if wanted is None:
                assert result is None
                continue
            assert result.shape == wanted.shape and result.dtype == wanted.dtype
            dense = x.numel() * x.element_size() == x.untyped_storage().nbytes()
            if dense and 0 not in x.stride():
                larger = [i for i, size in enumerate(x.shape) if size > 1]
                strides = [[y.stride(i) for i in larger] for y in (result, wanted)]
                assert strides[0] == strides[1] or x.numel() == 0
            eps = torch.finfo(x.dtype).eps
            size = wanted.double().abs().nan_to_num(0.0, posinf=0.0).sum().item()
            torch.testing.assert_close(
                result, wanted, rtol=2 * eps, atol=2e-5 * (1 + size), equal_nan=True
            )


@settings(deadline=None, max_examples=80)
@given(
    x=inputs,
    t=st.lists(st.sampled_from([0, 5, 6, -1, 2**40, -(2**63)]), max_size=6),
    t_dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.float32]),
    draws=st.booleans(),
    return_noise=st.booleans(),
)
def test_q_sample(x, t, t_dtype, draws, return_noise):
    noise = tensor(**x, seed=1)
    x = tensor(**x)
    t = (t * len(x))[: len(x)] if x.dim() else t  # as many as there are images, or too few
    limits = torch.iinfo(t_dtype) if t_dtype != torch.float32 else torch.finfo(t_dtype)
    t = torch.tensor([v for v in t if limits.min <= v <= limits.max], dtype=t_dtype)
    source = {"seed": 3} if draws else {"noise": noise}
    agree(lambda: q_sample(x, t, SIGNAL, SIGMA, return_noise=return_noise, **source), x)


@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (2, 0), (2, 0, 4)])
def test_a_timestep_out_of_range_is_refused_for_empty_images_too(shape):
    for backend in ("reference", "native"):
        with fastdiff.backend(backend), pytest.raises(InputError, match="got 6"):
            q_sample(torch.empty(shape), torch.tensor([6, -1]), SIGNAL, SIGMA, seed=0)


def test_noise_for_an_empty_batch_that_is_expanded():
    x = torch.zeros(1, 1, 1, 1).expand(0, 3, 4, 4)
    for backend in ("reference", "native"):
        with fastdiff.backend(backend):
            x_t, noise = q_sample(x, torch.empty(0, dtype=torch.long), SIGNAL, SIGMA, seed=0)
        assert x_t.shape == noise.shape == x.shape


@settings(deadline=None, max_examples=80)
@given(
    x=inputs,
    rows=st.sampled_from(sorted(TABLES)),
    step=st.sampled_from([0, 5, 6, -1, 2**40]),
    kind=st.sampled_from([int, torch.int64, torch.int32, torch.float32, torch.bool]),
    draws=st.booleans(),
    scale=st.sampled_from([None, 2.0, torch.tensor(2.0)]),
)
def test_posterior_step(x, rows, step, kind, draws, scale):
    noise, before = tensor(**x, seed=1), tensor(**x, seed=2)
    x = tensor(**x)
    rows, output = TABLES[rows], x
    if rows.doubled_output and x.dim() > 1:
        output = torch.cat([output, output], 1)
    if scale is not None and x.dim():
        output = torch.cat([output, -output])
    if kind is not int:
        step = torch.tensor(step % 2**31 if kind == torch.int32 else step).to(kind)
    source = {"seed": 3} if draws else {"noise": noise}
    options = dict(prev_x_start=before, guidance_scale=scale, **source)
    agree(lambda: posterior_step(x, output, rows, step, **options), x)


@pytest.mark.parametrize("step", [6, -1])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0)])
def test_a_step_that_names_no_row_is_refused_for_empty_images_too(shape, step):
    x = torch.empty(shape)
    for backend in ("reference", "native"):
        with fastdiff.backend(backend), pytest.raises(InputError, match=f"step is {step}"):
            posterior_step(x, x, TABLES["ddpm"], torch.tensor(step), seed=0)


@settings(deadline=None, max_examples=80)
@given(
    x=inputs,
    groups=st.sampled_from([-1, 0, 1, 2, 3]),
    affine=st.booleans(),
    film=st.booleans(),
    add=st.sampled_from([None, "embedding", "residual"]),
    activation=st.sampled_from(["silu", None]),
)
def test_group_norm_silu(x, groups, affine, film, add, activation):
    x["value"] = None if x["value"] == 6e4 else x["value"]
    residual = tensor(**x, seed=1)
    x = tensor(**x)
    rows = tuple(x.shape[:2])
    weight, bias = torch.linspace(0.5, 1.5, (*rows, 0, 0)[1]), torch.ones((*rows, 0, 0)[1])
    options = {"weight": weight, "bias": bias} if affine else {"weight": None, "bias": None}
    if film:
        options |= {"scale": torch.full(rows, 0.5), "shift": torch.full(rows, -1.0)}
    if add is not None:
        options["add"] = residual if add == "residual" else torch.ones(rows)
    # Few elements' small deviation magnifies float32's rounding errors; test_one_rounding.py
    # has numbers far from zero.
    agree(lambda: group_norm_silu(x, groups, eps=0.1, activation=activation, **options), x)


@settings(deadline=None, max_examples=80)
@given(x=inputs, film=st.booleans(), activation=st.sampled_from(["silu", None]))
def test_rms_norm_silu(x, film, activation):
    x = tensor(**x)
    rows = tuple(x.shape[:2])
    options = {}
    if film:
        options = {"scale": torch.full(rows, 0.5), "shift": torch.full(rows, -1.0)}
    weight = torch.linspace(0.5, 1.5, (*rows, 0, 0)[1])
    agree(lambda: rms_norm_silu(x, weight, activation=activation, **options), x)


@settings(deadline=None, max_examples=80)
@given(
    x=inputs,
    rows=st.sampled_from([3, 6, 12, 5]),
    heads=st.sampled_from([-1, 0, 1, 2]),
    order=st.sampled_from(["heads_first", "qkv_first"]),
)
def test_attention(x, rows, heads, order):
    x["shape"] = [*x["shape"][:1], rows, *x["shape"][1:]]
    x["value"] = None if x["value"] == 6e4 else x["value"]  # a softmax of rounding errors
    qkv = tensor(**x)
    expected, refusal = outcome(lambda: attention(qkv, heads, order=order), "reference")
    results, said = outcome(lambda: attention(qkv, heads, order=order), "native")
    assert said == refusal
    if refusal is None:
        # The kernel's exponential is never 0: its inf where 0·inf is NaN.
        result, wanted = results[0].nan_to_num(nan=4e4, posinf=4e4, neginf=4e4), expected[0]
        wanted = wanted.nan_to_num(nan=4e4, posinf=4e4, neginf=4e4)
        tolerance = 4 * torch.finfo(qkv.dtype).eps
        torch.testing.assert_close(result, wanted, rtol=tolerance, atol=tolerance)
