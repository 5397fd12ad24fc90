"""convolution's own gradients: against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp

import fastdiff
from fastdiff.ops import convolution, native
from fastdiff.ops.convolution import fastest, training
from fastdiff.ops.convolution.fastest import Products
from fastdiff.ops.convolution.op import FUSED_GRADIENTS, MOST_TAPS
from kernel_tools import ISAS, examples, forced_isa, scratch_of_nan  # noqa: F401
from norm_cases import threads

# Of the largest gradient, which may be what large terms leave: what the products round, or the
# gradient of x to its dtype.
BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def case(n, c, size, k, kernel, dtype=torch.float32, layout=torch.channels_last):
    x = torch.randn(n, c, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(k, c, *kernel).contiguous(memory_format=layout)
    return [v.requires_grad_() for v in (x, weight, torch.randn(k))]


def padded(x, weight, bias, stride, padding):
    return F.conv2d(F.pad(x, padding * 2), weight, bias, stride)


def check(leaves, stride=1, padding=(1, 1)):
    """The result and all three gradients."""
    x, weight, bias = leaves
    y, _ = convolution(x, weight, bias, stride=stride, padding=padding)
    in_bfloat16 = training.products_of(x.dtype) in (Products.BFLOAT16, Products.PAIRS)
    rounded = weight.bfloat16() if in_bfloat16 else weight
    wide = [v.detach().double().requires_grad_() for v in (x, rounded, bias)]
    truth = padded(*wide, stride, padding)
    bound = BOUNDS[x.dtype]
    taps = weight[0, 0].numel()
    terms = len(weight) * taps, y[:, 0].numel(), y[:, 0].numel()  # of about 1, in each gradient
    largest = truth.abs().max().clamp_min((x.shape[1] * taps) ** 0.5)
    assert y.dtype == x.dtype and (y - truth).abs().max() <= bound * largest
    dy = torch.randn(y.shape).to(y.dtype)
    found = torch.autograd.grad(y, leaves, dy)
    expected = torch.autograd.grad(truth, wide, dy.double())
    for leaf, ours, right, count in zip(leaves, found, expected, terms, strict=True):
        assert ours.dtype == leaf.dtype and ours.shape == leaf.shape
        assert (ours - right).abs().max() <= bound * right.abs().max().clamp_min(count**0.5)
    return y, *found


@pytest.mark.seconds
@settings(deadline=None, max_examples=examples(100))
@given(data=st.data())
def test_any_shape(data):
    torch.manual_seed(0)
    draw = data.draw
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (5, 5)]))
    padding = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    size = [draw(st.integers(max(1, k - sum(padding)), 40)) for k in kernel]
    leaves = case(
        draw(st.integers(1, 3)), draw(st.integers(1, 70)), size, draw(st.integers(1, 70)), kernel,
        draw(st.sampled_from(list(BOUNDS))),
        draw(st.sampled_from([torch.channels_last, torch.contiguous_format])),
    )  # fmt: skip
    with forced_isa(draw(st.sampled_from(ISAS))), threads(draw(st.integers(1, 3))):
        check(leaves, draw(st.integers(1, 3)), padding)


def pretend(monkeypatch, products):
    """That nothing multiplies faster here. For shapes whose launches nobody has made ready."""
    for module in (fastest, training):
        monkeypatch.setattr(module, "products_of", lambda dtype: products)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("products", [Products.FLOAT32, Products.PAIRS])
def test_bfloat16_as_without_tiles(monkeypatch, products, stride):
    if not native.library().convolution_serves(int(products)):
        pytest.skip(f"this CPU makes no products of the kind {products.name}")
    found = []
    pretend(monkeypatch, products)
    channels = 40 + 8 * int(products) + stride
    for count in (1, 3):
        torch.manual_seed(0)
        with threads(count):
            found.append(check(case(2, channels, (9, 14), 70, (3, 3), torch.bfloat16), stride))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_by_winograds_algorithm_as_without_tiles(monkeypatch, dtype):
    """The result and the gradient of x."""
    pretend(monkeypatch, Products.FLOAT32)
    weight = (70, 53, 3, 3)
    assert fastest.fastest_once(dtype, weight, 4 * 17 * 19, 1) == Products.WINOGRAD4
    for less in (((70, 53, 3, 3), 1023, 1), ((70, 40, 3, 3), 2000, 1), (weight, 2000, 2)):
        assert fastest.fastest_once(dtype, *less) == Products.FLOAT32
    assert fastest.fastest_once(dtype, (70, 53, 5, 5), 2000, 1) == Products.FLOAT32
    found = []
    for count in (1, 3):
        torch.manual_seed(0)
        with threads(count):
            found.append(check(case(4, 53, (17, 19), 70, (3, 3), dtype)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("n, c, side, k", [(2, 64, 70, 40), (5, 40, 4, 96), (40, 16, 32, 32)])
def test_threads_change_no_bit(n, c, side, k, dtype):
    """With bands of rows, with more than one group of them, and with fewer blocks than threads."""
    torch.manual_seed(0)
    leaves = case(n, c, (side, side), k, (3, 3), dtype)
    results = []
    for count in (1, 2, 5):
        torch.manual_seed(1)
        with threads(count):
            results.append(check(leaves))
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


def test_only_what_is_wanted():
    torch.manual_seed(0)
    leaves = case(2, 5, (6, 6), 4, (3, 3))
    _, *all_three = check(leaves)
    for wanted in range(3):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i == wanted)
        torch.manual_seed(1)
        y, _ = convolution(*leaves, padding=(1, 1))
        (found,) = torch.autograd.grad(y.sum(), leaves[wanted])
        for leaf in leaves:
            leaf.requires_grad_()
        y, _ = convolution(*leaves, padding=(1, 1))
        expected = torch.autograd.grad(y.sum(), leaves)[wanted]
        assert torch.allclose(found, expected, atol=1e-5) and found.shape == all_three[wanted].shape
    y, _ = convolution(leaves[0], leaves[1], padding=(1, 1))  # without a bias
    y.sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None


def test_other_layouts_of_what_comes_and_a_batch_of_none():
    torch.manual_seed(0)
    x, weight, bias = case(2, 6, (5, 7), 4, (3, 3), layout=torch.contiguous_format)
    strange = x.detach().contiguous().requires_grad_()
    turned = weight.detach().mT.contiguous().mT.requires_grad_()  # taps in no order
    y, _ = convolution(x, weight, bias, padding=(1, 1))
    z, _ = convolution(strange, turned, bias, padding=(1, 1))
    assert torch.equal(y, z)
    dy = torch.randn(4, 2, 5, 7).transpose(0, 1)
    of_y = torch.autograd.grad(y, (x, weight, bias), dy)
    of_z = torch.autograd.grad(z, (strange, turned, bias), dy)
    assert all(map(torch.equal, of_y, of_z))
    none, _ = convolution(torch.zeros(0, 6, 5, 7), weight, bias)
    for gradient in torch.autograd.grad(none.sum(), (weight, bias)):
        assert not gradient.any()


def test_a_result_may_be_written_to():
    leaves = case(1, 3, (5, 5), 4, (3, 3))
    y, _ = convolution(*leaves)
    y += 1.0
    y.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_what_is_fused_has_the_references_gradients():
    x, weight, _ = case(1, 3, (5, 5), 4, (3, 3))
    named = {"activation": "silu", "padding": (1, 1)}
    choice = fastdiff.explain("convolution", x, weight, **named)
    assert choice == ("convolution", "reference", FUSED_GRADIENTS)
    assert fastdiff.explain("convolution", x, weight).backend == "native"
    y, _ = convolution(x, weight, **named)
    expected = torch.autograd.grad(F.conv2d(F.silu(x), weight, padding=1).sum(), (x, weight))
    for found, wanted in zip(torch.autograd.grad(y.sum(), (x, weight)), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    with fastdiff.backend("native"), pytest.raises(fastdiff.InputError, match="what is fused with"):
        convolution(x, weight, **named)


def test_kernels_of_many_taps_are_the_references():
    x, weight = torch.randn(1, 2, 9, 9), torch.randn(3, 2, 8, 8)
    choice = fastdiff.explain("convolution", x, weight)
    assert choice.backend == "reference" and str(MOST_TAPS) in choice.reason
    assert torch.allclose(convolution(x, weight)[0], F.conv2d(x, weight), atol=1e-4)


@pytest.mark.seconds
def test_second_derivatives_are_refused_and_transforms_served():
    leaves = case(1, 3, (5, 5), 4, (3, 3))
    y, _ = convolution(*leaves)
    (first,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(fastdiff.InputError, match="differentiable once"):
        first.sum().backward()
    x, weight, bias = (leaf.detach() for leaf in leaves)
    found = grad(lambda w: convolution(x, w, bias)[0].square().sum())(weight)
    expected = grad(lambda w: F.conv2d(x, w, bias).square().sum())(weight)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
    _, moved = jvp(lambda v: convolution(v, weight)[0], (x,), (torch.ones_like(x),))
    assert torch.allclose(moved, F.conv2d(torch.ones_like(x), weight), atol=1e-5)


@pytest.mark.seconds
def test_an_operator_for_compilers():
    x, weight, bias = case(2, 3, (6, 6), 4, (3, 3))
    for bias_given, stride in ((bias, 1), (None, 2)):
        torch.library.opcheck(
            torch.ops.fastdiff.convolution_training.default, (x, weight, bias_given, stride, 1, 1)
        )
    x.requires_grad_(False)
    run = torch.compile(
        lambda *args: convolution(*args, padding=(1, 1))[0], backend="aot_eager", fullgraph=True
    )
    eager, _ = convolution(x, weight, bias, padding=(1, 1))
    compiled = run(x, weight, bias)
    assert torch.equal(compiled, eager)
    expected = torch.autograd.grad(eager.sum(), (weight, bias))
    assert all(map(torch.equal, torch.autograd.grad(compiled.sum(), (weight, bias)), expected))
