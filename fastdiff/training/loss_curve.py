"""The picture of a run's losses."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.errors import InputError
from fastdiff.files import replacing
from fastdiff.optional import require
from fastdiff.training.metrics import read_metrics


def plot_loss(metrics: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Draw the loss, and the losses of the four quarters of the timesteps, over the steps.

    metrics: a file of JSON lines with ``step``, ``loss`` and, where they were measured,
        ``loss_q0`` … ``loss_q3``; a last line cut short by a kill is passed over, and of two
        lines for one step the later one counts (a resumed run).
    """
    path = Path(metrics)
    if not path.is_file():
        raise InputError(f"no metrics file '{path}'")
    rows = read_metrics(path)
    figure = require("matplotlib.figure", "demo").Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    steps, loss = _series(rows, "loss")
    if not len(steps):
        raise InputError(f"'{metrics}' holds no positive loss to draw")
    axes.plot(steps, loss, color="0.8", linewidth=0.8, label="loss, as logged")
    axes.plot(steps, _smooth(loss), color="black", linewidth=1.8, label="loss, smoothed")
    for quarter, note in enumerate([" (least noise)", "", "", " (most noise)"]):
        quarter_steps, values = _series(rows, f"loss_q{quarter}")
        if len(quarter_steps):
            label = f"timesteps, quarter {quarter + 1}{note}"
            axes.plot(quarter_steps, _smooth(values), linewidth=1.2, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    file = Path(out)
    with replacing(file) as stream:
        figure.savefig(stream, format="png", dpi=110)
    return file


def _series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values where ``key`` was logged and a logarithm exists."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    pairs = [(step, value) for step, value in pairs if 0 < value < math.inf]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a thirtieth of the curve, without a bias at its start."""
    keep = 1 - 1 / max(1.0, len(values) / 30)
    smoothed, mean, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed[i] = mean / weight
    return smoothed
