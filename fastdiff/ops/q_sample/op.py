"""q_sample: noise images to their timesteps, x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · noise."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_float, check_like, check_timesteps
from fastdiff.errors import InputError
from fastdiff.ops import backends
from fastdiff.ops.backends import Choice
from fastdiff.ops.elementwise import described, split_counter, split_first_sample
from fastdiff.ops.normal import op as rng
from fastdiff.ops.q_sample.launch import (
    Counters,
    are_known_counters,
    know,
    known_plans,
    launch,
    new_x_t,
)
from fastdiff.ops.q_sample.reference import q_sample as reference_q_sample


def q_sample(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int | Tensor = 0,
    step: int | Tensor = 0,
    return_noise: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Draw x_t from q(x_t | x_0) (Ho et al. 2020 eq. 4). Returns (x_t, noise), both like x_start.

    Args:
        x_start: (N, ...) of any floating dtype. The arithmetic is float32 (float64 for float64
            input) whatever the storage dtype. Gradients reach it, and ``noise``.
        t: (N,) integer, the tables' row of each sample.
        sqrt_alphas_cumprod: (K,), √ᾱ_t, the scale of the signal.
        sqrt_one_minus_alphas_cumprod: (K,), √(1 − ᾱ_t), that of the noise.
        noise: N(0, I) like x_start; not with ``seed``.
        seed: the noise is drawn from the counter-based generator, in the pass that uses it, in
            x_start's dtype: to the bit what ``rng.normal`` draws. Sample i of the batch takes the
            stream of sample ``first_sample + i`` at training step ``step``. Each of the three may
            be an int64 tensor of one element on x_start's device, which is read where the noise
            is drawn. With neither noise nor seed, torch.randn draws in logical order, so that
            channels_last changes no number.
        first_sample: with ``seed``, the number of the batch's first sample.
        step: with ``seed``, the training step.
        return_noise: False: the second result is None, and with ``seed`` no noise is written.

    Raises InputError for both noise and seed, a shape, dtype or device that does not fit, and, on
    the CPU, a t out of range. On other devices such a t gives NaN: reading it would stall them.
    """
    signal, sigma = sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod
    key: tuple | None = None
    if (seed is None) != (noise is None) and backends.nobody_listens():
        # What was checked and planned once is neither checked nor planned again.
        tensors = (x_start, t, signal, sigma, noise)
        numbers = seed is None or type(seed) is type(step) is type(first_sample) is int
        kinds = None if numbers else tuple(map(described, (seed, step, first_sample)))
        key = (*map(described, tensors), kinds, return_noise, backends.named())
        known = known_plans.get(key)
        if known is not None and (seed is None or are_known_counters(seed, step, first_sample)):
            return new_x_t(known, *tensors, seed, step, first_sample, return_noise)
    check_float(x_start, "x_start")
    rows = _table_length(signal, sigma, x_start)
    backend, _ = _choose(x_start, signal, sigma)
    # The native kernel looks at t by itself, where it runs at all; the CUDA kernel answers NaN,
    # emulated or not.
    looks = x_start.numel() == 0 or backend not in ("native", "cuda")
    given_t = t  # which the key tells of, and a known call passes on as it is
    t = check_timesteps(t, x_start, rows, "x_start", look=looks)
    if noise is not None:
        if seed is not None:
            raise InputError("q_sample takes noise or seed, not both")
        check_like(noise, "noise", x_start, "x_start")
    elif seed is None:
        noise = rng.draw_like(x_start)

    if backend == "reference":
        if noise is None:
            noise = _drawn(x_start, seed, step, first_sample)
        x_t = reference_q_sample(x_start, t, signal, sigma, noise)
        return x_t, noise if return_noise else None
    counters = _counters(x_start, seed, step, first_sample)
    returns_drawn = noise is None and return_noise
    results = launch(x_start, t, signal, sigma, noise, *counters, returns_drawn, backend)
    if key is not None:
        written = results[1] if returns_drawn else noise
        know(key, x_start, given_t, signal, sigma, written, results[0], seed is not None, backend)
    if returns_drawn:
        return results[0], results[1]
    return results[0], noise if return_noise else None


def choose(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    **_: Any,
) -> Choice:
    """What the plan picks for this call (``fastdiff.explain``)."""
    backend, reason = _choose(x_start, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod)
    return Choice("q_sample", backend, reason)


def _choose(x_start: Tensor, signal: Tensor, sigma: Tensor) -> tuple[str, str]:
    """(backend, reason)."""
    if backends.transforms():
        return backends.under_transforms("q_sample"), backends.TRANSFORMS_REASON
    name = backends.named()
    device, dtype = x_start.device, x_start.dtype
    tracked = signal.requires_grad or sigma.requires_grad
    if name is None:
        if tracked:
            return "reference", "only it has gradients for the tables"
        of_call = (device, dtype, "q_sample")
        return backends.default(*of_call), backends.default_reason(*of_call)
    if tracked and name != "reference":
        raise InputError(
            f"q_sample: the backend {name!r} was named, but its kernels have no gradients for the "
            "tables; name 'reference', or None for the plan's choice"
        )
    return backends.require("q_sample", name, device, dtype), backends.NAMED_REASON


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


def _counters(
    x_start: Tensor, seed: int | Tensor | None, step: int | Tensor, first_sample: int | Tensor
) -> Counters:
    """The checked counters as operators take them; ``step`` stays the training step's number."""
    if seed is None:
        return None, None, 0, None, 0, None
    number, seed_tensor = split_counter("seed", seed, 2**64, x_start.device)
    limit = 2**32 - rng.TRAINING_STEP_BASE
    step_number, step_tensor = split_counter("step", step, limit, x_start.device)
    first = split_first_sample(first_sample, len(x_start), x_start.device)
    return number, seed_tensor, step_number or 0, step_tensor, *first


def _drawn(
    x_start: Tensor, seed: int | Tensor | None, step: int | Tensor, first_sample: int | Tensor
) -> Tensor:
    """The noise by itself, in x_start's own dtype and layout."""
    assert seed is not None
    counted = step + rng.TRAINING_STEP_BASE if isinstance(step, Tensor) else rng.training_step(step)
    return rng.normal(
        tuple(x_start.shape),
        seed=seed,
        step=counted,
        first_sample=first_sample,
        out=torch.empty_like(x_start, requires_grad=False),
    )
