"""GroupNorm + FiLM + SiLU against the equations in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.group_norm_silu import group_norm_silu

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


def equations(x, num_groups, weight, bias, eps=1e-5, scale=None, shift=None, activation="silu"):
    """Group by group in float64, with nothing of the implementation."""
    n, c = x.shape[:2]
    groups = x.double().reshape(n, num_groups, -1)
    mean = groups.mean(2, keepdim=True)
    variance = ((groups - mean) ** 2).mean(2, keepdim=True)
    h = ((groups - mean) / (variance + eps).sqrt()).reshape(n, c, -1)
    if weight is not None:
        h = h * weight.double()[None, :, None] + bias.double()[None, :, None]
    if scale is not None:
        h = h * (1 + scale.double()[:, :, None]) + shift.double()[:, :, None]
    if activation == "silu":
        h = h / (1 + (-h).exp())
    return h.reshape(x.shape)


def inputs(n, c, spatial, dtype=torch.float32, film=False, channels_last=False):
    x = torch.randn(n, c, *spatial).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=LAYOUTS[len(spatial)])
    arguments = {"weight": torch.randn(c), "bias": torch.randn(c)}
    if film:
        arguments |= {"scale": torch.randn(n, c).to(dtype), "shift": torch.randn(n, c).to(dtype)}
    return x, arguments


def error(result: Tensor, truth: Tensor) -> float:
    return (result.double() - truth).abs().max().item()


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 32, 7), 32),
        ((2, 96, 5, 3), 32),
        ((3, 10, 1, 1), 5),
        ((2, 6, 3, 4, 5), 3),
        ((1, 30, 9, 9), 1),
        ((2, 64), 32),
    ],
)
def test_equations(shape, groups, film, activation):
    torch.manual_seed(0)
    x, arguments = inputs(shape[0], shape[1], shape[2:], film=film)
    result = group_norm_silu(x, groups, **arguments, activation=activation)
    truth = equations(x, groups, **arguments, activation=activation)
    assert result.shape == x.shape and result.dtype == x.dtype
    assert error(result, truth) < 2e-5


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 3),
    groups=st.integers(1, 5),
    width=st.integers(1, 20),
    spatial=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    film=st.booleans(),
    channels_last=st.booleans(),
)
def test_every_dtype_layout_and_size(n, groups, width, spatial, dtype, film, channels_last):
    """No further from the truth than a few roundings of numbers as large as it."""
    torch.manual_seed(0)
    channels_last = channels_last and len(spatial) > 1
    x, arguments = inputs(n, groups * width, spatial, dtype, film, channels_last)
    result = group_norm_silu(x, groups, **arguments)
    assert result.dtype == dtype and result.shape == x.shape
    if n:
        if channels_last:
            assert result.is_contiguous(memory_format=LAYOUTS[len(spatial)])
        truth = equations(x, groups, **arguments)
        size = 1 + equations(x, groups, **arguments, activation=None).abs().max().item()
        # A group of one element has variance 0 + eps: its noise is divided by sqrt(eps).
        assert error(result, truth) < 8 * torch.finfo(dtype).eps * size + 2e-5


def test_mean_far_above_the_deviation():
    torch.manual_seed(0)
    x = (torch.randn(2, 32, 8, 8) * 1e-2 + 100).contiguous()
    weight, bias = torch.ones(32), torch.zeros(32)
    own = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4, weight, bias))
    truth = equations(x, 4, weight, bias)
    assert error(group_norm_silu(x, 4, weight, bias), truth) <= 2 * error(own, truth) + 1e-6


def test_statistics_are_float32_in_half_precision():
    """A bfloat16 sum over 65,536 equal values stops growing at 256; the mean would be far off."""
    x = torch.full((1, 2, 256, 256), 1.0, dtype=torch.bfloat16)
    x[:, 1] = 3.0
    for layout in (torch.contiguous_format, torch.channels_last):
        result = group_norm_silu(
            x.contiguous(memory_format=layout), 1, torch.ones(2), torch.zeros(2), activation=None
        )
        assert torch.equal(result[0, :, 0, 0], torch.tensor([-1.0, 1.0], dtype=torch.bfloat16))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("film", [False, True])
def test_gradients(film, dtype, channels_last):
    torch.manual_seed(0)
    x, arguments = inputs(2, 64, (6, 5), dtype, film, channels_last)
    upstream = torch.randn_like(x)
    leaves = {"x": x, **arguments}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    result = group_norm_silu(leaves["x"], 16, **{k: v for k, v in leaves.items() if k != "x"})
    gradients = torch.autograd.grad(result, list(leaves.values()), upstream)

    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    truth = equations(exact["x"], 16, **{k: v for k, v in exact.items() if k != "x"})
    expected = torch.autograd.grad(truth, list(exact.values()), upstream.double())
    for name, gradient, true in zip(leaves, gradients, expected, strict=True):
        assert gradient.dtype == leaves[name].dtype
        bound = 16 * torch.finfo(dtype).eps * true.abs().max().item()
        assert error(gradient, true) < bound, name


def test_float64_passes_gradcheck():
    torch.manual_seed(0)
    x, arguments = inputs(2, 4, (3, 2), torch.float64, film=True)
    values = [
        v.double().requires_grad_()
        for v in (x, arguments["weight"], arguments["bias"], arguments["scale"], arguments["shift"])
    ]

    def call(x, weight, bias, scale, shift):
        return group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift)

    assert torch.autograd.gradcheck(call, values)


def test_float64_activations_with_float32_parameters():
    x, arguments = inputs(2, 8, (3, 3), torch.float64)
    result = group_norm_silu(x, 2, **arguments)
    assert result.dtype == torch.float64
    assert error(result, equations(x, 2, **arguments)) < 1e-12


@pytest.mark.parametrize("film", [False, True])
def test_autocast_keeps_the_dtype_of_x(film):
    x, arguments = inputs(2, 32, (4, 4), torch.float32, film)
    arguments = {name: value.bfloat16() if film else value for name, value in arguments.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert group_norm_silu(x, 8, **arguments).dtype == torch.float32
        assert group_norm_silu(x.bfloat16(), 8, **arguments).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["silu", None])
def test_input_is_left_alone(activation):
    x, arguments = inputs(2, 32, (4, 4), film=True)
    before = x.clone()
    with torch.no_grad():
        group_norm_silu(x, 8, **arguments, activation=activation)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_sample_with_groups_of_one_element(dtype):
    # F.group_norm refuses this as if it were training a batch norm.
    torch.manual_seed(0)
    weight, bias = torch.randn(32), torch.randn(32)
    result = group_norm_silu(torch.randn(1, 32, 1, 1).to(dtype), 32, weight, bias)
    expected = torch.nn.functional.silu(bias).view(1, 32, 1, 1)
    # x − mean is 0 but for rounding, which is divided by sqrt(eps) = 0.003.
    assert error(result, expected) < 4 * torch.finfo(dtype).eps * (1 + bias.abs().max()) + 2e-4


def test_without_parameters():
    x = torch.randn(2, 8, 5)
    assert error(group_norm_silu(x, 2, None, None), equations(x, 2, None, None)) < 2e-6


def test_non_contiguous_input():
    x = torch.randn(2, 5, 7, 8).permute(0, 3, 2, 1)[:, :, ::2]
    weight, bias = torch.randn(8), torch.randn(8)
    assert error(group_norm_silu(x, 4, weight, bias), equations(x, 4, weight, bias)) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, "x is (3,) float32; expected floating-point (N, C, *spatial)"),
        ({"x": torch.zeros(2, 8, 3, dtype=torch.int64)}, "x is (2, 8, 3) int64"),
        ({"num_groups": 3}, "num_groups=3 does not divide the 8 channels"),
        ({"num_groups": 0}, "num_groups=0 does not divide"),
        ({"weight": None}, "both weight and bias"),
        ({"weight": torch.ones(7)}, "weight is (7,) float32; expected shape (8,)"),
        ({"bias": torch.ones(1)}, "bias is (1,) float32; expected shape (8,)"),
        ({"scale": torch.ones(2, 8)}, "both scale and shift"),
        (
            {"scale": torch.ones(2, 8), "shift": torch.ones(8)},
            "shift is (8,) float32; expected shape (2, 8)",
        ),
        ({"activation": "relu"}, "activation='relu'; expected 'silu' or None"),
    ],
)
def test_bad_arguments_get_one_line(change, message):
    arguments = {
        "x": torch.zeros(2, 8, 3),
        "num_groups": 2,
        "weight": torch.ones(8),
        "bias": torch.zeros(8),
    }
    with pytest.raises(InputError) as caught:
        group_norm_silu(**{**arguments, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)
