"""What attention's tests share: a loop over heads in float64, inputs in odd layouts, errors."""

import math

import torch

from fastdiff.ops.attention.reference import join_heads, split_heads

ORDERS = ("heads_first", "qkv_first")
LAYOUTS = ("token_major", "channel_major", "misaligned", "sliced", "neither")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def sdpa(qkv, num_heads, order):
    """PyTorch's own, the measure of what error is due."""
    attend = torch.nn.functional.scaled_dot_product_attention
    return join_heads(attend(*split_heads(qkv, num_heads, order)))


def projection(n, width, tokens, dtype=torch.float32, layout="token_major", seed=0):
    """Normal (N, 3C, T) in one of LAYOUTS."""
    torch.manual_seed(seed)
    qkv = torch.randn(n, tokens, width).to(dtype).transpose(1, 2)
    if layout == "channel_major":
        return qkv.contiguous()
    if layout == "misaligned":  # by one element
        return (
            torch.cat([qkv.new_zeros(1), qkv.transpose(1, 2).flatten()])[1:]
            .view(n, tokens, width)
            .transpose(1, 2)
        )
    if layout == "sliced":
        wide = torch.full((n, width + 5, tokens + 3), float("nan"), dtype=dtype)
        wide[:, 2 : width + 2, 1 : tokens + 1] = qkv
        return wide[:, 2 : width + 2, 1 : tokens + 1]
    if layout == "neither":  # no stride is 1
        wide = torch.full((n, tokens, width, 2), float("nan"), dtype=dtype)
        wide[..., 0] = qkv.transpose(1, 2)
        return wide[..., 0].transpose(1, 2)
    return qkv


def error(result, truth):
    return (result.double() - truth).abs().max().item()


def allowed(own, truth, dtype, factor):
    """``factor`` × PyTorch's own error, and two ulps of the largest value."""
    largest = truth.abs().max().item()
    return factor * error(own, truth) + 2 * torch.finfo(dtype).eps * largest


def gradient(function, qkv, num_heads, order, upstream):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, num_heads, order)
    return torch.autograd.grad(out, qkv, upstream.to(out.dtype))[0]
