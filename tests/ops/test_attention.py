"""attention's numbers: every implementation on the CPU against a loop over heads in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from attention_tools import (
    DTYPES,
    LAYOUTS,
    ORDERS,
    allowed,
    error,
    gradient,
    head_by_head,
    projection,
    sdpa,
)
from fastdiff.ops import native
from fastdiff.ops.attention.op import Arguments, attention, bound, run
from fastdiff.ops.attention.reference import attention as reference
from fastdiff.ops.attention.reference import split_heads
from fastdiff.ops.convolution.fastest import Products

PUBLISHED = [  # heads, tokens, head_dim of the published U-Nets
    *[(1, 256, 256), (1, 16, 256), (1, 256, 512), (1, 64, 512), (4, 256, 64), (4, 64, 64)],
    *[(4, 16, 64), (4, 256, 96), (4, 64, 128), (4, 256, 144), (4, 64, 192), (6, 1024, 64)],
    *[(9, 256, 64), (12, 64, 64)],
]
EDGES = [  # of panels, blocks of rows and blocks of keys
    *[(1, 1, 1), (1, 1, 512), (2, 2, 3), (3, 15, 16), (1, 17, 31), (2, 33, 48), (1, 47, 65)],
    *[(1, 63, 8), (1, 64, 100), (1, 65, 17), (1, 255, 5), (1, 257, 9), (2, 300, 40), (1, 513, 33)],
    *[(1, 70, 260)],
]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """torch.empty and its kin hold NaN: whatever is read before it is written shows."""
    monkeypatch.setattr(native, "_IDLE", [])
    monkeypatch.setattr(native, "_KEPT_FLOATS", 0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.empty(3).new_empty(2).isnan().all()
    assert torch.empty_like(torch.zeros(2, 3).t()).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def natively(qkv, num_heads, order):
    return run("native", qkv, num_heads, order)


def check_values(function, qkv, heads, order):
    dtype = qkv.dtype
    truth = head_by_head(qkv, heads, order)
    result = function(qkv, heads, order)
    assert result.shape == truth.shape and result.dtype == dtype
    assert result.transpose(1, 2).is_contiguous()
    assert error(result, truth) <= allowed(sdpa(qkv, heads, order), truth, dtype, 2)


def check_gradient(function, qkv, heads, order, upstream):
    truth = gradient(head_by_head, qkv.double(), heads, order, upstream.double())
    result = gradient(function, qkv, heads, order, upstream)
    own = gradient(sdpa, qkv, heads, order, upstream)
    assert result.shape == qkv.shape and result.dtype == qkv.dtype
    assert error(result, truth) <= allowed(own, truth, qkv.dtype, 3)


# --- Values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_the_reference_is_the_equation(order):
    qkv = projection(2, 3 * 4 * 8, 12).double()
    assert error(reference(qkv, 4, order=order), head_by_head(qkv, 4, order)) < 1e-14
    for dtype in DTYPES:
        check_values(lambda x, h, o: reference(x, h, order=o), qkv.to(dtype), 4, order)
    assert torch.autograd.gradcheck(
        lambda x: reference(x, 2, order=order), projection(1, 12, 4).double().requires_grad_()
    )


@pytest.mark.seconds
@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 3),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 70),
    tokens=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from(ORDERS),
    layout=st.sampled_from(LAYOUTS),
)
def test_every_order_layout_and_size(n, heads, head_dim, tokens, dtype, order, layout):
    qkv = projection(n, 3 * heads * head_dim, tokens, dtype, layout)
    check_values(natively, qkv, heads, order)
    upstream = torch.randn(n, tokens, heads * head_dim).to(dtype).transpose(1, 2)
    if tokens > 1:  # of one token's q and k it is zero, and all rounding: the next test
        check_gradient(natively, qkv, heads, order, upstream)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_registers_in_every_layout(dtype, layout):
    check_values(natively, projection(2, 3 * 2 * 40, 37, dtype, layout), 2, "qkv_first")


@pytest.mark.sample(6)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "tokens", "head_dim"), PUBLISHED + EDGES)
def test_products_of_split_values(heads, tokens, head_dim, dtype, layout):
    """Two bfloat16 hold a float32 to 2⁻¹⁷, and the product of the smaller ones is left out: a score
    is off by 2⁻¹⁶ of its terms, and what P·v adds up likewise."""
    if not native.library().convolution_serves(int(Products.SPLIT)):
        pytest.skip("needs a CPU with AMX")
    qkv = projection(2, 3 * heads * head_dim, tokens, dtype, layout)
    q, k, v = split_heads(qkv.double(), heads, "qkv_first")
    terms = (q.abs() @ k.abs().transpose(2, 3)).max() / head_dim**0.5
    truth = head_by_head(qkv, heads, "qkv_first")
    out = qkv.new_empty(2, tokens, heads * head_dim).transpose(1, 2)
    call = Arguments(qkv, heads, "qkv_first", "native", False, True)
    bound(call, (out, None))()
    rounding = torch.finfo(dtype).eps / 2
    limit = v.abs().max() * (2**-16 * (2 * terms + 2) + rounding)
    assert (out.double() - truth).abs().max() <= limit


@pytest.mark.parametrize("head_dim", [1, 13, 40, 256])
def test_the_gradient_through_one_token(head_dim):
    """Its softmax is one: v gets the upstream gradient, q and k a rounding of Σ dO·v − Σ dO·out."""
    qkv, upstream = projection(2, 3 * head_dim, 1), torch.randn(2, head_dim, 1)
    grad_q, grad_k, grad_v = gradient(natively, qkv, 1, "qkv_first", upstream).chunk(3, dim=1)
    q, k, v = qkv.chunk(3, dim=1)
    assert torch.equal(grad_v, upstream)
    terms = (upstream * v).abs().sum(1).max() * head_dim**-0.5
    for grad, other in ((grad_q, k), (grad_k, q)):
        assert grad.abs().max() <= 4 * torch.finfo(torch.float32).eps * terms * other.abs().max()


@pytest.mark.sample(90)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
@pytest.mark.parametrize(("heads", "tokens", "head_dim"), EDGES)
def test_every_instruction_set_at_the_edges(isa, heads, tokens, head_dim, layout, dtype):
    qkv = projection(2, 3 * heads * head_dim, tokens, dtype, layout)
    check_values(natively, qkv, heads, "heads_first")
    upstream = torch.randn(2, tokens, heads * head_dim).to(dtype).transpose(1, 2)
    check_gradient(natively, qkv, heads, "qkv_first", upstream)


@pytest.mark.sample(12)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "tokens", "head_dim"), PUBLISHED)
def test_the_published_shapes(heads, tokens, head_dim, dtype):
    qkv = projection(1, 3 * heads * head_dim, tokens, dtype)
    upstream = torch.randn(1, tokens, heads * head_dim).to(dtype).transpose(1, 2)
    for implementation in ("native", "sdpa", "matmuls"):

        def function(x, h, o, name=implementation):
            return run(name, x, h, o)

        check_gradient(function, qkv, heads, "heads_first", upstream)
        if implementation != "matmuls":  # its softmax is in half precision
            check_values(function, qkv, heads, "heads_first")


def test_orders_differ():
    """They agree on shapes, so a mixed-up order must at least give other numbers here."""
    qkv = projection(1, 24, 5)
    assert not torch.allclose(
        attention(qkv, 2, order="heads_first"), attention(qkv, 2, order="qkv_first")
    )
    assert torch.equal(attention(qkv, 1, order="heads_first"), attention(qkv, 1, order="qkv_first"))


def test_large_logits_do_not_overflow(isa):
    qkv = torch.zeros(1, 3, 2)
    qkv[:, :2] = 1e4  # q·k = 1e8
    qkv[0, 2] = torch.tensor([1.0, 3.0])
    assert torch.equal(natively(qkv, 1, "heads_first"), torch.full((1, 1, 2), 2.0))


def test_the_maximum_may_come_late(isa):
    """Later blocks of keys raise a row's maximum by far: what was summed before shrinks away."""
    qkv = projection(1, 3 * 16, 600)
    qkv[:, 16:32] *= torch.linspace(0.1, 60, 600)
    check_values(natively, qkv, 1, "heads_first")


def with_scores(query, key, keys, tokens, dtype):
    """Channel 0 of q is ``query``, of the first ``keys`` keys ``key`` and of the others 0."""
    qkv = projection(2, 3 * 2 * 12, tokens, dtype)
    packed = qkv.view(2, 2, 3, 12, tokens)
    packed[:, :, 0, 0] = query
    packed[:, :, 1, 0] = 0
    packed[:, :, 1, 0, :keys] = key
    return qkv


@pytest.mark.parametrize("keys", [255, 256, 257, 290])  # a block has 256
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_may_be_minus_infinity(isa, keys, dtype):
    narrow = dtype == torch.float16  # its products do not overflow
    query, key = (1.0, -math.inf) if narrow else (1e20, -1e20)
    qkv = with_scores(query, key, keys, 300, dtype)
    truth = head_by_head(qkv, 2, "heads_first")
    plain = reference(qkv, 2)
    assert error(natively(qkv, 2, "heads_first"), truth) <= allowed(plain, truth, dtype, 2)
    if not narrow:  # 0·inf
        upstream = projection(2, 24, 300, dtype, seed=1)
        truth = gradient(head_by_head, qkv.double(), 2, "heads_first", upstream.double())
        found = gradient(natively, qkv, 2, "heads_first", upstream)
        plain = gradient(lambda x, h, o: reference(x, h, order=o), qkv, 2, "heads_first", upstream)
        assert error(found, truth) <= allowed(plain, truth, dtype, 3)


@pytest.mark.parametrize(("query", "key"), [(1e20, -1e20), (1e20, 1e20)])
@pytest.mark.parametrize("tokens", [5, 300])
def test_a_softmax_that_is_not_there_is_nan(isa, tokens, query, key):
    """Of nothing but -inf, or of an inf, as the reference has it."""
    qkv = with_scores(query, key, tokens, tokens, torch.float32)
    assert reference(qkv, 2).isnan().all()
    assert natively(qkv, 2, "heads_first").isnan().all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1])
def test_a_nan_stays_in_its_sample(isa, bits):
    qkv = projection(3, 24, 20)
    clean = natively(qkv, 2, "heads_first")
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    qkv[1, 0, 3] = nan  # of one query of the first head
    result = natively(qkv, 2, "heads_first")
    assert result[1, :4, 3].isnan().all()
    assert result.isnan().sum() == 4
    keep = ~result.isnan()
    assert torch.equal(result[keep], clean[keep])
    qkv[1, 4, 3] = nan  # of a key: every query of that head
    assert natively(qkv, 2, "heads_first")[1, :4].isnan().all()


def test_the_logsumexp_that_backward_reads(isa):
    qkv = projection(2, 3 * 2 * 20, 300)
    _, lse = torch.ops.fastdiff.attention(qkv, 2, "heads_first", "native", True, False)
    q, k, _ = qkv.double().view(2, 2, 3, 20, 300).unbind(2)
    truth = torch.logsumexp(q.transpose(2, 3) @ k / 20**0.5, dim=3)
    assert lse.dtype == torch.float32 and error(lse, truth) < 2e-6


# --- Gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_upstream_gradient(isa, layout, dtype):
    qkv = projection(2, 3 * 2 * 24, 70, dtype)
    upstream = projection(2, 48, 70, dtype, layout, seed=1)
    check_gradient(natively, qkv, 2, "heads_first", upstream)


def test_an_expanded_upstream_gradient(isa):
    qkv = projection(2, 48, 30)
    one = torch.ones(()).expand(2, 16, 30)
    check_gradient(natively, qkv, 2, "heads_first", one)
    leaf = qkv.clone().requires_grad_()
    natively(leaf, 2, "heads_first").sum().backward()
    assert torch.equal(leaf.grad, gradient(natively, qkv, 2, "heads_first", one))


@pytest.mark.parametrize("layout", ["token_major", "channel_major"])
def test_the_gradient_has_the_projections_layout(layout):
    qkv = projection(2, 48, 30, layout=layout)
    found = gradient(natively, qkv, 2, "heads_first", torch.ones(2, 16, 30))
    assert found.stride() == qkv.stride()


# --- Determinism ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 200, 64), (3, 2, 40, 17), (1, 1, 600, 40), (5, 1, 300, 8)]
)
def test_bits_do_not_depend_on_runs_or_threads(isa, shape, dtype):
    n, heads, tokens, head_dim = shape
    qkv = projection(n, 3 * heads * head_dim, tokens, dtype)
    upstream = projection(n, heads * head_dim, tokens, dtype, seed=1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3, 7):
            torch.set_num_threads(threads)
            found = gradient(natively, qkv, heads, "heads_first", upstream)
            results.append((natively(qkv, heads, "heads_first"), found))
    finally:
        torch.set_num_threads(before)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(grad, results[0][1])


def test_a_sample_does_not_depend_on_its_batch():
    qkv = projection(5, 3 * 2 * 24, 70)
    whole = natively(qkv, 2, "heads_first")
    assert torch.equal(natively(qkv[2:3], 2, "heads_first"), whole[2:3])


def test_the_public_function_runs_every_backend():
    qkv = projection(2, 48, 30)
    truth = head_by_head(qkv, 2, "heads_first")
    for name in ("reference", "native", None):
        with fastdiff.backend(name):
            assert error(attention(qkv, 2), truth) < 1e-6
