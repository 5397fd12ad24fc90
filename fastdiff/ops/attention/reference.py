"""Attention over the qkv projection of the published U-Nets, in plain PyTorch: the reference, and
two that are faster where no kernel is."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.arithmetic import arithmetic


def attention(qkv: Tensor, num_heads: int, *, order: str = "heads_first") -> Tensor:
    """softmax(q·kᵀ / sqrt(head_dim))·v per head; see ``fastdiff.ops.attention``.

    Computed in float32, or in float64 for float64. Source: Vaswani et al. 2017, equation 1.
    """
    with torch.autocast(qkv.device.type, enabled=False):
        wide = qkv.to(arithmetic(qkv.dtype))
        q, k, v = split_heads(wide, num_heads, order)  # (N, H, T, D) each
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, dim=3)  # (N, H, T, T)
        return join_heads(weights @ v).to(qkv.dtype)


def sdpa(qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """PyTorch's own fused attention; under autocast in autocast's dtype."""
    q, k, v = split_heads(qkv, num_heads, order)
    return join_heads(F.scaled_dot_product_attention(q, k, v)).to(qkv.dtype)


def matmuls(qkv: Tensor, num_heads: int, order: str) -> Tensor:
    """Two matrix products and a softmax in qkv's own dtype: PyTorch's fused CPU backward is slow
    in half precision."""
    q, k, v = split_heads(qkv, num_heads, order)
    weights = torch.softmax((q * q.shape[3] ** -0.5) @ k.transpose(2, 3), dim=3)
    return join_heads(weights @ v).to(qkv.dtype)


def split_heads(qkv: Tensor, num_heads: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a projection (N, 3C, T), as views (N, H, T, D)."""
    n, width, tokens = qkv.shape
    head_dim = width // (3 * num_heads)
    if order == "heads_first":  # rows [h0q, h0k, h0v, h1q, ...]
        q, k, v = qkv.view(n, num_heads, 3, head_dim, tokens).transpose(3, 4).unbind(2)
    else:  # rows [Q | K | V]
        q, k, v = qkv.view(n, 3, num_heads, head_dim, tokens).transpose(3, 4).unbind(1)
    return q, k, v


def join_heads(heads: Tensor) -> Tensor:
    """(N, H, T, D) -> (N, C, T), token-major: the transpose (N, T, C) is contiguous."""
    return heads.transpose(1, 2).flatten(2).contiguous().transpose(1, 2)
