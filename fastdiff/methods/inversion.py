"""DDIM's deterministic steps the other way, towards the noise (Song et al. 2020, section 4.3)."""

from dataclasses import replace

import numpy as np
import torch

from fastdiff.methods.levels import Float64Array
from fastdiff.methods.protocol import Process, noise_levels
from fastdiff.methods.table import COLUMNS, StepTable


def upward(
    ddim: StepTable, process: Process, signal_next: Float64Array, noise_next: Float64Array
) -> StepTable:
    """Each row of a deterministic DDIM table made to lead from x_t to the levels given for t (K,):
    signal_next·x_0 + noise_next·ε with ε = (x_t − signal·x_0) / noise."""
    signal, noise = noise_levels(process)
    d = noise_next / noise
    packed = ddim.packed.clone()
    for name, values in {"c": signal_next - signal * d, "d": d}.items():
        packed[:, COLUMNS.index(name)] = torch.from_numpy(values[::-1].copy()).to(packed)
    return replace(ddim, packed=packed)


def encoding_table(process: Process, *, clip_denoised: bool = True) -> StepTable:
    """K rows that take an image to x_{K−1}: what DDIM makes that image of, up to the error of its
    K steps. Row 0 leads from the image itself to step 0: signal·x_0 + noise·ε with step 0's ε.

    ``clip_denoised`` as in ``StepTable.from_process``, and as that table has it by which x_{K−1} is
    decoded. Raises InputError as that does.
    """
    ddim = StepTable.from_process(process, method="ddim", clip_denoised=clip_denoised)
    signal, noise = noise_levels(process)
    up = upward(ddim, process, np.append(signal[1:], 0.0), np.append(noise[1:], 1.0))
    # Ascending: step 0 twice, with its own network both times, and never the way beyond the last.
    last = len(ddim) - 1
    rows = [last, *range(last, 0, -1)]
    table = up.rows(rows, timesteps=up.timesteps[rows])
    # noise·ε is x_0 less signal times what is predicted for x_0 as if it were x_t of step 0; that
    # is not an image's x_t, and a clip would take from ε what is new.
    first = {"c": -signal[0], "d": 1.0 + signal[0], "clip": np.inf}
    for name, value in first.items():
        table.packed[0, COLUMNS.index(name)] = float(value)
    return table
