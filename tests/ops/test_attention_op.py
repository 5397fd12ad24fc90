"""attention as an operation of PyTorch: autograd, torch.library, compile, transforms, errors."""

import importlib

import pytest
import torch

import fastdiff
from attention_tools import error, gradient, head_by_head, projection
from fastdiff.errors import InputError
from fastdiff.ops.attention.op import attention, choose
from fastdiff.ops.attention.reference import attention as reference

HEADS = 2


def qkv_of(dtype=torch.float32, layout="token_major"):
    return projection(2, 48, 30, dtype, layout)


@pytest.fixture(params=["native", None])
def backend(request, monkeypatch):
    """Native, or what the plan takes on this CPU, or ("baseline") on one without AVX2."""
    if request.param == "baseline":
        module = importlib.import_module("fastdiff.ops.attention.op")
        monkeypatch.setattr(module, "cpu", lambda: ("baseline", False, False))
    with fastdiff.backend(None if request.param == "baseline" else request.param):
        yield request.param


on_any_cpu = pytest.mark.parametrize("backend", ["native", None, "baseline"], indirect=True)


# --- torch.library ----------------------------------------------------------------------------


@pytest.mark.seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
def test_opcheck(dtype, layout):
    qkv = qkv_of(dtype, layout)
    torch.library.opcheck(
        torch.ops.fastdiff.attention, (qkv, HEADS, "heads_first", "native", False, False)
    )
    arguments = (HEADS, "heads_first", "native", True, False)
    leaf = qkv.clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.fastdiff.attention,
        (leaf, *arguments),
        # Its eager and compiled gradients are compared below: here half precision's own spread
        # between two roundings would fail.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    out, lse = torch.ops.fastdiff.attention(qkv, *arguments)
    torch.library.opcheck(
        torch.ops.fastdiff.attention_backward, (torch.ones_like(out), out, lse, qkv, *arguments)
    )


@pytest.mark.seconds
@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("dtype", "order", "dynamic"),
    [
        (torch.float32, "heads_first", True),
        (torch.float32, "qkv_first", False),
        (torch.bfloat16, "heads_first", False),
    ],
)
def test_compiled_is_eager(backend, dtype, order, dynamic):
    def function(x, heads, order):
        return attention(x, heads, order=order) * 2

    torch.compiler.reset()  # the cases share one function, and a function's recompilations are few
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for samples in (2, 3):
        qkv = projection(samples, 48, 30 + samples, dtype)
        with torch.no_grad():
            assert torch.equal(compiled(qkv, HEADS, order), function(qkv, HEADS, order))
        upstream = torch.ones(samples, 16, 30 + samples)
        found = gradient(compiled, qkv, HEADS, order, upstream)
        assert torch.equal(found, gradient(function, qkv, HEADS, order, upstream))


@pytest.mark.seconds
def test_inductor():
    def function(x, heads, order):
        return torch.tanh(attention(x + 1, heads, order=order))

    qkv, upstream = qkv_of(), torch.ones(2, 16, 30)
    compiled = torch.compile(function, fullgraph=True)
    found = gradient(compiled, qkv, HEADS, "heads_first", upstream)
    expected = gradient(function, qkv, HEADS, "heads_first", upstream)
    torch.testing.assert_close(found, expected)


# --- Autograd ---------------------------------------------------------------------------------


def test_without_a_gradient_nothing_is_kept(backend):
    leaf = qkv_of().requires_grad_()
    with torch.no_grad():
        assert not attention(leaf, HEADS).requires_grad
    with torch.inference_mode():
        assert attention(qkv_of(), HEADS).is_inference()
    assert not attention(qkv_of(), HEADS).requires_grad
    assert torch.equal(attention(leaf, HEADS), attention(leaf.detach(), HEADS))


@on_any_cpu
def test_a_changed_input_is_noticed(backend):
    x = qkv_of().requires_grad_() * 1
    out = attention(x, HEADS)
    x += 1
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        out.sum().backward()


def test_a_second_derivative_is_refused_by_name():
    leaf = qkv_of().requires_grad_()
    with fastdiff.backend("native"):
        out = attention(leaf, HEADS).square().sum()
    (first,) = torch.autograd.grad(out, leaf, create_graph=True)
    (expected,) = torch.autograd.grad(reference(leaf, HEADS).square().sum(), leaf)
    torch.testing.assert_close(first.detach(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="second derivative.*backend\\('reference'\\)"):
        first.sum().backward()
    with fastdiff.backend("native"), torch.profiler.profile():  # through the dispatcher
        out = attention(leaf, HEADS).square().sum()
        (first,) = torch.autograd.grad(out, leaf, create_graph=True)
        with pytest.raises(InputError, match="second derivative"):
            first.sum().backward()
    with fastdiff.backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda x: attention(x, 1), projection(1, 6, 3).double().requires_grad_()
        )


def test_whoever_listens_sees_the_operators():
    """And gets the numbers of a direct launch, as a batch of upstream gradients does."""
    leaf, upstream = qkv_of().requires_grad_(), torch.randn(3, 2, 16, 30)

    def results(gradient, **options):
        with fastdiff.backend("native"):
            out = attention(leaf, HEADS)
            inferred = attention(leaf.detach(), HEADS)
            return out, inferred, *torch.autograd.grad(out, leaf, gradient, **options)

    expected = results(upstream[0])
    with torch.profiler.profile() as profile:
        found = results(upstream[0])
    assert all(map(torch.equal, found, expected))
    names = {event.key for event in profile.key_averages()}
    assert {"fastdiff::attention", "fastdiff::attention_backward"} <= names
    batch = results(upstream, is_grads_batched=True)[2]
    assert torch.equal(batch[0], expected[2])


def test_functional_transforms_pass_through_the_reference():
    qkv, tangent = qkv_of(), projection(2, 48, 30, seed=1)

    def loss(x):
        return attention(x, HEADS).square().sum()

    leaf = qkv.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(qkv), expected, rtol=1e-4, atol=1e-5)
    _, derivative = torch.func.jvp(loss, (qkv,), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum(), rtol=1e-4, atol=1e-4)
    each = torch.func.vmap(lambda x: attention(x, HEADS))(qkv[None])
    torch.testing.assert_close(each[0], attention(qkv, HEADS))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(qkv, tangent)
        out = torch.autograd.forward_ad.unpack_dual(attention(dual, HEADS))
        assert out.tangent is not None
    with fastdiff.backend("native"), pytest.raises(InputError, match="'native'.*torch.func"):
        torch.func.grad(loss)(qkv)


@on_any_cpu
@pytest.mark.parametrize("requires_grad", [False, True])
def test_autocast_keeps_the_dtype(backend, requires_grad):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        qkv = qkv_of(dtype).requires_grad_(requires_grad)
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(qkv, HEADS)
            assert out.dtype == dtype
        # PyTorch's own attention, the plan's choice on old CPUs, computes in autocast's dtype.
        kernel = choose(qkv, HEADS).backend == "native"
        bound = 1e-5 if kernel and dtype == torch.float32 else 2e-2
        assert error(out, head_by_head(qkv, HEADS, "heads_first")) < bound
        if requires_grad:
            out.sum().backward()
            assert qkv.grad.dtype == dtype


def test_the_reference_computes_in_float32_under_autocast():
    qkv = qkv_of()
    with torch.autocast("cpu", torch.bfloat16):
        out = reference(qkv, HEADS)
    assert error(out, head_by_head(qkv, HEADS, "heads_first")) < 1e-6


@pytest.mark.parametrize("shape", [(0, 48, 5), (2, 48, 0)])
def test_empty(backend, shape):
    for dtype in (torch.float32, torch.bfloat16):
        leaf = torch.zeros(shape, dtype=dtype, requires_grad=True)
        out = attention(leaf, HEADS)
        assert out.shape == (shape[0], 16, shape[2])
        out.sum().backward()
        assert leaf.grad.shape == shape


# --- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [attention, choose])
@pytest.mark.parametrize(
    ("qkv", "heads", "order", "message"),
    [
        (None, 2, "heads_first", "qkv is a NoneType; expected a floating-point (N, 3C, T)"),
        (
            torch.zeros(24, 5),
            2,
            "heads_first",
            "qkv is (24, 5) float32 on cpu; expected a floating-point (N, 3C, T)",
        ),
        (
            torch.zeros(1, 24, 5, dtype=torch.int64),
            2,
            "heads_first",
            "int64 on cpu; expected a floating",
        ),
        (torch.zeros(1, 24, 5), 5, "heads_first", "24 rows, which is not 3 × num_heads=5"),
        (torch.zeros(1, 0, 5), 5, "heads_first", "0 rows, which is not 3 × num_heads=5"),
        (torch.zeros(1, 24, 5), 0, "heads_first", "num_heads=0; expected a positive integer"),
        (torch.zeros(1, 24, 5), 2.0, "heads_first", "num_heads=2.0; expected a positive integer"),
        (torch.zeros(1, 24, 5), 2, "legacy", "order='legacy'; expected 'heads_first' or"),
    ],
)
def test_bad_arguments_get_one_line(function, qkv, heads, order, message):
    with pytest.raises(InputError) as caught:
        function(qkv, heads, order=order)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [attention, choose])
@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("native", torch.float64, "not float64"),
        ("triton", torch.float32, "'triton' was named, but it runs on CUDA devices, not on cpu"),
    ],
)
def test_a_named_backend_that_cannot_serve_raises(function, name, dtype, message):
    with fastdiff.backend(name), pytest.raises(InputError, match=message):
        function(torch.zeros(1, 24, 5, dtype=dtype), 2)
