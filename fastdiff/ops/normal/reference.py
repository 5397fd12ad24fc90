"""Philox4x32-10 and Box–Muller in plain PyTorch, by the equations of op.py."""

import math

import torch
from torch import Tensor


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 of ``counter``, int64 (…, 4) holding 32-bit words, under two 32-bit key words.

    Returns int64 (…, 4) of 32-bit words. Salmon et al. 2011, section 3.3.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        # int64 wraps at 2^64, which keeps all 64 bits of the product; >> drags the sign, so mask.
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        high0, low0 = (product0 >> 32) & mask, product0 & mask
        high1, low1 = (product1 >> 32) & mask, product1 & mask
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), dim=-1)


def reference_sample(
    elements: int,
    *,
    seed: int,
    step: int,
    sample: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One sample's ``elements`` values, flat."""
    quads = torch.arange(-(-elements // 4), device=device)
    counter = torch.stack(
        (
            quads,
            torch.full_like(quads, step),
            torch.full_like(quads, sample & 0xFFFFFFFF),
            torch.full_like(quads, sample >> 32),
        ),
        dim=-1,
    )
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    u = words.to(torch.float64 if dtype == torch.float64 else torch.float32) * 2.0**-32 + 2.0**-33
    u = u.to(torch.float64).view(-1, 2)
    radius, angle = (-2.0 * u[:, 0].log()).sqrt(), 2.0 * math.pi * u[:, 1]
    z = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten()[:elements]
    # Through float32, so that bfloat16 and float16 are rounded from where the kernels round them.
    return z if dtype == torch.float64 else z.to(torch.float32).to(dtype)
