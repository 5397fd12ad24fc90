"""Attention over the qkv projection of the published U-Nets, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(qkv: Tensor, num_heads: int, *, order: str = "heads_first") -> Tensor:
    """softmax(q·kᵀ / sqrt(head_dim))·v per head; see ``fastdiff.ops.attention``.

    Source: Vaswani et al. 2017, equation 1.
    """
    n, width, tokens = qkv.shape
    head_dim = width // (3 * num_heads)
    if order == "heads_first":
        # rows [h0q, h0k, h0v, h1q, ...]: (N, H, 3, D, T) -> 3 × (N, H, T, D)
        q, k, v = qkv.view(n, num_heads, 3, head_dim, tokens).transpose(3, 4).unbind(2)
    else:
        # rows [Q | K | V]: (N, 3, H, D, T) -> 3 × (N, H, T, D)
        q, k, v = qkv.view(n, 3, num_heads, head_dim, tokens).transpose(3, 4).unbind(1)
    if qkv.device.type == "cpu" and qkv.dtype != torch.float32 and qkv.requires_grad:
        # Written out: PyTorch's fused CPU backward is 1.3 to 4 times slower in half precision.
        h = torch.softmax((q * head_dim**-0.5) @ k.transpose(2, 3), dim=-1) @ v
    else:
        h = F.scaled_dot_product_attention(q, k, v)
    # (N, H, T, D) -> (N, T, C) -> (N, C, T); autocast may have chosen another dtype
    h = h.transpose(1, 2).reshape(n, tokens, num_heads * head_dim).contiguous()
    return h.transpose(1, 2).to(qkv.dtype)
