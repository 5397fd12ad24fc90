"""The timesteps whose strided process has the least variational bound (Watson et al. 2021).

"Learning to Efficiently Sample from Diffusion Probabilistic Models", arXiv:2106.03802: the bound is
a sum over strides, so dynamic programming over (steps taken, timestep) finds the best subsequence
from what each step of the whole process measured.
"""

import operator

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.methods.levels import Float64Array, is_learned
from fastdiff.methods.protocol import Process, noise_levels

_BLOCK = 64  # rows of the costs at a time: what is added and searched stays in the cache


def best_timesteps(diffusion: Process, steps: int, xstart_mse: npt.ArrayLike | Tensor) -> list[int]:
    """``steps`` timesteps of ``diffusion``, ascending, with the least variational bound.

    For ``diffusion.respace(timesteps=…)``. Both ends, 0 and T − 1, are always among them: the
    bound's prior term then is the same for every choice, and its decoder's term is taken as the
    same (with a fixed variance, the respaced decoder borrows that of the second step). What a
    choice changes are the KL terms, one a stride from t to s,

        ½·(r·(SNR_s − SNR_t)·mse_t + r − 1 − log r) nats per dimension,   SNR = (signal/noise)²,

    with r the posterior's variance over the network's: 1 for var_type "fixed_small", and for
    "fixed_large" (noise_s/noise_t)². A learned variance at a stride that was not measured is
    unknown; it is taken as the posterior's, r = 1.

    Args:
        diffusion: the process the network was measured on, of T steps: a GaussianDiffusion, a
            VarianceExploding or an EDM.
        steps: how many to choose, in 2 … T (1 where T is 1).
        xstart_mse: E‖x_0 − x̂_0(x_t)‖² per dimension at every t. Either (N, T), "xstart_mse" of
            ``calc_bpd_loop``, one row an image, the noisiest step first; or (T,), its average, step
            t at index t, as ``summarize_bpd(…).xstart_mse`` has it.

    Exact up to rounding. Takes O(steps·T²) operations, two seconds for 100 of 4,000 steps on one
    core, and holds T² + O(steps·T) numbers, 128 MB there. Raises InputError for arguments that do
    not fit, and for errors that fall from the least noisy step to the noisiest: those are in the
    other order.

    The bound is not sample quality: Watson et al. find that the steps with the best bound need not
    have the best FID, and may have a worse one than evenly spread steps.
    """
    mse = _mean_mse(xstart_mse, len(noise_levels(diffusion)[0]))
    total = len(mse)
    try:
        count = operator.index(steps)
    except TypeError:
        raise InputError(f"steps must be an integer, got {steps!r}") from None
    if not min(2, total) <= count <= total:
        raise InputError(
            f"cannot choose {count} of {total} steps: expected {min(2, total)} … {total} "
            "(both ends are kept)"
        )
    costs = _stride_costs(diffusion, mse)
    # best[t]: the least cost of reaching t from 0 in as many strides as the loop has made.
    best = np.append(0.0, np.full(total - 1, np.inf))
    came_from = np.zeros((count, total), dtype=np.int32)
    for stride in range(1, count):
        reached = np.full(total, np.inf)
        for first in range(0, total, _BLOCK):
            rows = slice(first, min(first + _BLOCK, total))
            through = costs[rows, : rows.stop] + best[: rows.stop]  # (t, s)
            came_from[stride, rows] = through.argmin(axis=1)
            reached[rows] = through.min(axis=1)
        best = reached
    chosen = [total - 1]
    for stride in range(count - 1, 0, -1):
        chosen.append(int(came_from[stride, chosen[-1]]))
    return chosen[::-1]


def _stride_costs(diffusion: Process, mse: Float64Array) -> Float64Array:
    """(T, T): the KL term of the stride from t (row) to s (column), infinite unless s < t."""
    signal, noise = noise_levels(diffusion)
    snr = (signal / noise) ** 2
    costs = np.empty((len(snr), len(snr)))
    for t in range(len(snr)):
        costs[t, t:] = np.inf
        if is_learned(diffusion.var_type) or diffusion.var_type == "fixed_small":
            costs[t, :t] = 0.5 * (snr[:t] - snr[t]) * mse[t]
        else:
            r = (noise[:t] / noise[t]) ** 2
            costs[t, :t] = 0.5 * (r * (snr[:t] - snr[t]) * mse[t] + r - 1 - np.log(r))
    return costs


def _mean_mse(xstart_mse: npt.ArrayLike | Tensor, total: int) -> Float64Array:
    """(T,) float64, step t at index t."""
    given = xstart_mse.detach().cpu() if isinstance(xstart_mse, Tensor) else xstart_mse
    try:
        mse = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError("xstart_mse must be an array of numbers, (T,) or (N, T)") from None
    if mse.ndim not in (1, 2) or mse.shape[-1] != total or mse.size == 0:
        raise InputError(
            f"xstart_mse has shape {mse.shape}; expected ({total},) or (N, {total}), one value for "
            f"each of the process's {total} steps: measure with calc_bpd_loop of this very process"
        )
    if mse.ndim == 2:
        mse = mse.mean(axis=0)[::-1]
    if not (np.isfinite(mse).all() and (mse >= 0).all()):
        raise InputError("xstart_mse must be finite and not negative, being mean squared errors")
    if mse[0] > mse[-1]:
        raise InputError(
            f"xstart_mse falls, from {mse[0]:.4g} at the least noisy step to {mse[-1]:.4g} at the "
            "noisiest: give (T,) with step t at index t, or (N, T) as calc_bpd_loop returns it"
        )
    return mse
