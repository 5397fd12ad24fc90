"""group_norm_silu inside PyTorch: operators, compilers, transforms, backends, errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastdiff
from fastdiff.errors import InputError
from fastdiff.ops import group_norm_silu
from norm_cases import (
    case,
    equations,
    error,
    gradients,
    kernels_at_any_size,  # noqa: F401
    run,
)

X = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), device="cpu")
WEIGHT = torch.linspace(0.5, 1.5, 8)
BIAS = torch.linspace(-1, 1, 8)
TANGENT = torch.sin(torch.arange(80.0)).view(2, 8, 5)


def norm(x):
    return group_norm_silu(x, 2, WEIGHT, BIAS)


def energy(x):
    return (norm(x) ** 2).sum()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


# --- Operators --------------------------------------------------------------------------------

CALLS = [
    dict(),
    dict(film="chunks"),
    dict(film="plain", add="strided", dtype=torch.bfloat16),
    dict(add="residual", channels_last=True),
    dict(parameters=None),
]


@pytest.mark.seconds
@pytest.mark.sample(5)
@pytest.mark.parametrize("options", CALLS)
@pytest.mark.parametrize(("keep", "gradient"), [(True, False), (True, True), (False, False)])
def test_opcheck(keep, options, gradient):
    torch.manual_seed(0)
    tensors = case(2, 8, (3, 4), **options)
    tensors = {k: None if v is None else v.detach() for k, v in tensors.items()}
    if gradient:
        for tensor in tensors.values():
            if tensor is not None:
                tensor.requires_grad_()
    x, weight, bias, scale, shift, add = map(
        tensors.get, ("x", "weight", "bias", "scale", "shift", "add")
    )
    arguments = (x, weight, bias, scale, shift, add, 2, 1e-5, True, "native", keep)
    results = torch.library.opcheck(torch.ops.fastdiff.group_norm_silu.default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.seconds
def test_the_backward_operator_passes_opcheck():
    torch.manual_seed(0)
    t = case(2, 8, (3, 4), film="chunks", add="embedding")
    tensors = map(t.get, ("x", "weight", "bias", "scale", "shift", "add"))
    arguments = (*tensors, 2, 1e-5, True, "native", True)
    y, statistics = torch.ops.fastdiff.group_norm_silu(*arguments)
    arguments = (y, statistics, *arguments)
    torch.library.opcheck(torch.ops.fastdiff.group_norm_silu_backward.default, arguments)


def test_fake_tensors_have_the_shapes_and_strides():
    with FakeTensorMode():
        x = torch.empty(2, 8, 4, 6).to(memory_format=torch.channels_last).bfloat16()
        result = group_norm_silu(x, 2, torch.empty(8), torch.empty(8))
    assert result.shape == x.shape and result.stride() == x.stride()
    assert result.dtype == torch.bfloat16


def test_the_meta_device():
    result = group_norm_silu(torch.empty(2, 8, 5, device="meta"), 2, None, None)
    assert result.shape == (2, 8, 5) and result.device.type == "meta"


# --- torch.compile ----------------------------------------------------------------------------


@pytest.mark.seconds
@pytest.mark.sample(4)
@pytest.mark.parametrize("film", [None, "chunks"])
@pytest.mark.parametrize("add", [None, "embedding", "residual"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(film, add, dynamic):
    torch.manual_seed(0)
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (5, 7) if dynamic else (5,):
        tensors = case(2, 8, (size, 4), film=film, add=add)
        assert torch.equal(run(compiled, tensors, 2), run(group_norm_silu, tensors, 2))
        upstream = torch.randn_like(tensors["x"])
        found = gradients(compiled, tensors, 2, upstream)
        expected = gradients(group_norm_silu, tensors, 2, upstream)
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def small_unet():
    torch.manual_seed(0)
    return fastdiff.UNet(
        image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1,
        attention_resolutions=(2,), channel_mult=(1, 2),
    )  # fmt: skip


def check_unet(backend):
    model = small_unet()
    for parameter in model.parameters():  # a published U-Net starts with zeros, which hide much
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        expected = model.eval()(x, t)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert torch.allclose(compiled(x, t), expected, rtol=1e-3, atol=1e-4)
    model.train()
    model(x, t).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend=backend)(x, t).square().mean().backward()
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        size = gradient.abs().max()
        assert (parameter.grad - gradient).abs().max() <= 1e-3 * size + 1e-5, name


@pytest.mark.seconds
def test_a_compiled_unet():
    check_unet("aot_eager")


@pytest.mark.long
def test_a_unet_through_inductor():
    check_unet("inductor")


@pytest.mark.seconds
def test_inductor():
    leaf = X.clone().requires_grad_()
    compiled = torch.compile(lambda x: torch.tanh(norm(x + 1)), fullgraph=True)
    found = compiled(leaf)
    expected = torch.tanh(norm(leaf + 1))
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    (of_compiled,) = torch.autograd.grad(found, leaf, upstream)
    torch.testing.assert_close(of_compiled, torch.autograd.grad(expected, leaf, upstream)[0])


def test_exported():
    class Model(torch.nn.Module):
        def forward(self, x):
            return norm(x)

    exported = torch.export.export(Model(), (X,))
    assert torch.equal(exported.module()(X), norm(X))


# --- Modes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("film", [None, "plain"])
def test_autocast_keeps_the_dtype_of_x(film):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = case(2, 32, (4, 4), dtype=dtype, film=film)
        plain = run(group_norm_silu, tensors, 8)
        with torch.autocast("cpu", torch.bfloat16):
            result = run(group_norm_silu, tensors, 8)
            leaf = tensors["x"].clone().requires_grad_()
            run(group_norm_silu, {**tensors, "x": leaf}, 8).sum().backward()
        assert result.dtype == dtype and torch.equal(result, plain)
        assert leaf.grad.dtype == dtype


def test_inference_mode_and_the_profiler():
    expected = norm(X)
    with torch.inference_mode():
        assert torch.equal(norm(X), expected)
    leaf = X.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(energy(leaf), leaf)
    with torch.profiler.profile() as profile:
        assert torch.equal(norm(X), expected)
        assert torch.equal(torch.autograd.grad(energy(leaf), leaf)[0], wanted)
    names = {event.key for event in profile.key_averages()}
    assert {"fastdiff::group_norm_silu", "fastdiff::group_norm_silu_backward"} <= names


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    leaf = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(energy(leaf), leaf)
    checkpoint(energy, leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, expected)


def test_an_input_changed_before_the_backward_is_noticed():
    leaf = (X * 1).requires_grad_()
    inner = leaf * 1
    loss = energy(inner)
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- Derivatives of derivatives, torch.func ---------------------------------------------------


def second_derivative(x):
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(energy(leaf), leaf, create_graph=True)
    return torch.autograd.grad(first.pow(2).sum(), leaf)[0]


def test_a_second_derivative_is_refused():
    with pytest.raises(InputError, match=r"differentiable once.*fastdiff.backend\('reference'\)"):
        second_derivative(X)
    with torch.profiler.profile(), pytest.raises(InputError, match="differentiable once"):
        second_derivative(X)


def test_the_reference_has_a_second_derivative():
    with fastdiff.backend("reference"):
        result = second_derivative(X)
    leaf = X.double().requires_grad_()
    loss = (equations(leaf, 2, WEIGHT, BIAS) ** 2).sum()
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (exact,) = torch.autograd.grad(first.pow(2).sum(), leaf)
    assert error(result, exact) < 1e-4 * exact.abs().max().item()


def dual(x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(norm(forward_ad.make_dual(x, TANGENT))).tangent


def batched_gradients(x):
    leaf = x.clone().requires_grad_()
    upstream = torch.stack([TANGENT, TANGENT.cos()])
    return torch.autograd.grad(norm(leaf), leaf, upstream, is_grads_batched=True)[0]


TRANSFORMS = {
    "grad": torch.func.grad(energy),
    "vmap": lambda x: torch.vmap(norm)(torch.stack([x, x.sin()])),
    "vmap of grad": lambda x: torch.vmap(torch.func.grad(energy))(torch.stack([x, x.sin()])),
    "grad of vmap": torch.func.grad(
        lambda x: torch.vmap(norm)(torch.stack([x, x * x])).pow(2).sum()
    ),
    "jvp": lambda x: torch.func.jvp(norm, (x,), (TANGENT,))[1],
    "jacrev": torch.func.jacrev(norm),
    "jacfwd": torch.func.jacfwd(norm),
    "hessian": torch.func.hessian(energy),
    "dual numbers": dual,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_get_the_reference(name):
    """Exactly what the reference gives; a named kernel is refused instead of losing a tangent."""
    result = TRANSFORMS[name](X)
    with fastdiff.backend("reference"):
        expected = TRANSFORMS[name](X)
    assert result.abs().max() > 0 and torch.equal(result, expected)
    with fastdiff.backend("native"), pytest.raises(InputError, match="only 'reference' serves"):
        TRANSFORMS[name](X)


def test_a_batch_of_upstream_gradients():
    with fastdiff.backend("reference"):
        expected = batched_gradients(X)
    assert torch.allclose(batched_gradients(X), expected, atol=1e-5)


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["grad", "vmap", "grad of vmap"])
def test_compiled_transforms(name):
    compiled = torch.compile(TRANSFORMS[name], fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(X), TRANSFORMS[name](X), atol=1e-5)
