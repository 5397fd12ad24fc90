"""Winograd's algorithm in the native convolution, against float64 and beside PyTorch's own."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastdiff.ops import native
from fastdiff.ops.convolution.reference import convolution

TILES_OF_2, TILES_OF_4 = 3, 4  # Products of csrc/common/convolution.h
WINOGRAD = pytest.mark.parametrize("products", [TILES_OF_2, TILES_OF_4])


def randoms(channels, out_channels, size, *, samples=2, dtype=torch.float32, **changes):
    """A convolution's arguments, all of them, by the names of the reference."""
    g = torch.Generator().manual_seed(0)
    second = changes.pop("second", 0)
    made = {"padding": (1, 1), "upsample": False, "activation": "silu", "moments": True} | changes
    both, (height, width) = channels + second, size
    out = [(n << made["upsample"]) + sum(made["padding"]) - 2 for n in size]

    def image(count, *size):
        image = torch.randn(samples, count, *size, generator=g)
        return image.to(dtype, memory_format=torch.channels_last)

    return made | {
        "x": image(channels, height, width),
        "second": image(second, height, width) if second else None,
        "weight": torch.randn(out_channels, both, 3, 3, generator=g) / (9 * both) ** 0.5,
        "coefficients": torch.randn(samples, 2, both, generator=g),
        "bias": torch.randn(out_channels, generator=g),
        "add": torch.randn(samples, out_channels, generator=g),
        "residual": image(out_channels, *out),
    }


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def aligned(size):
    room = torch.full((size + 64,), 255, dtype=torch.uint8)  # NaN
    return room[-room.data_ptr() % 64 :][:size]


def native_convolution(products, threads=1, **given):
    """The binding, called as the reference is."""
    library = native.library()
    x, second, weight = given["x"], given["second"], given["weight"]
    out_channels, channels = weight.shape[:2]
    y = torch.full_like(given["residual"], torch.nan)
    moments = torch.full((len(x), 2, out_channels), torch.nan)
    shape = library.ConvolutionShape(
        samples=len(x),
        channels=x.shape[1],
        second_channels=0 if second is None else second.shape[1],
        height=x.shape[2],
        width=x.shape[3],
        out_channels=out_channels,
        out_height=y.shape[2],
        out_width=y.shape[3],
        kernel_height=3,
        kernel_width=3,
        stride=1,
        padding=given["padding"][0],
        upsample=given["upsample"],
        folded=False,
        silu=given["activation"] == "silu",
        dtype=native.DTYPE_CODES[x.dtype],
        products=products,
        add_stride=out_channels,
    )
    panels = aligned(library.convolution_panels(products, out_channels, channels, 9))
    library.pack_convolution_cpu(
        products,
        weight.data_ptr(),
        out_channels,
        channels,
        9,
        9 * channels,
        9,
        1,
        panels.data_ptr(),
        threads,
    )
    floats = library.convolution_workspace(shape, True, threads)
    workspace = torch.full((floats,), torch.nan)
    additions = [address(given[name]) for name in ("bias", "add", "residual")]
    places = [y.data_ptr(), moments.data_ptr(), workspace.data_ptr()]
    inputs = [x.data_ptr(), address(second), address(given["coefficients"]), panels.data_ptr()]
    library.convolution_cpu(shape, *inputs, *additions, *places, threads)
    return y, moments


def in_float64(given):
    return convolution(**{k: v.double() if torch.is_tensor(v) else v for k, v in given.items()})


def error(found, exact):
    """The largest, as a share of the largest value."""
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def bare(*args):
    return randoms(*args, activation=None) | {"coefficients": None, "bias": None, "add": None}


CASES = {
    "whole tiles and blocks": partial(randoms, 32, 64, (8, 8)),
    "sizes that are no multiples": partial(randoms, 20, 70, (9, 7)),
    "one place": partial(randoms, 16, 8, (1, 1)),
    "many samples of a tile": partial(randoms, 16, 24, (4, 4), samples=9),
    "two sources": partial(randoms, 32, 40, (8, 12), second=16),
    "upsampled": partial(randoms, 16, 32, (6, 5), upsample=True),
    "no padding": partial(randoms, 16, 32, (7, 10), padding=(0, 0)),
    "padding after": partial(randoms, 16, 32, (6, 6), padding=(0, 1)),
    "wide padding": partial(randoms, 16, 32, (6, 7), padding=(3, 2)),
    "wider than it is high": partial(randoms, 16, 16, (3, 90), samples=1),
    "more than a band": partial(randoms, 256, 16, (32, 20), samples=1),
    "nothing but products": partial(bare, 24, 32, (8, 8)),
}


@WINOGRAD
@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_every_shape_is_right(given, products, isa):
    given = given()
    y, moments = native_convolution(products, **given)
    exact, exact_moments = in_float64(given)
    assert error(y, exact) < 3e-6
    torch.testing.assert_close(moments.double(), exact_moments, rtol=1e-5, atol=1e-5)


@WINOGRAD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_sixteen_bits(products, dtype):
    given = randoms(32, 48, (8, 8), dtype=dtype)
    y, moments = native_convolution(products, **given)
    exact, exact_moments = in_float64(given)
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5)
    torch.testing.assert_close(moments.double(), exact_moments, rtol=1e-5, atol=1e-5)


@WINOGRAD
@pytest.mark.parametrize("name", ["many samples of a tile", "more than a band", "upsampled"])
def test_the_number_of_threads_changes_no_bit(products, name):
    one = native_convolution(products, **CASES[name]())
    for threads in (2, 3, 7):
        for found, expected in zip(
            native_convolution(products, threads, **CASES[name]()), one, strict=True
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(("products", "times_pytorch"), [(TILES_OF_2, 2), (TILES_OF_4, 4)])
def test_the_error_beside_pytorchs(products, times_pytorch, isa):
    """Smooth inputs, whose differences lose the most digits, too."""
    given = randoms(128, 64, (16, 16), activation=None) | {"add": None, "coefficients": None}
    given["residual"] = torch.zeros_like(given["residual"])
    for x in (given["x"], 8 + given["x"] / 8):
        given["x"] = x
        exact, _ = in_float64(given)
        own = F.conv2d(x, given["weight"], given["bias"], padding=1)
        y, _ = native_convolution(products, **given)
        assert error(y, exact) < min(times_pytorch * error(own, exact), 2e-5)


@WINOGRAD
def test_small_integers_are_exact_where_the_points_are(products):
    """One tap that is 1 moves the input; every transform of it is exact but the division by G's
    denominators, of which F(2×2) has powers of two alone."""
    given = randoms(16, 16, (8, 8), activation=None)
    given |= {"add": None, "bias": None, "coefficients": None}
    given["residual"] = torch.zeros_like(given["residual"])
    given["x"] = given["x"].mul(8).round()
    for tap in range(9):
        weight = torch.zeros(16, 16, 9)
        weight[range(16), range(16), tap] = 1
        given["weight"] = weight.reshape(16, 16, 3, 3)
        y, _ = native_convolution(products, **given)
        exact, _ = in_float64(given)
        if products == TILES_OF_2:
            assert torch.equal(y.double(), exact)
        else:
            assert error(y, exact) < 2e-6
