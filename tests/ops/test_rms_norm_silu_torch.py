"""rms_norm_silu inside PyTorch: operator, compilers, gradients, transforms, backends, errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fastdiff
from fastdiff.errors import InputError
from fastdiff.ops import backends, rms_norm_silu
from norm_cases import error
from rms_norm_cases import case, eager, equations

X = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), device="cpu")
WEIGHT = torch.linspace(0.5, 1.5, 8)
META = torch.device("meta")


def norm(x):
    return rms_norm_silu(x, WEIGHT)


# --- The operator, compilers ------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("film", [None, "rows", "chunks"])
def test_opcheck(film, channels_last):
    torch.manual_seed(0)
    x, weight, scale, shift = case(2, 8, (3, 4), film=film, channels_last=channels_last).values()
    arguments = (x, weight, scale, shift, 1e-12, True, "native")
    results = torch.library.opcheck(torch.ops.fastdiff.rms_norm_silu.default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.sample(1)
@pytest.mark.seconds
@pytest.mark.parametrize("film", [None, "chunks"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(film, dynamic):
    torch.compiler.reset()
    torch.manual_seed(0)
    compiled = torch.compile(rms_norm_silu, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (5, 7) if dynamic else (5,):
        for channels_last in (False, True):
            tensors = case(2, 8, (size, 4), film=film, channels_last=channels_last)
            assert torch.equal(compiled(**tensors), rms_norm_silu(**tensors))
        with fastdiff.backend("reference"):
            expected = gradients(rms_norm_silu, tensors)
        for name, found in gradients(compiled, tensors).items():
            torch.testing.assert_close(found, expected[name])


def test_exported():
    class Model(torch.nn.Module):
        def forward(self, x):
            return norm(x)

    exported = torch.export.export(Model(), (X,))
    assert "fastdiff.rms_norm_silu" in exported.graph_module.code
    assert torch.equal(exported.module()(X), norm(X))


def test_fake_and_meta_tensors_have_the_shapes_and_strides():
    with FakeTensorMode():
        x = torch.empty(2, 8, 4, 6).to(memory_format=torch.channels_last).bfloat16()
        result = rms_norm_silu(x, torch.empty(1, 8, 1, 1))
    assert result.shape == x.shape and result.stride() == x.stride()
    assert result.dtype == torch.bfloat16
    result = rms_norm_silu(torch.empty(2, 8, 5, device="meta"), torch.empty(8, device="meta"))
    assert result.shape == (2, 8, 5) and result.device.type == "meta"


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("film", [None, "rows"])
def test_autocast_keeps_the_dtype_of_x(film, backend):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = case(2, 32, (4, 4), dtype=dtype, film=film)
        with fastdiff.backend(backend):
            plain = rms_norm_silu(**tensors)
            with torch.autocast("cpu", torch.bfloat16):
                result = rms_norm_silu(**tensors)
        assert result.dtype == dtype and torch.equal(result, plain)


def test_inference_mode_and_the_profiler():
    expected = norm(X)
    with torch.inference_mode():
        assert torch.equal(norm(X), expected)
    with torch.profiler.profile() as profile:
        assert torch.equal(norm(X), expected)
    assert "fastdiff::rms_norm_silu" in {event.key for event in profile.key_averages()}


# --- Gradients --------------------------------------------------------------------------------


def gradients(function, tensors, **options):
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items() if v is not None}
    result = function(**{**tensors, **leaves}, **options)
    upstream = torch.linspace(-1, 1, result.numel()).view(result.shape).to(result.dtype)
    return dict(
        zip(leaves, torch.autograd.grad(result, list(leaves.values()), upstream), strict=True)
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("film", [None, "rows", "chunks"])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients(dtype, activation, film, channels_last):
    torch.manual_seed(0)
    for spatial in [(), (7,), (6, 5), (2, 3, 4)]:
        tensors = case(3, 20, spatial, dtype=dtype, film=film, channels_last=channels_last)
        found = gradients(rms_norm_silu, tensors, activation=activation)
        own = gradients(eager, tensors, activation=activation)
        doubled = {k: None if v is None else v.double() for k, v in tensors.items()}
        truth = gradients(equations, doubled, activation=activation)
        for name, gradient in found.items():
            assert gradient.dtype == tensors[name].dtype and gradient.shape == tensors[name].shape
            allowed = 2 * error(own[name], truth[name])
            allowed += 2 * torch.finfo(dtype).eps * truth[name].abs().max().item()
            assert error(gradient, truth[name]) <= allowed, (name, spatial)


def test_gradcheck_also_twice():
    torch.manual_seed(0)
    tensors = case(2, 5, (2, 2), dtype=torch.float64, film="rows")
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def call(x, weight, scale, shift):
        return rms_norm_silu(x, weight, scale=scale, shift=shift)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_a_zero_vector_has_a_finite_gradient():
    x = torch.randn(1, 8, 4)
    x[..., 2] = 0
    (found,) = torch.autograd.grad(norm(x.requires_grad_()).sum(), x)
    assert found.isfinite().all()


# --- torch.func, forward mode -----------------------------------------------------------------


def test_transforms():
    one_by_one = torch.stack([norm(x[None])[0] for x in X])
    torch.testing.assert_close(torch.vmap(lambda x: norm(x[None])[0])(X), one_by_one)
    leaf = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(norm(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: norm(x).sum())(X), expected)
    tangent = torch.sin(torch.arange(80.0)).view(2, 8, 5)
    _, derivative = torch.func.jvp(norm, (X,), (tangent,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(norm(forward_ad.make_dual(X, tangent)))
    torch.testing.assert_close(dual.tangent, derivative)
    step = 1e-3
    difference = (norm(X + step * tangent) - norm(X - step * tangent)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=1e-2, atol=1e-3)
    with fastdiff.backend("native"), pytest.raises(InputError, match="only 'reference' serves"):
        torch.func.grad(lambda x: norm(x).sum())(X)


# --- Backends ---------------------------------------------------------------------------------


def test_named_backends_agree():
    with fastdiff.backend("reference"):
        reference = norm(X)
    with fastdiff.backend("native"):
        assert torch.allclose(norm(X), reference, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "x", "problem"),
    [
        ("triton", X, "it runs on CUDA devices, not on cpu"),
        ("native", X.double(), "its kernels take float32, bfloat16 and float16, not float64"),
        ("native", X.to("meta"), "it runs on the CPU, not on meta"),
        (
            "native",
            X.clone().requires_grad_(),
            "only 'reference' has gradients and a tensor",
        ),
    ],
)
def test_a_named_backend_that_cannot_serve(monkeypatch, name, x, problem):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if name == "triton" and not backends.HAS_TRITON:
        problem = "the package triton is not installed"
    with fastdiff.backend(name):
        for call in (rms_norm_silu, lambda *a: fastdiff.explain("rms_norm_silu", *a)):
            with pytest.raises(InputError) as caught:
                call(x, WEIGHT.to(x.device))
            text = str(caught.value)
            assert problem in text and repr(name) in text and "\n" not in text


def test_explain(capsys):
    assert fastdiff.explain("rms_norm_silu", X, WEIGHT).backend == "native"
    assert "rms_norm_silu: native (the C++ kernel serves" in capsys.readouterr().out
    choice = fastdiff.explain(rms_norm_silu, X.double(), WEIGHT)
    assert choice.backend == "reference" and "not float64" in choice.reason
    wanting = X.clone().requires_grad_()
    choice = fastdiff.explain(rms_norm_silu, wanting, WEIGHT)
    assert choice.backend == "reference" and "a tensor requires one" in choice.reason
    with torch.no_grad():
        assert fastdiff.explain(rms_norm_silu, wanting, WEIGHT).backend == "native"
    with fastdiff.backend("native"):
        assert "named by" in str(fastdiff.explain(rms_norm_silu, X, WEIGHT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(3)},
            "x is (3,) float32 on cpu; expected floating-point (N, C",
        ),
        (
            {"x": torch.zeros(2, 8, 3).long()},
            "x is (2, 8, 3) int64 on cpu; expected",
        ),
        ({"x": [[1.0, 2.0]]}, "x is a list; expected floating-point (N, C, *spatial)"),
        ({"weight": 1.0}, "weight is a float; expected 8 elements"),
        ({"weight": None}, "weight is a NoneType; expected 8 elements"),
        (
            {"weight": torch.ones(7)},
            "weight is (7,) float32 on cpu; expected 8 elements, one",
        ),
        (
            {"weight": torch.ones(8).int()},
            "weight is (8,) int32 on cpu; expected floating-point",
        ),
        (
            {"weight": torch.ones(8, device=META)},
            "weight is (8,) float32 on meta; expected",
        ),
        ({"scale": torch.ones(2, 8)}, "give both scale and shift, or neither"),
        ({"shift": torch.ones(2, 8)}, "give both scale and shift, or neither"),
        (
            {"scale": torch.ones(2, 8), "shift": torch.ones(8)},
            "shift is (8,) float32 on cpu; expected floating-point (2, 8) or (2, 8, 1, 1)",
        ),
        (
            {"scale": torch.ones(1, 8), "shift": torch.ones(2, 8)},
            "scale is (1, 8) float32 on cpu; expected floating-point (2, 8) or (2, 8, 1, 1)",
        ),
        (
            {"scale": torch.ones(2, 8, 1), "shift": torch.ones(2, 8)},
            "scale is (2, 8, 1) float32 on cpu; expected floating-point (2, 8) or (2, 8, 1, 1)",
        ),
        (
            {"scale": torch.ones(2, 8), "shift": torch.ones(2, 8, device=META)},
            "shift is (2, 8) float32 on meta; expected floating-point (2, 8) or (2, 8, 1, 1)",
        ),
        ({"activation": "relu"}, "activation='relu'; expected 'silu' or None"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_arguments_get_one_line(change, message, backend):
    arguments = dict(x=torch.zeros(2, 8, 3, 3), weight=torch.ones(8))
    with fastdiff.backend(backend), pytest.raises(InputError) as caught:
        rms_norm_silu(**{**arguments, **change})
    text = str(caught.value)
    assert text.startswith("rms_norm_silu: ") and message in text and "\n" not in text
