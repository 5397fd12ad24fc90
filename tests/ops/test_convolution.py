"""convolution and norm_coefficients: against their equations in float64, and PyTorch's own."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff.ops import convolution, native, norm_coefficients
from fastdiff.ops.convolution import reference
from fastdiff.ops.convolution.fastest import Products, possible, products_of
from fastdiff.ops.convolution.op import Arguments, bound
from fastdiff.ops.convolution.packed import pack
from kernel_tools import ISAS, examples, forced_isa, scratch_of_nan  # noqa: F401
from norm_cases import threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the largest result, which may be what large terms leave: a rounding of it, of the inputs where
# they are rounded or in pieces, and the sums'.
BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}

IN_BFLOAT16 = [Products.BFLOAT16, Products.PAIRS]
OF_DTYPES = [(dtype, products_of(dtype)) for dtype in DTYPES]


def case(n, c, size, k, kernel, *, second=0, dtype=torch.float32, doubled=False, **options):
    """(positional, named) arguments with everything that the operation takes."""
    x = torch.randn(n, c, *size).to(dtype)
    channels = c + second
    weight = torch.randn(k, channels, *kernel) / (channels * kernel[0] * kernel[-1]) ** 0.5
    named = {
        "bias": torch.randn(k),
        "second": torch.randn(n, second, *size).to(dtype) if second else None,
        "coefficients": torch.stack([torch.rand(n, channels) + 0.5, torch.randn(n, channels)], 1),
        "add": torch.randn(n, k + 3)[:, :k],
        "upsample": doubled,
        **options,
    }
    shape = reference.convolution(x.double(), weight.double(), **in_float64(named))[0].shape
    named["residual"] = torch.randn(shape).to(dtype)
    return (x, weight), named


def in_float64(named):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in named.items()}


def check(arguments, products=None):
    """``products``: of a packed weight."""
    (x, weight), named = arguments
    doubled = named["padding"][0] if named["upsample"] and named.get("stride", 1) == 1 else None
    given_weight = weight
    if products is not None:
        given_weight = pack(weight, x.dtype, products=products, doubled=doubled)
    y, moments = convolution(x, given_weight, moments=True, **named)
    used = products_of(x.dtype) if products is None else products
    rounded = weight.to(torch.bfloat16) if used in IN_BFLOAT16 else weight
    truth, expected = reference.convolution(
        x.double(), rounded.double(), moments=True, **in_float64(named)
    )
    assert y.dtype == x.dtype and moments.dtype == torch.float32
    bound = BOUNDS[x.dtype] * truth.abs().amax().clamp_min(1)  # of terms of about 1
    assert (y.double() - truth).abs().max() <= bound
    spread = expected[:, 1].amax().sqrt()
    assert (moments[:, 0] - expected[:, 0]).abs().max() <= BOUNDS[x.dtype] * 3 * spread.clamp_min(1)
    assert (moments[:, 1] - expected[:, 1]).abs().max() <= BOUNDS[x.dtype] * 6 * spread.clamp_min(
        1
    ) ** 2
    return y, moments


@pytest.mark.seconds
@settings(deadline=None, max_examples=examples(150))
@given(data=st.data())
def test_any_shape(data):
    torch.manual_seed(0)
    draw = data.draw
    dtype, isa = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(ISAS))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (5, 5), (1, 3)]))
    padding = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    doubled = draw(st.booleans())
    least = [max(1, -(-(k - sum(padding)) // (2 if doubled else 1))) for k in kernel]
    size = [draw(st.integers(n, n + 11)) for n in least]
    stride = draw(st.integers(1, 3))
    arguments = case(
        draw(st.integers(1, 3)), draw(st.integers(1, 70)), size, draw(st.integers(1, 70)), kernel,
        second=draw(st.sampled_from([0, 0, 5, 16, 33])), dtype=dtype, doubled=doubled,
        stride=stride, padding=padding, activation=draw(st.sampled_from(["silu", None])),
    )  # fmt: skip
    with forced_isa(isa), threads(draw(st.integers(1, 3))):
        products = draw(st.sampled_from([None, *possible(dtype, kernel, stride)]))
        y, _ = check(arguments, products)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kernel, stride, padding, doubled",
    [
        ((3, 3), 1, (1, 1), False),
        ((3, 3), 1, (1, 0), False),  # rows go on behind their last output
        ((2, 3), 1, (0, 0), True),
        ((3, 3), 2, (0, 1), False),
        ((1, 1), 2, (0, 0), False),
        ((4, 2), 2, (1, 1), True),
        ((5, 5), 3, (2, 2), False),
    ],
)
def test_where_taps_are(isa, kernel, stride, padding, doubled, dtype):
    """In images that end in part of a strip, and blocks of channels that are not full."""
    torch.manual_seed(0)
    options = {"stride": stride, "padding": padding, "doubled": doubled, "dtype": dtype}
    check(case(2, 19, (11, 13), 21, kernel, second=6, activation="silu", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_outputs(dtype):
    """A block of them ends wherever the row does."""
    torch.manual_seed(0)
    whole, weight = torch.randn(1, 16, 1, 260).to(dtype), torch.randn(8, 16, 1, 1).to(dtype)
    exact = F.conv2d(whole.double(), weight.double())
    for products in possible(dtype, (1, 1), 1):
        packed = pack(weight.float(), dtype, products=products)
        for width in range(1, 261):
            y, _ = convolution(whole[..., :width], packed)
            bound = BOUNDS[dtype] * exact.abs().max()
            assert (y - exact[..., :width]).abs().max() <= bound, width


@pytest.mark.parametrize("n, c, side, k", [(1, 128, 32, 64), (8, 256, 8, 64), (3, 96, 4, 256)])
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("dtype, products", [*OF_DTYPES, (torch.bfloat16, Products.PAIRS)])
def test_threads_change_no_bit(n, c, side, k, doubled, dtype, products):
    needs(products)
    torch.manual_seed(0)
    side >>= doubled
    options = {"padding": (1, 1), "activation": "silu", "second": 32, "dtype": dtype}
    options["doubled"] = doubled
    arguments = case(n, c, (side, side), k, (3, 3), **options)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(check(arguments, products))
    for y, moments in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(moments, results[0][1])


def needs(products):
    if not native.library().convolution_serves(int(products)):
        pytest.skip(f"this CPU makes no products of the kind {products.name}")


@pytest.mark.parametrize("products", [Products.BFLOAT16, Products.SPLIT])
def test_tiles_that_nobody_has_asked_for(products):
    """Linux kills a process that uses them unasked; a packed weight may come from anywhere."""
    needs(products)
    script = f"""
import torch
from fastdiff.ops.convolution.op import convolution
from fastdiff.ops.convolution.packed import pack
from fastdiff.ops.convolution.fastest import Products
x, weight = torch.randn(1, 32, 8, 8), torch.randn(32, 32, 3, 3)
print(convolution(x, pack(weight, x.dtype, products=Products({int(products)})))[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "torch.Size([1, 32, 6, 6])"), done.stderr


@pytest.mark.parametrize("products", list(Products))
def test_how_exact_the_products_are(products):
    """Beside PyTorch's own, of the largest result."""
    needs(products)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 256, 8, 8), torch.randn(64, 256, 3, 3) / 48
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    dtype = torch.bfloat16 if products in IN_BFLOAT16 else torch.float32
    packed = pack(weight, dtype, products=products)
    y, _ = convolution(x.to(dtype), packed, padding=(1, 1))
    error = (y.double() - truth).abs().max() / truth.abs().max()
    assert error <= {Products.SPLIT: 6e-6}.get(products, 6e-3 if products in IN_BFLOAT16 else 3e-6)


@pytest.mark.parametrize("products", IN_BFLOAT16)
@pytest.mark.parametrize("mean", [0.0, 8.0])
def test_products_of_bfloat16_are_added_in_float32(products, mean):
    """Of inputs in float32, which are rounded, the sums are seen: each of n products is exact, and
    each of n additions rounds what is then there."""
    needs(products)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 70, 6, 5) + mean, torch.randn(40, 70, 3, 3)
    y, _ = convolution(x, pack(weight, x.dtype, products=products), padding=(1, 1))
    rounded = [v.bfloat16().double() for v in (x, weight)]
    truth = F.conv2d(*rounded, padding=1)
    bound = 70 * 9 * 2**-24 * F.conv2d(*(v.abs() for v in rounded), padding=1)
    error = (y.double() - truth).abs()
    assert (error <= bound).all() and error.max() > 0
    assert error.max() < 1e-6 * truth.abs().max()


@pytest.mark.parametrize("products", IN_BFLOAT16)
def test_subnormal_factors_and_sums_are_zero(products):
    """Of products in bfloat16; in float32 they are numbers."""
    needs(products)
    x = torch.zeros(1, 16, 1, 3)
    x[0, 3, 0] = torch.tensor([2.0**-130, 2.0**-80, 1.0])
    weight = torch.zeros(1, 16, 1, 1)
    for value, expected in ((2.0**40, [0, 2.0**-40, 2.0**40]), (2.0**-60, [0, 0, 2.0**-60])):
        weight[0, 3] = value
        y, _ = convolution(x, pack(weight, x.dtype, products=products))
        assert y.flatten().tolist() == expected
        y, _ = convolution(x, pack(weight, x.dtype, products=Products.FLOAT32))
        assert torch.equal(y.flatten(), x[0, 3, 0] * value)


@pytest.mark.parametrize("mean", [0.0, 1e3, -3e4])
def test_moments_far_from_zero(isa, mean):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 16, 16, 16), torch.eye(16)[:, :, None, None]
    bias = torch.full((16,), mean)
    y, moments = convolution(
        x, pack(weight, x.dtype, products=Products.FLOAT32), bias, moments=True
    )
    values = y.double().flatten(2)
    assert torch.allclose(moments[:, 0].double(), values.mean(2), rtol=1e-6, atol=1e-6)
    assert torch.allclose(moments[:, 1].double(), values.var(2, unbiased=False), rtol=1e-3)


def test_other_numbers_of_dimensions_and_float64():
    torch.manual_seed(0)
    for size in ((9,), (4, 3, 5)):
        (x, weight), named = case(2, 6, size, 4, (3,) * len(size), padding=(1, 1))
        y, _ = convolution(x, weight, **named)
        assert torch.equal(y, reference.convolution(x, weight, **named)[0])
    x, weight = torch.randn(1, 3, 5, 5).double(), torch.randn(4, 3, 3, 3).double()
    y, moments = convolution(x, weight, padding=(1, 1), moments=True)
    assert torch.allclose(y, F.conv2d(x, weight, padding=1), atol=1e-12, rtol=0)
    assert moments.dtype == torch.float64


def test_a_batch_of_none_and_other_layouts():
    y, moments = convolution(torch.zeros(0, 3, 5, 5), torch.ones(4, 3, 3, 3), moments=True)
    assert y.shape == (0, 4, 3, 3) and moments.shape == (0, 2, 4)
    torch.manual_seed(0)
    (x, weight), named = case(2, 32, (6, 7), 8, (3, 3), second=16, padding=(1, 1))
    expected, _ = convolution(x, weight, **named)
    for turned in (x.mT.contiguous().mT, x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(convolution(turned, weight, **named)[0], expected)
    strange = {**named, "add": named["add"].double(), "second": named["second"].double()}
    laid_out = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolution(x, laid_out, **strange)[0], expected)


def test_a_bound_call_follows_its_memory_in_any_number_of_threads():
    torch.manual_seed(0)
    x = torch.randn(1, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.nn.Parameter(torch.randn(8, 16, 3, 3))
    packed = pack(weight, x.dtype)
    y = torch.empty(1, 6, 6, 8).permute(0, 3, 1, 2)
    nothing = (None,) * 5
    call = Arguments(
        x, packed.panels, *nothing, 8, 3, 3, 1, 1, 1, *(False,) * 3, int(packed.products), False
    )
    run = bound(call, (y, None))
    for count in (1, 3, 2):
        with torch.no_grad():
            x.normal_()
            weight.normal_()
        packed.refresh()
        with threads(count):
            run()
        assert torch.allclose(y, F.conv2d(x, weight, padding=1), atol=1e-3)
    assert bound(call._replace(x=torch.zeros(1, 16, 6, 6)), (y, None)) is None  # of another layout


X, W = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3)


@pytest.mark.parametrize(
    "arguments, named, said",
    [
        ((X, torch.zeros(4, 2, 3, 3)), {}, r"weight is \(4, 2, 3, 3\).*expected \(K, 3, kernel"),
        ((X, torch.zeros(4, 3, 3)), {}, "weight is"),
        ((X[0, 0], W), {}, "weight is"),
        ((X, W, torch.zeros(3)), {}, r"bias is \(3,\).*expected floating-point \(4,\)"),
        ((X, W), {"second": torch.zeros(2, 1, 7, 8)}, r"second is \(2, 1, 7, 8\)"),
        ((X, W), {"coefficients": torch.zeros(2, 2, 4)}, r"coefficients is .*\(2, 2, 3\)"),
        ((X, W), {"add": torch.zeros(1, 4)}, r"add is"),
        ((X, W), {"residual": torch.zeros(2, 4, 8, 8)}, r"expected floating-point \(2, 4, 6, 6\)"),
        ((X, W), {"stride": 0}, "stride=0"),
        ((X, W), {"padding": (-1, 0)}, r"padding=\(-1, 0\)"),
        ((X, W), {"activation": "relu"}, "expected 'silu' or None"),
        ((X[:, :, :2], W), {}, "smaller than the kernel"),
        ((X.long(), W), {}, "expected floating-point"),
    ],
)
def test_what_is_refused(arguments, named, said):
    with pytest.raises(fastdiff.InputError, match=said):
        convolution(*arguments, **named)


# --- norm_coefficients ------------------------------------------------------------------------


def moments_of(x):
    values = x.flatten(2)
    mean = values.mean(2, keepdim=True)
    return torch.stack([mean[..., 0], (values - mean).square().mean(2)], dim=1)


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize(
    "n, c, second, groups", [(2, 32, 0, 8), (3, 20, 12, 4), (0, 4, 0, 2), (1, 14, 0, 7)]
)
def test_a_norm_as_scale_and_shift(isa, n, c, second, groups, film):
    torch.manual_seed(0)
    both = torch.randn(n, c + second, 6, 5) * 3 + 2
    weight, bias = torch.randn(2, c + second)
    rows = torch.randn(n, 2 * (c + second)).chunk(2, dim=1) if film else (None, None)
    a, b = both[:, :c], both[:, c:]
    coefficients = norm_coefficients(
        moments_of(a), groups, weight, bias, 1e-5, second=moments_of(b) if second else None,
        scale=rows[0], shift=rows[1],
    )  # fmt: skip
    expected = F.group_norm(both.double(), groups, weight.double(), bias.double(), 1e-5)
    if film:
        scale, shift = (row.double()[:, :, None, None] for row in rows)
        expected = expected * (1 + scale) + shift
    scale, shift = coefficients.double()[..., None, None].unbind(1)
    assert torch.allclose(both.double() * scale + shift, expected, atol=2e-5)
    with fastdiff.backend("reference"):
        again = norm_coefficients(
            moments_of(both), groups, weight, bias, scale=rows[0], shift=rows[1]
        )
    assert torch.allclose(again, coefficients, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, named, said",
    [
        (
            (torch.zeros(2, 3), 1, torch.zeros(3), torch.zeros(3)),
            {},
            r"expected \(N, 2, C\) in float32",
        ),
        ((torch.zeros(2, 2, 6), 4, torch.zeros(6), torch.zeros(6)), {}, "4 groups do not divide 6"),
        ((torch.zeros(2, 2, 6), 2, torch.zeros(5), torch.zeros(6)), {}, r"weight is \(5,\)"),
        (
            (torch.zeros(2, 2, 6), 2, torch.zeros(6), torch.zeros(6)),
            {"scale": torch.zeros(2, 6)},
            "give both scale and shift",
        ),
        (
            (torch.zeros(2, 2, 6), 2, torch.zeros(6), torch.zeros(6)),
            {"second": torch.zeros(2, 6)},
            r"second is \(2, 6\)",
        ),
    ],
)
def test_what_norm_coefficients_refuses(arguments, named, said):
    with pytest.raises(fastdiff.InputError, match=said):
        norm_coefficients(*arguments, **named)
