"""q_sample: noise images to their timesteps, x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · noise."""

from typing import Any

import torch
from torch import Tensor

from fastdiff import rng
from fastdiff._checks import check_float, check_like, check_timesteps
from fastdiff.backends import Choice
from fastdiff.errors import InputError
from fastdiff.reference.q_sample import q_sample as reference_q_sample


def q_sample(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | None = None,
    first_sample: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draw x_t from q(x_t | x_0) (Ho et al. 2020 eq. 4). Returns (x_t, noise), both like x_start.

    ``x_start`` is (N, ...) of any floating dtype, ``t`` (N,) integer, the two tables (K,). The
    arithmetic is float32 (float64 for float64 input) whatever the storage dtype; the noise returned
    is, to the bit, what x_t holds. The noise is ``noise`` when given; drawn from the counter-based
    generator with ``seed``, where sample i of the batch takes the stream of sample
    ``first_sample + i``; or drawn by ``torch.randn`` in
    logical order, so that channels_last changes no number.

    Raises InputError for both noise and seed, a shape, dtype or device that does not fit, and, on
    the CPU, a t out of range. On other devices such a t gives NaN: reading it would stall them.
    """
    check_float(x_start, "x_start")
    tables = (sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod)
    t = check_timesteps(t, x_start, _table_length(*tables, x_start), "x_start")
    if noise is not None and seed is not None:
        raise InputError("q_sample takes noise or seed, not both")
    if noise is not None:
        check_like(noise, "noise", x_start, "x_start")
    elif seed is not None:
        # Drawn in x_start's own dtype and layout, so that the noise returned is what x_t holds.
        noise = rng.normal(
            tuple(x_start.shape),
            seed=seed,
            step=rng.training_step(0),
            first_sample=first_sample,
            out=torch.empty_like(x_start),
        )
    else:
        noise = rng.draw_like(x_start)
    return reference_q_sample(x_start, t, *tables, noise), noise


def _table_length(first: Tensor, second: Tensor, x_start: Tensor) -> int:
    check_float(first, "sqrt_alphas_cumprod")
    check_like(second, "sqrt_one_minus_alphas_cumprod", first, "sqrt_alphas_cumprod")
    if first.dim() != 1 or len(first) == 0:
        raise InputError(
            f"the coefficient tables must have shape (K,) with K >= 1, got {tuple(first.shape)}"
        )
    if first.device != x_start.device:
        raise InputError(
            f"the coefficient tables are on {first.device} but x_start is on {x_start.device}"
        )
    return len(first)


def choose(x_start: Tensor, *_: Any, **__: Any) -> Choice:
    """What the plan picks for this call (``fastdiff.explain``)."""
    return Choice("q_sample", "reference", "the kernels are yet to come")
