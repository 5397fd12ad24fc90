"""Attention on the qkv projection against a loop over heads in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import InputError
from fastdiff.ops.attention import attention


def head_by_head(qkv, num_heads, order):
    """The published row order, one head at a time, in float64."""
    n, width, tokens = qkv.shape
    d = width // (3 * num_heads)
    rows = qkv.double()
    heads = []
    for head in range(num_heads):
        if order == "heads_first":  # [h0q, h0k, h0v, h1q, ...]
            q, k, v = (rows[:, (3 * head + i) * d : (3 * head + i + 1) * d] for i in range(3))
        else:  # [Q | K | V]
            q, k, v = (rows[:, (i * num_heads + head) * d :][:, :d] for i in range(3))
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(d), dim=2)  # (N, T, T)
        heads.append((weights @ v.transpose(1, 2)).transpose(1, 2))  # (N, D, T)
    return torch.cat(heads, dim=1)


def projection(n, width, tokens, dtype=torch.float32, token_major=False):
    if token_major:
        return torch.randn(n, tokens, width).to(dtype).transpose(1, 2)
    return torch.randn(n, width, tokens).to(dtype)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 3),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 3, 8, 17, 32]),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    order=st.sampled_from(["heads_first", "qkv_first"]),
    token_major=st.booleans(),
)
def test_every_order_layout_and_size(n, heads, head_dim, tokens, dtype, order, token_major):
    torch.manual_seed(0)
    qkv = projection(n, 3 * heads * head_dim, tokens, dtype, token_major)
    result = attention(qkv, heads, order=order)
    truth = head_by_head(qkv, heads, order)
    assert result.shape == (n, heads * head_dim, tokens) and result.dtype == dtype
    assert result.transpose(1, 2).is_contiguous()
    bound = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (result - truth).abs().max() < bound


@pytest.mark.parametrize("head_dim", [256, 512])
def test_wide_heads(head_dim):
    torch.manual_seed(0)
    qkv = projection(1, 3 * head_dim, 20)
    assert (attention(qkv, 1) - head_by_head(qkv, 1, "heads_first")).abs().max() < 1e-5


def test_orders_differ():
    """They agree on shapes, so a mixed-up order must at least give other numbers here."""
    torch.manual_seed(0)
    qkv = projection(1, 24, 5)
    assert not torch.allclose(
        attention(qkv, 2, order="heads_first"), attention(qkv, 2, order="qkv_first")
    )
    assert torch.equal(attention(qkv, 1, order="heads_first"), attention(qkv, 1, order="qkv_first"))


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["heads_first", "qkv_first"])
def test_gradient(order, dtype, token_major):
    torch.manual_seed(0)
    qkv = projection(2, 3 * 4 * 8, 12, dtype, token_major).requires_grad_()
    upstream = torch.randn(2, 32, 12).to(dtype)
    (gradient,) = torch.autograd.grad(attention(qkv, 4, order=order), qkv, upstream)
    exact = qkv.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(head_by_head(exact, 4, order), exact, upstream.double())
    bound = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps * true.abs().max()
    assert (gradient - true).abs().max() < bound


def test_large_logits_do_not_overflow():
    qkv = torch.zeros(1, 3, 2)
    qkv[:, :2] = 1e4  # q·k = 1e8
    qkv[0, 2] = torch.tensor([1.0, 3.0])
    assert torch.equal(attention(qkv, 1), torch.full((1, 1, 2), 2.0))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_autocast_keeps_the_dtype(requires_grad):
    qkv = projection(1, 24, 5).requires_grad_(requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(qkv, 2).dtype == torch.float32
        assert attention(qkv.bfloat16(), 2).dtype == torch.bfloat16


def test_empty_batch():
    assert attention(torch.zeros(0, 24, 5), 2).shape == (0, 8, 5)


@pytest.mark.parametrize(
    ("qkv", "heads", "order", "message"),
    [
        (torch.zeros(24, 5), 2, "heads_first", "qkv is (24, 5) float32"),
        (torch.zeros(1, 24, 5, dtype=torch.int64), 2, "heads_first", "int64; expected a floating"),
        (torch.zeros(1, 24, 5), 5, "heads_first", "24 rows, which is not 3 × num_heads=5"),
        (torch.zeros(1, 24, 5), 0, "heads_first", "num_heads=0"),
        (torch.zeros(1, 24, 5), 2, "legacy", "order='legacy'; expected 'heads_first' or"),
    ],
)
def test_bad_arguments_get_one_line(qkv, heads, order, message):
    with pytest.raises(InputError) as caught:
        attention(qkv, heads, order=order)
    assert message in str(caught.value) and "\n" not in str(caught.value)
