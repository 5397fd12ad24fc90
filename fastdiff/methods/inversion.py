"""Deterministic steps the other way, towards the noise (Song et al. 2020, section 4.3).

They solve the same differential equation from its other end, so what a method is made of is used as
it is, by legs that lead upward.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from fastdiff.methods.euler import euler_rows
from fastdiff.methods.heun import heun_rows
from fastdiff.methods.legs import Leg
from fastdiff.methods.levels import Float64Array, Level, Levels, Source, is_learned
from fastdiff.methods.protocol import Process, noise_levels
from fastdiff.methods.rows import Row, ddim_step, log_snr_step
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


def encoding_table(
    process: Process, *, method: str = "ddim", clip_denoised: bool = True
) -> StepTable:
    """The rows that take an image to x_{K−1}: what ``method`` makes that image of, up to the error
    of its K steps. Row 0 leads from the image itself to step 0: signal·x_0 + noise·ε with step 0's
    ε. No network is asked beyond step K − 1.

    ``method``: one of INVERTIBLE; "ddim" and "euler" are the same. ``clip_denoised`` as in
    ``StepTable.from_process``, and as that table has it by which x_{K−1} is decoded. Raises
    InputError as that does.
    """
    source = Source.of(Levels.of(*noise_levels(process)), process)
    path = source.steps[::-1]
    # noise·ε is x_0 less signal times what is predicted for x_0 as if it were x_t of step 0; that
    # is not an image's x_t, and a clip would take from ε what is new.
    first = Row(path[0], c=-path[0].signal, d=1.0 + path[0].signal)
    clip = 1.0 if clip_denoised else math.inf
    rows = [first.columns()]
    rows += [row.columns() | {"clip": clip} for row in INVERTIBLE[method](_legs(path))]
    return StepTable.from_rows(rows, method=method, doubled_output=is_learned(source.var_type))


def _legs(path: Sequence[Level]) -> list[Leg]:
    return [Leg(at, to, to) for at, to in pairwise(path)]


def _extrapolated(legs: list[Leg]) -> list[Row]:
    """DPM-Solver++(2M): x_0 + (h / 2h_0)·(x_0 − x_0_before) in x_0's place, with h_0 the h of the
    leg before (Lu et al. 2022, arXiv:2211.01095, algorithm 2)."""
    rows = []
    before = -math.inf  # the row before the first leg came from the data
    for leg in legs:
        h = log_snr_step(leg.at, leg.to)
        w = 0.0 if leg.is_first_order else 0.5 * h / before
        c, d = ddim_step(leg.at, leg.to)
        rows.append(Row(leg.at, c=c * (1 + w), d=d, e=(-c * w, 0.0, 0.0), slot=0, k=1.0))
        before = h
    return rows


INVERTIBLE: dict[str, Callable[[list[Leg]], list[Row]]] = {
    "ddim": euler_rows,
    "euler": euler_rows,
    "heun": heun_rows,
    "dpmsolver++": _extrapolated,
}
