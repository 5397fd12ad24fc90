"""Snapshots of a run's power-function averages, and averages of other widths made of them.

They are RUN/averages/step_XXXXXXXX/power-<sigma_rel>.safetensors, and none is ever deleted: each
that is missing makes the averages worse. Those after the newest checkpoint do not count, since a
resumed run makes them anew.

They are float32, where the paper has half precision: an average narrower than its snapshots is a
difference of them (0.03 of 20 at 0.05 and 0.1: factors of norm 5, 0.01 of 100: of norm 80), which
multiplies their rounding. So a snapshot's own width is given back bit for bit.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint, load
from fastdiff.checkpoints.network import Given, load_state
from fastdiff.checkpoints.run_directory import newest_checkpoint, require_run
from fastdiff.checkpoints.weights import load_tensors, write_directory
from fastdiff.errors import InputError
from fastdiff.models.ema import power_name, sigma_rel_of
from fastdiff.models.power_function import coefficients
from fastdiff.models.wrappers import plain_name

FOLDER = "averages"  # of a run
_SNAPSHOT = re.compile(r"step_(\d{8,})")  # the name of a complete one

Snapshots = dict[tuple[int, float], Path]  # (step, sigma_rel) -> the folder of its file


@dataclass(frozen=True)
class Reconstruction:
    """An average that was made of snapshots.

    Attributes:
        checkpoint: the run's newest, its network holding the average; ``step`` is the average's,
            and ``info["average"]`` says what it is: {"sigma_rel", "step", "snapshots", "off"}.
        snapshots: how many it was made of.
        off: how far its profile is from the power function's, as a share of that one's norm.
    """

    checkpoint: Checkpoint
    snapshots: int
    off: float


def write_snapshot(run_dir: Path, step: int, averages: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write averages by their names, ``"power-0.05"``, all or none. OSError: the disk is full."""
    write_directory(run_dir / FOLDER / f"step_{step:08d}", averages, {})


def reconstruct(
    run_dir: str | os.PathLike[str],
    sigma_rel: float,
    step: int | None = None,
    *,
    model: Given = None,
) -> Reconstruction:
    """The power-function average of any width, of the snapshots up to its step.

    Args:
        run_dir: of a training run with ``ema_sigma_rel`` and ``ema_snapshot_every``.
        sigma_rel: the standard deviation of its memory as a share of the steps, between 0 and
            0.288.
        step: one at which there are snapshots; None: the newest.
        model: what ``fastdiff.load`` needs of a network of which there are weights alone.

    Raises:
        InputError: no run, no snapshots, none of that step, a damaged file, a width out of range.

    Source: Karras et al. 2024, arXiv:2312.02696, section 3.2 and appendix C.3.
    """
    run = Path(run_dir)
    require_run(run)
    power_name(sigma_rel)
    loaded = load(newest_checkpoint(run), weights="model", model=model)
    found = _snapshots(run, loaded.step or 0)
    step = _chosen_step(run, found, step)
    same = {key: path for key, path in found.items() if key == (step, sigma_rel)}
    used = same or {key: path for key, path in found.items() if key[0] <= step}
    factors, off = coefficients(list(used), step, sigma_rel)

    averaged = {plain_name(n) for n, _ in loaded.model.named_parameters(remove_duplicate=False)}
    state: dict[str, Tensor] = {}
    for factor, ((_, width), folder) in zip(factors, used.items(), strict=True):
        for name, tensor in load_tensors(folder, power_name(width)).items():
            if name not in averaged:
                state[name] = tensor  # of the last, which is of the average's step
            else:
                before = state.get(name, torch.zeros(tensor.shape, dtype=torch.float64))
                state[name] = before.add_(tensor, alpha=float(factor))
    state = {name: t.float() if name in averaged else t for name, t in state.items()}
    load_state(loaded.model, state, run / FOLDER)
    facts = {"sigma_rel": sigma_rel, "step": step, "snapshots": len(used), "off": off}
    info = {**loaded.info, "average": facts}
    return Reconstruction(replace(loaded, step=step, info=info), len(used), off)


def _snapshots(run: Path, last: int) -> Snapshots:
    """The snapshots of a run up to the step ``last``, the oldest first."""
    root = run / FOLDER
    found: Snapshots = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        match = _SNAPSHOT.fullmatch(folder.name)
        for file in folder.glob("*.safetensors") if match and int(match[1]) <= last else []:
            sigma_rel = sigma_rel_of(file.name.removesuffix(".safetensors"))
            if match and sigma_rel is not None:
                found[int(match[1]), sigma_rel] = folder
    return dict(sorted(found.items()))


def _chosen_step(run: Path, found: Snapshots, step: int | None) -> int:
    steps = sorted({at for at, _ in found})
    if not steps:
        raise InputError(
            f"'{run}' has no snapshots of power-function averages: train with --ema-sigma-rel "
            "0.05,0.1 --ema-snapshot-every N"
        )
    if step is None:
        return steps[-1]
    if step not in steps:
        nearest = min(steps, key=lambda at: abs(at - step))
        raise InputError(
            f"'{run}' has no snapshots of step {step}; there are {len(steps)} from step {steps[0]} "
            f"to {steps[-1]}, the nearest {nearest}"
        )
    return step
