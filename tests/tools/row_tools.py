"""A table's rows in float64, one number or array at a time, with an x_0 that is known.

The equation is that of fastdiff/methods/table.py, written without a kernel and without PyTorch, so
that a method's rows are judged apart from what computes them.
"""

from types import SimpleNamespace

import numpy as np
import torch

from fastdiff.methods.rows import SLOTS
from fastdiff.methods.table import StepTable

NAMES = ("c", "d", "e0", "e1", "e2", "sigma", "clip", "slot", "k", "q")


def process(signal, noise, mean_type="x_start", var_type="fixed_small", **extra):
    """Any Gaussian process by its two scales, t ascending."""
    signal, noise = np.asarray(signal, dtype=np.float64), np.asarray(noise, dtype=np.float64)
    attributes = {
        "model_timesteps": np.arange(len(signal), dtype=np.float32),
        "input_scale": np.ones(len(signal)),
    }
    return SimpleNamespace(
        signal_scale=signal,
        noise_scale=noise,
        mean_type=mean_type,
        var_type=var_type,
        **attributes | extra,
    )


def preserving(log_snr, **extra):
    """The variance-preserving process over these λ = log(signal / noise), falling."""
    log_snr = np.asarray(log_snr, dtype=np.float64)
    return process((1 + np.exp(-2 * log_snr)) ** -0.5, (1 + np.exp(2 * log_snr)) ** -0.5, **extra)


def exploding(log_snr, **extra):
    """The variance-exploding one, signal 1."""
    return process(np.ones(len(log_snr)), np.exp(-np.asarray(log_snr)), **extra)


def table_of(made_of, method, **options):
    """The method's table in float64, x_0 not clipped unless ``clip_denoised``; of an ``order`` for
    which there are too few steps, by as many as there are."""
    options = {"clip_denoised": False} | options
    steps = len(made_of.signal_scale)
    if type(options.get("order")) is int and steps < 4:
        options["order"] = min(options["order"], steps)
    return StepTable.from_process(made_of, method=method, dtype=torch.float64, **options)


def run(table, x, x_start_of, z=None):
    """x after every row of the table, from x; ``x_start_of(x, signal, noise)`` predicts x_0.

    ``z``: fresh noise of each row, where there is any. Memory starts as NaN: what is read has been
    written.
    """
    rows = {name: getattr(table, name).double().numpy() for name in NAMES}
    memory, after = [np.full_like(x, np.nan) for _ in range(SLOTS)], []
    for i, level in enumerate(table.levels):
        row = {name: values[i] for name, values in rows.items()}
        x_start = np.clip(x_start_of(x, *level), -row["clip"], row["clip"])
        made = row["c"] * x_start + row["d"] * x
        for slot in range(SLOTS):
            if row[f"e{slot}"]:
                made = made + row[f"e{slot}"] * memory[slot]
        if row["sigma"]:
            made = made + row["sigma"] * z[i]
        if row["slot"] >= 0:
            memory[int(row["slot"])] = row["k"] * x_start + row["q"] * x
        after.append(made)
        x = made
    return after


def arrivals(table):
    """(signal, noise) of the x that each row makes: the next row's, or the data's."""
    return np.concatenate([table.levels[1:], [[1.0, 0.0]]])


class Mixture:
    """Data of a few points, each widened to a normal: x_0 given x in closed form."""

    def __init__(self, means, std):
        self.means, self.std = np.asarray(means, dtype=np.float64), std

    def x_start(self, x, signal, noise):
        variance = signal**2 * self.std**2 + noise**2
        gaps = x[..., None] - signal * self.means
        log_weight = -(gaps**2) / (2 * variance)
        weight = np.exp(log_weight - log_weight.max(-1, keepdims=True))
        each = self.means + signal * self.std**2 / variance * gaps
        return (weight * each).sum(-1) / weight.sum(-1)
