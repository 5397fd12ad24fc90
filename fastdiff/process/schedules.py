"""Noise schedules: float64 arrays of betas, one variance per diffusion step (step 0 first).

Sources: linear, quad, warmup, const, jsd from Ho et al. 2020 (arXiv:2006.11239) and its published
code; cosine from Nichol & Dhariwal 2021 (arXiv:2102.09672) eq. 17; zero-terminal-SNR rescaling
from Lin et al. 2023 (arXiv:2305.08891) algorithm 1.
"""

import math
import operator
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fastdiff.checks import is_finite
from fastdiff.errors import InputError

FloatArray = npt.NDArray[np.float64]

# The end points of Ho et al. 2020, chosen there for 1000 steps.
BETA_START = 0.0001
BETA_END = 0.02


def linear_betas(num_steps: int) -> FloatArray:
    """Betas rising linearly from 1e-4 to 0.02, both scaled by 1000 / num_steps.

    The scaling keeps the total amount of noise the same for any number of steps (published
    improved-diffusion code). Returns float64 (num_steps,). Raises InputError below 20 steps, where
    the last beta would exceed 1.
    """
    num_steps = _check_steps(num_steps)
    scale = 1000 / num_steps
    if scale * BETA_END > 1:
        raise InputError(
            f"the linear schedule needs at least 20 steps, got {num_steps}: "
            "train with more steps and respace, or use the cosine schedule"
        )
    return np.linspace(scale * BETA_START, scale * BETA_END, num_steps, dtype=np.float64)


def cosine_betas(num_steps: int, s: float = 0.008, max_beta: float = 0.999) -> FloatArray:
    """Betas for alphas_cumprod(u) = cos²((u + s) / (1 + s) · π/2), u in [0, 1], capped at max_beta.

    Nichol & Dhariwal 2021 eq. 17. Returns float64 (num_steps,). Raises InputError for a negative
    ``s`` and a ``max_beta`` outside (0, 1].
    """
    num_steps = _check_steps(num_steps)
    if not (is_finite(s) and s >= 0):
        raise InputError(f"s must not be negative, got {s!r}")
    if not (is_finite(max_beta) and 0 < max_beta <= 1):
        raise InputError(f"max_beta must lie in (0, 1], got {max_beta!r}")

    def alpha_bar(u: float) -> float:
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    # math.cos, one step at a time: 1 - ratio cancels, and a cosine that differs by one ulp (as
    # vectorised ones do) would move the first betas by more than 1e-12 of their value.
    steps = range(num_steps)
    ratios = [alpha_bar((i + 1) / num_steps) / alpha_bar(i / num_steps) for i in steps]
    return np.array([min(1 - ratio, max_beta) for ratio in ratios], dtype=np.float64)


def quad_betas(
    num_steps: int, beta_start: float = BETA_START, beta_end: float = BETA_END
) -> FloatArray:
    """Betas whose square roots rise linearly from √beta_start to √beta_end (Ho et al. 2020, code).

    The end points are not scaled with num_steps: they are the published ones, for 1000 steps.
    Returns float64 (num_steps,).
    """
    num_steps = _check_steps(num_steps)
    _check_ends(beta_start, beta_end)
    return np.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=np.float64) ** 2


def warmup_betas(
    num_steps: int, fraction: float, beta_start: float = BETA_START, beta_end: float = BETA_END
) -> FloatArray:
    """A linear rise to beta_end over the first ``fraction`` of the steps, constant afterwards.

    Ho et al. 2020, code ("warmup10": 0.1, "warmup50": 0.5); end points not scaled with num_steps.
    Returns float64 (num_steps,).
    """
    num_steps = _check_steps(num_steps)
    _check_ends(beta_start, beta_end)
    if not (is_finite(fraction) and 0 <= fraction <= 1):
        raise InputError(f"fraction must lie in [0, 1], got {fraction!r}")
    betas = np.full(num_steps, beta_end, dtype=np.float64)
    rising = int(num_steps * fraction)
    betas[:rising] = np.linspace(beta_start, beta_end, rising, dtype=np.float64)
    return betas


def warmup10_betas(num_steps: int) -> FloatArray:
    """:func:`warmup_betas` over the first 10 % of the steps."""
    return warmup_betas(num_steps, 0.1)


def warmup50_betas(num_steps: int) -> FloatArray:
    """:func:`warmup_betas` over the first half of the steps."""
    return warmup_betas(num_steps, 0.5)


def const_betas(num_steps: int, beta: float = BETA_END) -> FloatArray:
    """The same beta at every step (Ho et al. 2020, code; not scaled): float64 (num_steps,)."""
    num_steps = _check_steps(num_steps)
    _check_ends(beta, beta)
    return np.full(num_steps, beta, dtype=np.float64)


def jsd_betas(num_steps: int) -> FloatArray:
    """1/T, 1/(T-1), …, 1: alphas_cumprod falls linearly to exactly 0 (Sohl-Dickstein et al. 2015).

    The last step has no signal left, so the network must predict v, x_start or previous_x.
    Returns float64 (num_steps,).
    """
    num_steps = _check_steps(num_steps)
    return 1.0 / np.linspace(num_steps, 1, num_steps, dtype=np.float64)


SCHEDULES: dict[str, Callable[[int], FloatArray]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "quad": quad_betas,
    "warmup10": warmup10_betas,
    "warmup50": warmup50_betas,
    "const": const_betas,
    "jsd": jsd_betas,
}


def get_named_beta_schedule(name: str, num_steps: int) -> FloatArray:
    """The betas of a schedule by its published name.

    "linear" (:func:`linear_betas`), "cosine" (:func:`cosine_betas`), "quad", "warmup10",
    "warmup50", "const" or "jsd", the last five as in the code of Ho et al. 2020. Returns float64
    (num_steps,). Raises InputError for another name and for a number of steps that does not fit.
    """
    if not isinstance(name, str) or name not in SCHEDULES:
        raise InputError(f"unknown noise schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](num_steps)


def rescale_zero_terminal_snr(betas: npt.ArrayLike) -> FloatArray:
    """Shift and scale √alphas_cumprod so that the last step holds no signal at all.

    Lin et al. 2023 algorithm 1: the first step keeps its signal, the last has none (its beta is 1).
    Use it with v, x_start or previous_x prediction: ε says nothing about x_0 where there is only
    noise. Takes and returns float64 (T,), T >= 2. Raises InputError otherwise, for betas outside
    (0, 1], and for betas whose signal does not fall after the first step or ends before the last.
    """
    betas = check_betas(betas)
    if betas.size < 2:
        raise InputError("betas must have at least 2 steps, got 1: there is nothing to rescale")
    root = np.sqrt(np.cumprod(1.0 - betas))
    if not root[0] > root[-1] or root[-2] == 0:
        raise InputError(
            "betas must leave signal until the last step and lose some after the first: "
            f"√alphas_cumprod runs {root[0]:.3g}, …, {root[-2]:.3g}, {root[-1]:.3g}"
        )
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    alphas = np.append(alphas_cumprod[0], alphas_cumprod[1:] / alphas_cumprod[:-1])
    return 1.0 - alphas


def check_betas(betas: npt.ArrayLike) -> FloatArray:
    """``betas`` as float64 (T,), or InputError unless they are numbers in (0, 1]."""
    try:
        values = np.array(betas, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"betas must be an array of numbers, got {type(betas).__name__}") from None
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"betas must be one-dimensional and not empty, got shape {values.shape}")
    if not ((values > 0) & (values <= 1)).all():
        wrong = int(np.argmin((values > 0) & (values <= 1)))
        raise InputError(f"betas must lie in (0, 1], got {values[wrong]} at step {wrong}")
    return values


def _check_steps(num_steps: int) -> int:
    try:
        count = operator.index(num_steps)
    except TypeError:
        raise InputError(
            f"the number of diffusion steps must be an integer, got {num_steps!r}"
        ) from None
    if count < 1:
        raise InputError(f"the number of diffusion steps must be at least 1, got {count}")
    return count


def _check_ends(beta_start: float, beta_end: float) -> None:
    if not all(is_finite(beta) and 0 < beta <= 1 for beta in (beta_start, beta_end)):
        raise InputError(f"betas must lie in (0, 1], got {beta_start!r} to {beta_end!r}")
