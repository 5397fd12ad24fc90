"""Attention on the qkv projection of the published U-Nets in one call."""

from torch import Tensor

from fastdiff.backends import Choice
from fastdiff.errors import InputError
from fastdiff.reference import attention as reference

ORDERS = ("heads_first", "qkv_first")


def attention(qkv: Tensor, num_heads: int, *, order: str = "heads_first") -> Tensor:
    """``softmax(q·kᵀ / sqrt(head_dim))·v`` for every head, read from the projection's own layout.

    Args:
        qkv: (N, 3C, T). Any layout is read as it stands: channel-major, the output of a 1×1
            convolution, or token-major, a transposed (N, T, 3C), which is faster and what a
            channels_last image gives without a copy.
        num_heads: divides C; head_dim is C / num_heads.
        order: how the 3C rows are arranged: ``"heads_first"`` is [h0q, h0k, h0v, h1q, …]
            (improved-diffusion, and guided-diffusion by default), ``"qkv_first"`` is [Q | K | V]
            (guided-diffusion with ``use_new_attention_order``). The shapes are the same, so a
            wrong choice gives wrong numbers and no error.

    Returns:
        (N, C, T) in the dtype of ``qkv``, token-major: its transpose (N, T, C) is contiguous.

    Raises:
        InputError: a shape, dtype or name that does not fit.

    Source: Vaswani et al. 2017, equation 1.
    """
    _check(qkv, num_heads, order)
    return reference.attention(qkv, num_heads, order=order)


def _check(qkv: Tensor, num_heads: int, order: str) -> None:
    if qkv.dim() != 3 or not qkv.is_floating_point():
        raise InputError(
            f"attention: qkv is {tuple(qkv.shape)} {str(qkv.dtype).removeprefix('torch.')}; "
            "expected a floating-point (N, 3C, T) tensor"
        )
    if num_heads < 1 or qkv.shape[1] % (3 * num_heads):
        raise InputError(
            f"attention: qkv has {qkv.shape[1]} rows, which is not 3 × num_heads={num_heads} "
            "× a whole head_dim"
        )
    if order not in ORDERS:
        raise InputError(f"attention: order={order!r}; expected 'heads_first' or 'qkv_first'")


def choose(qkv: Tensor, num_heads: int, *, order: str = "heads_first") -> Choice:
    """What the plan picks for this call (``fastdiff.explain``)."""
    return Choice("attention", "reference", "the kernels are yet to come")
