"""A convolution of a doubled image by sums of its taps, a quarter of the outputs at a time."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastdiff
from fastdiff.ops import convolution, native
from fastdiff.ops.convolution.fastest import Products, possible
from fastdiff.ops.convolution.packed import folds, pack, sums_of

KERNELS = [(3, 3), (5, 5), (1, 3), (3, 7)]
DIRECT = [Products.FLOAT32, Products.BFLOAT16, Products.SPLIT]


def served(products):
    if not native.library().convolution_serves(int(products)):
        pytest.skip("this CPU has no tiles")
    return torch.bfloat16 if products == Products.BFLOAT16 else torch.float32


def doubled(x):
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_sums_of_taps(kernel, before):
    """Each part, as a convolution of the image as it was, is every other output both ways."""
    torch.manual_seed(0)
    x = torch.randint(-8, 9, (1, 3, 6, 7)).float()
    weight = torch.randint(-8, 9, (2, 3, *kernel)).float()
    expected = F.conv2d(F.pad(doubled(x), (before, 9) * 2), weight)
    wide = F.pad(x, (4, 9) * 2)
    parts = sums_of(weight, before).unflatten(0, (2, 2))
    for a, b in itertools.product(range(2), repeat=2):
        first = [4 + (remainder - before) // 2 for remainder in (a, b)]
        found = F.conv2d(wide[:, :, first[0] :, first[1] :], parts[a, b])
        theirs = expected[:, :, a::2, b::2]
        height, width = theirs.shape[2:]
        assert torch.equal(found[:, :, :height, :width], theirs)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3), (2, 40)])
@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (2, 3)])
@pytest.mark.parametrize("products", DIRECT)
def test_small_integers_are_exact(products, padding, size):
    """Sums and all: every output is at its place, odd sizes of the result included."""
    dtype = served(products)
    torch.manual_seed(0)
    x = torch.randint(-4, 5, (2, 40, *size)).to(dtype)
    for kernel in KERNELS:
        if min(2 * n + sum(padding) - k for n, k in zip(size, kernel, strict=True)) < 0:
            continue
        weight = torch.randint(-2, 3, (33, 40, *kernel)).float()
        packed = pack(weight, dtype, products=products, doubled=padding[0])
        assert packed.folded == padding[0]
        y, moments = convolution(x, packed, padding=padding, upsample=True, moments=True)
        expected = F.conv2d(F.pad(doubled(x.double()), padding * 2), weight.double())
        assert torch.equal(y, expected.to(dtype))
        found = [expected.mean((2, 3)), expected.var((2, 3), unbiased=False)]
        torch.testing.assert_close(moments.double(), torch.stack(found, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored, more", [(torch.float32, 1.05), (torch.bfloat16, 1.6)])
@pytest.mark.parametrize("products", DIRECT)
def test_how_exact_beside_products_of_every_tap(products, stored, more):
    """Ours and PyTorch's own. Weights of float32 are rounded either way, themselves or their sums;
    of bfloat16, the sums alone."""
    dtype = served(products)
    torch.manual_seed(0)
    x = torch.randn(2, 256, 8, 8).to(dtype)
    weight = (torch.randn(64, 256, 3, 3) / 48).to(stored)
    truth = F.conv2d(doubled(x.double()), weight.double(), padding=1)
    named = {"padding": (1, 1), "upsample": True}

    def error(y):
        return (y.double() - truth).square().mean().sqrt()

    found = error(convolution(x, pack(weight, dtype, products=products, doubled=1), **named)[0])
    of_every_tap = error(convolution(x, pack(weight, dtype, products=products), **named)[0])
    pytorchs = error(F.conv2d(doubled(x), weight.to(dtype), padding=1))
    assert found <= more * of_every_tap
    if dtype == torch.bfloat16:
        assert found <= more * pytorchs


def test_panels_follow_the_weight():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 16, 4, 4), torch.randn(8, 16, 3, 3)
    packed = pack(weight, x.dtype, doubled=1)
    weight.normal_()
    packed.refresh()
    y, _ = convolution(x, packed, padding=(1, 1), upsample=True)
    assert torch.allclose(y, F.conv2d(doubled(x), weight, padding=1), atol=2e-3)


def test_what_is_folded():
    assert folds(Products.FLOAT32, (3, 3)) and folds(Products.BFLOAT16, (1, 5))
    assert not folds(Products.SPLIT, (1, 1)) and not folds(Products.SPLIT, (2, 3))
    weight = torch.zeros(4, 3, 3, 3)
    for products in possible(torch.float32, (3, 3), 1):
        packed = pack(weight, torch.float32, products=products, doubled=1)
        assert (packed.folded is None) == (products >= Products.WINOGRAD2)


@pytest.mark.parametrize(
    "given", [{}, {"upsample": True, "padding": (0, 1)}, {"upsample": True, "stride": 2}]
)
def test_such_panels_are_for_nothing_else(given):
    packed = pack(torch.zeros(4, 3, 3, 3), torch.float32, doubled=1)
    said = "expected what the weight was packed for: upsample=True, padding=\\(1, …\\)"
    with pytest.raises(fastdiff.InputError, match=said):
        convolution(torch.zeros(1, 3, 4, 4), packed, **{"padding": (1, 1), **given})
