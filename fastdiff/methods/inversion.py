"""Deterministic steps the other way, towards the noise (Song et al. 2020, section 4.3).

They solve the same differential equation from its other end: a method makes its rows of a Source
whose path leads upward.
"""

import math
from dataclasses import replace
from typing import Any

import torch

from fastdiff.errors import InputError
from fastdiff.methods import registry
from fastdiff.methods.levels import Float64Array, Levels, Source, is_learned
from fastdiff.methods.protocol import Process, noise_levels
from fastdiff.methods.rows import Row
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
    process: Process,
    *,
    method: str = "ddim",
    eta: float | None = None,
    clip_denoised: bool = True,
    clipped_eps: bool = True,
    **options: Any,
) -> StepTable:
    """The rows that take an image to x_{K−1}: what ``method`` makes that image of, up to the error
    of its K steps. Row 0 leads from the image itself to step 0: signal·x_0 + noise·ε with step 0's
    ε. No network is asked beyond step K − 1.

    All but ``process`` is as of ``StepTable.from_process``, and as that table has it by which
    x_{K−1} is decoded. Raises InputError as that does, for a method that draws noise, and for a
    clip that "ddim" keeps from its ε (``clipped_eps=False``).
    """
    _check_deterministic(process, method, options | {"eta": eta, "clipped_eps": clipped_eps})
    if clip_denoised and not clipped_eps:
        raise InputError(
            "clipped_eps=False leads back from an image to its noise only without the clip of x_0: "
            "give clip_denoised=False, or leave clipped_eps out"
        )
    source = Source.of(Levels.of(*noise_levels(process)), process)
    source = replace(source, upward=True)
    start = source.path[0]
    # noise·ε is x_0 less signal times what is predicted for x_0 as if it were x_t of step 0; that
    # is not an image's x_t, and a clip would take from ε what is new.
    rows = [Row(start, c=-start.signal, d=1.0 + start.signal).columns()]
    if source.steps:
        # DDIM's own has a row for every step of the process; upward it is Euler's.
        chosen = registry.find("euler" if method == "ddim" else method)
        made = chosen.columns(source, **chosen.accepted(options, eta=eta, clipped_eps=True))
        assert isinstance(made, list), f"{method} has a row for every step of the process"
        clip = 1.0 if clip_denoised else math.inf
        rows += [row.columns() | {"clip": clip} for row in made]
    return StepTable.from_rows(rows, method=method, doubled_output=is_learned(source.var_type))


def _check_deterministic(process: Process, method: str, options: dict[str, Any]) -> None:
    """InputError for what draws noise, or would if it were not multiplied by 0."""
    if "s_noise" in registry.find(method).options:
        options = options | {"s_noise": 1.0}
    table = StepTable.from_process(process, method=method, **options)
    if table.is_noisy:
        raise InputError(
            f"method {method!r} draws noise here, and only without any is there a way back from an "
            "image to its noise: take a method such as 'ddim' or 'dpmsolver++', or an option "
            "such as eta=0"
        )
