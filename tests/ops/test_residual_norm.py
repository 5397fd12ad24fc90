"""residual_norm on any backend: its two results, their layouts, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

import fastdiff
from fastdiff.ops import residual_norm


def equations(x, groups, weight, bias, residual=None, add=None, second=None, silu=True):
    total = x.double()
    for value in (residual, None if add is None else add[:, None, None]):
        total = total if value is None else total + value.double()
    both = total if second is None else torch.cat([total, second.double()], dim=1)
    y = F.group_norm(both, groups, weight.double(), bias.double())
    return total, F.silu(y) if silu else y


def case(dtype=torch.float32, layout=torch.contiguous_format, second=6):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 2, 12, 5, 7).to(dtype).unbind()
    both = 12 + second
    given = {"residual": residual, "add": torch.randn(12)}
    given |= {"second": torch.randn(2, second, 5, 7).to(dtype)} if second else {}
    images = {
        k: v.contiguous(memory_format=layout) if v.dim() == 4 else v for k, v in given.items()
    }
    return (x.contiguous(memory_format=layout), 3, *torch.randn(2, both)), images


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("second", [0, 6])
def test_values_and_layouts(dtype, layout, second):
    operands, given = case(dtype, layout, second)
    total, y = residual_norm(*operands, **given)
    exact_total, exact = equations(*operands, **given)
    ulp = torch.finfo(dtype).eps
    assert (total - exact_total).abs().max() <= ulp * exact_total.abs().max()
    assert (y - exact).abs().max() < 1e-10 + (16 if ulp < 1e-6 else 4) * ulp
    for result in (total, y):
        assert result.dtype == dtype and result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("names", [(), ("add",), ("residual",), ("second",), ("add", "second")])
@pytest.mark.parametrize("activation", ["silu", None])
def test_what_is_not_given_counts_as_nothing(names, activation):
    operands, given = case(second=6 if "second" in names else 0)
    given = {name: given[name] for name in names}
    total, y = residual_norm(*operands, activation=activation, **given)
    expected = equations(*operands, **given, silu=activation is not None)
    for found, exact in zip((total, y), expected, strict=True):
        assert (found - exact).abs().max() < 1e-5
    assert (total is operands[0]) == (not set(names) & {"add", "residual"})


def test_in_place_the_sum_stands_where_x_did():
    operands, given = case()
    expected = residual_norm(*operands, **given)
    x = operands[0].clone()
    total, y = residual_norm(x, *operands[1:], **given, inplace=True)
    assert total is x and torch.equal(x, expected[0]) and torch.equal(y, expected[1])


def test_a_mean_far_above_the_standard_deviation():
    (x, *rows), given = case(second=0)
    total, y = residual_norm(x + 1e4, *rows, **given)
    assert (y - equations(total, *rows)[1]).abs().max() < 1e-2  # of numbers with a step of 1e-3


def test_gradients_are_pytorchs():
    operands, given = case(torch.float64)
    leaves = [v.double().requires_grad_() for v in (operands[0], *operands[2:], *given.values())]

    def call(x, weight, bias, residual, add, second):
        return residual_norm(x, 3, weight, bias, residual=residual, add=add, second=second)

    assert torch.autograd.gradcheck(call, leaves)


def test_an_empty_batch():
    x, second = torch.empty(0, 4, 3, 3), torch.empty(0, 2, 3, 3)
    total, y = residual_norm(x, 3, None, None, residual=x, second=second)
    assert total.shape == (0, 4, 3, 3) and y.shape == (0, 6, 3, 3)


def test_the_plan_serves_cpus_by_the_reference():
    operands, given = case()
    choice = fastdiff.explain("residual_norm", *operands, **given)
    assert choice.backend == "reference" and "no C++ kernel of residual_norm" in choice.reason


X = torch.zeros(2, 6, 4, 4)


@pytest.mark.parametrize(
    "named, said",
    [
        (
            {"residual": X[:1]},
            r"residual is \(1, 6, 4, 4\) .*expected floating-point \(2, 6, 4, 4\)",
        ),
        ({"residual": X.double()}, "residual is .*float64.*expected torch.float32, the dtype of x"),
        ({"add": torch.zeros(5)}, r"add is \(5,\) .*expected floating-point \(6,\)"),
        ({"second": X[..., :3]}, r"second is .*expected floating-point \(2, 6, 4, 4\)"),
        ({"second": X.half()}, "second is .*float16.*the dtype of x"),
        ({"second": X[:, :1]}, "num_groups=3; expected an int that divides 7 channels"),
        ({"second": 1}, "second is a int"),
        ({"activation": "relu"}, "expected 'silu' or None"),
    ],
)
def test_what_is_refused(named, said):
    with pytest.raises(fastdiff.InputError, match=said):
        residual_norm(X, 3, None, None, **named)


def test_no_channels_before_those_of_second():
    with pytest.raises(fastdiff.InputError, match="expected at least one channel before"):
        residual_norm(X[:, :0], 3, None, None, second=X)


def test_a_compiler_and_a_mode_see_the_call():
    pytest.importorskip("triton")
    from harness.fake_gpu import fake_gpu

    operands, given = case()
    with fake_gpu() as gpu, fastdiff.backend("triton"), torch.no_grad():
        residual_norm(*operands, **given)
        assert len(gpu.launches) == 1
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            total, y = residual_norm(*operands, **given, inplace=True)
        assert total is operands[0] and y.shape == (2, 18, 5, 7)
        assert len(gpu.launches) == 1
