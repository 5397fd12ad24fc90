"""group_norm_silu, backward: every gradient against the equations' in float64."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_group_norm_silu import strange

import fastdiff
from fastdiff.ops import group_norm_silu, native
from kernel_tools import EMULATED, ISAS, examples, forced_isa
from norm_cases import (
    case,
    doubled,
    eager,
    equations,
    error,
    gradients,
    kernels_at_any_size,  # noqa: F401
    native_shape,
    poison,
    threads,
    ulps,
)  # fmt: skip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(tensors, num_groups, rounds=4.0, upstream=None, **options):
    """At most three times PyTorch's error, and ``rounds`` roundings of the largest number."""
    x = tensors["x"]
    if upstream is None:
        upstream = torch.empty_like(x).copy_(torch.randn(x.shape))
    found = gradients(group_norm_silu, tensors, num_groups, upstream, **options)
    truth = gradients(equations, doubled(tensors), num_groups, upstream.double(), **options)
    own = gradients(eager, tensors, num_groups, upstream, **options)
    for name, gradient in found.items():
        assert gradient.dtype == tensors[name].dtype and gradient.shape == tensors[name].shape
        # A small gradient is stored in its own dtype, but made of numbers in that of x.
        wider = max((tensors[name].dtype, x.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        terms = truth["x"] if name == "add" else truth[name]  # whose sum over a group is zero
        bound = 3 * error(own[name], truth[name]) + ulps(rounds, wider, terms)
        measured = error(gradient, truth[name])
        assert measured <= bound, (name, measured, error(own[name], truth[name]))
    return found


@pytest.mark.seconds
@pytest.mark.any_backend
@settings(deadline=None, max_examples=examples(120))
@given(
    n=st.integers(1, 3),
    groups=st.integers(1, 5),
    width=st.integers(1, 37),
    spatial=st.lists(st.integers(1, 9), max_size=3),
    dtype=st.sampled_from(DTYPES),
    parameters=st.sampled_from([None, "own", torch.float32]),
    film=st.sampled_from([None, "plain", "chunks"]),
    add=st.sampled_from([None, "embedding", "strided", "residual"]),
    channels_last=st.booleans(),
    activation=st.sampled_from(["silu", None]),
    isa=st.sampled_from(ISAS),
)
def test_any_shape(
    n, groups, width, spatial, dtype, parameters, film, add, channels_last, activation, isa
):
    torch.manual_seed(0)
    if width * torch.Size(spatial).numel() < 4:
        width = 4  # the gradient through two elements is all cancellation
    tensors = case(
        n, groups * width, spatial, dtype=dtype, channels_last=channels_last, film=film, add=add,
        parameters=dtype if parameters == "own" else parameters,
    )  # fmt: skip
    with forced_isa(isa):
        check(tensors, groups, rounds=32, activation=activation)


@pytest.mark.any_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("film", [None, "chunks"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2 if EMULATED else 4, 128, 16, 16), 32), ((1, 192, 17, 13), 32), ((2, 36, 4, 6, 5), 3)],
)
def test_the_shapes_of_models(shape, groups, dtype, film, channels_last):
    torch.manual_seed(0)
    n, c, *spatial = shape
    tensors = case(n, c, spatial, dtype=dtype, channels_last=channels_last, film=film)
    check(tensors, groups)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 1000, 1000), (1, 24, 257, 255)])
def test_a_large_group(shape, channels_last):
    torch.manual_seed(0)
    n, c, *spatial = shape
    check(case(n, c, spatial, channels_last=channels_last, mean=3.0), 1)


@pytest.mark.any_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("add", [None, "embedding", "residual"])
@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_mean_far_above_the_deviation(isa, ratio, add, channels_last):
    torch.manual_seed(0)
    check(case(2, 32, (33, 31), channels_last=channels_last, add=add, mean=ratio), 4)


@pytest.mark.any_backend
@pytest.mark.parametrize("small", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(dtype, small):
    torch.manual_seed(0)
    tensors = case(2, 20, (7, 3), dtype=dtype, film="plain", add="embedding")
    for name in ("weight", "shift", "add"):  # bias and scale keep theirs
        tensors[name] = tensors[name].to(small)
    check(tensors, 5, rounds=16)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "c", "spatial"),
    [(1, 32, (64, 64)), (3, 6, (150, 151)), (1, 2, (300, 301)), (5, 96, (9, 7))],
)
def test_any_number_of_threads_gives_the_same_bits(n, c, spatial, dtype, channels_last):
    torch.manual_seed(0)
    options = dict(dtype=dtype, channels_last=channels_last, film="chunks", add="embedding")
    tensors = case(n, c, spatial, **options)
    upstream = torch.randn_like(tensors["x"])
    with threads(1):
        expected = gradients(group_norm_silu, tensors, 2, upstream)
    for count in (1, 2, 3, 5):
        with threads(count):
            found = gradients(group_norm_silu, tensors, 2, upstream)
        assert all(torch.equal(found[name], expected[name]) for name in expected), count


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("add", [None, "embedding", "residual"])
def test_every_element_is_written(isa, monkeypatch, add, channels_last, dtype):
    torch.manual_seed(0)
    poison(monkeypatch)
    for c, spatial in [(10, (3, 3)), (35, (5, 7)), (32, (1, 1)), (6, (31,))]:
        options = dict(dtype=dtype, channels_last=channels_last, film="plain", add=add)
        check(case(2, c, spatial, **options), 2 if c % 2 == 0 else 1, rounds=32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("c", "positions"), [(5, 7), (16, 16), (33, 1), (24, 100)])
def test_neighbours_of_the_gradients_are_left_alone(isa, c, positions, channels_last, dtype):
    torch.manual_seed(0)
    n, guard = 2, 64
    x, dy = torch.randn(2, n * c * positions).to(dtype)
    small = torch.randn(n, c).to(dtype)
    sizes = dict(dx=x.numel(), dweight=c, dbias=c, dscale=n * c, dshift=n * c, dadd=n * c)
    buffers = {k: torch.full((v + 2 * guard + 1,), 7.0, dtype=dtype) for k, v in sizes.items()}
    shape = native_shape(n, c, positions, dtype=dtype, channels_last=channels_last, add=1)
    rows = [small[0].data_ptr(), small[1].data_ptr(), *[small.data_ptr()] * 3]
    statistics, y = torch.empty(2 * n), torch.empty_like(x)
    native.library().group_norm_silu_cpu(
        shape, x.data_ptr(), *rows, y.data_ptr(), statistics.data_ptr(), 1
    )
    native.library().group_norm_silu_backward_cpu(
        shape, dy.data_ptr(), x.data_ptr(), *rows, statistics.data_ptr(),
        *(buffer[guard + 1 :].data_ptr() for buffer in buffers.values()), 1,
    )  # fmt: skip
    for name, buffer in buffers.items():
        end = guard + 1 + sizes[name]
        assert (buffer[: guard + 1] == 7).all() and (buffer[end:] == 7).all(), name
        assert (buffer[guard + 1 : end] != 7).all(), name


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_strides_of_the_upstream_gradient(channels_last, dtype):
    torch.manual_seed(0)
    tensors = case(2, 12, (5, 4), dtype=dtype, channels_last=channels_last, add="residual")
    upstream = torch.randn(2, 12, 5, 4).to(dtype)
    for name, dy in strange(upstream):
        found = gradients(group_norm_silu, tensors, 3, dy)
        expected = gradients(group_norm_silu, tensors, 3, dy.contiguous())
        assert all(torch.equal(found[key], expected[key]) for key in found), name
    one = torch.ones((), dtype=dtype).expand(2, 12, 5, 4)  # what .sum() sends back
    found = gradients(group_norm_silu, tensors, 3, one)
    expected = gradients(group_norm_silu, tensors, 3, one.contiguous())
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_of_x(dtype):
    torch.manual_seed(0)
    tensors = case(2, 12, (5, 4), dtype=dtype, film="chunks", add="residual")
    for _, x in strange(tensors["x"]):
        check({**tensors, "x": x}, 3, rounds=8)


@pytest.mark.any_backend
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_storage(isa, dtype, offset):
    torch.manual_seed(0)
    tensors = case(2, 24, (5, 7), dtype=dtype, parameters=dtype, film="plain", add="residual")

    def moved(tensor):
        buffer = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype)
        return buffer[offset:].view(tensor.shape).copy_(tensor)

    upstream = torch.randn_like(tensors["x"])
    expected = gradients(group_norm_silu, tensors, 3, upstream)
    away = {name: moved(tensor) for name, tensor in tensors.items()}
    found = gradients(group_norm_silu, away, 3, moved(upstream))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.any_backend
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0), (0, 8)])
def test_empty(shape):
    tensors = case(*shape[:2], shape[2:], film="plain")
    found = gradients(group_norm_silu, tensors, 2, torch.empty(shape))
    for name, gradient in found.items():
        assert gradient.shape == tensors[name].shape and (gradient == 0).all()


@pytest.mark.any_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("into", ["x", "upstream"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_group(isa, dtype, into, channels_last):
    torch.manual_seed(0)
    tensors = case(2, 12, (5, 3), dtype=dtype, channels_last=channels_last, film="plain")
    upstream = torch.empty_like(tensors["x"]).copy_(torch.randn(2, 12, 5, 3))
    clean = gradients(group_norm_silu, tensors, 4, upstream)
    spoiled = (tensors["x"] if into == "x" else upstream).clone()
    spoiled[1, 7, 4, 2] = float("nan")
    if into == "x":
        found = gradients(group_norm_silu, {**tensors, "x": spoiled}, 4, upstream)
    else:
        found = gradients(group_norm_silu, tensors, 4, spoiled)
    channels = slice(6, 9) if into == "x" else slice(7, 8)
    assert found["x"][1, 6:9].isnan().all()
    for name, where in {
        "x": (1, slice(6, 9)), "scale": (1, channels), "shift": (1, channels),
        "weight": (channels,), "bias": (channels,),
    }.items():  # fmt: skip
        assert found[name][where].isnan().all(), name
        rest = found[name].clone()
        rest[where] = clean[name][where]
        assert torch.equal(rest, clean[name]), name


@pytest.mark.any_backend
def test_only_what_is_asked_for():
    """Each tensor alone, and gradients that accumulate in memory of their own."""
    torch.manual_seed(0)
    tensors = case(2, 12, (5, 4), film="chunks", add="residual")
    upstream = torch.randn(2, 12, 5, 4)
    every = gradients(group_norm_silu, tensors, 3, upstream)
    for name in tensors:
        leaf = tensors[name].detach().requires_grad_()
        named = {k: v for k, v in {**tensors, name: leaf}.items() if k != "x"}
        x = leaf if name == "x" else tensors["x"]
        group_norm_silu(x, 3, **named).backward(upstream)
        assert torch.equal(leaf.grad, every[name]), name
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    for _ in range(2):
        named = {k: v for k, v in leaves.items() if k != "x"}
        group_norm_silu(leaves["x"], 3, **named).backward(upstream)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, 2 * every[name]), name
    leaves["x"].grad.zero_()
    assert torch.equal(leaves["add"].grad, 2 * every["add"])


@pytest.mark.any_backend
def test_one_tensor_in_two_places():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, 5), torch.randn(8), torch.randn(8)
    leaf = x.clone().requires_grad_()
    group_norm_silu(leaf, 2, weight, bias, add=leaf).sum().backward()
    exact = x.double().requires_grad_()
    equations(exact, 2, weight, bias, add=exact).sum().backward()
    assert error(leaf.grad, exact.grad) < 1e-5


@pytest.mark.seconds
def test_the_reference_passes_gradcheck():
    torch.manual_seed(0)
    for add in ("embedding", "residual"):
        tensors = case(2, 4, (3, 2), dtype=torch.float64, parameters=torch.float64, film="plain",
                       add=add)  # fmt: skip
        leaves = [tensor.requires_grad_() for tensor in tensors.values()]

        def call(x, weight, bias, scale, shift, add):
            return group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift, add=add)

        with fastdiff.backend("reference"):
            assert torch.autograd.gradcheck(call, leaves)
            assert torch.autograd.gradgradcheck(call, leaves)


def test_small_contiguous_tensors_train_on_pytorch(monkeypatch):
    """The plan's exception, and its limits: what is slower, and what PyTorch gets wrong."""
    module = sys.modules["fastdiff.ops.group_norm_silu.op"]
    monkeypatch.setattr(module, "SMALL", 64 * 16)
    weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64)

    def backend(x):
        return module.choose(x, 32, weight, bias).backend

    small = torch.randn(1, 64, 4, 4)
    assert backend(small) == "reference"
    assert backend(small.contiguous(memory_format=torch.channels_last)) == "native"
    assert backend(torch.randn(1, 64, 4, 5)) == "native"
    assert backend(small.bfloat16()) == "native"  # the reference would copy it to float32
    assert backend(small[:0]) == "native"  # where PyTorch's gradients of weight and bias are NaN
    with torch.no_grad():
        assert backend(small) == "native"
    with fastdiff.backend("native"):
        assert backend(small) == "native"
