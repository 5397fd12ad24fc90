"""The picture of a run's losses, and the records it is drawn from."""

import json

import numpy as np
import pytest
from PIL import Image

from fastdiff.errors import InputError
from fastdiff.training.loss_curve import _smooth, plot_loss
from fastdiff.training.metrics import read_metrics


def metrics_file(tmp_path, rows, tail=""):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_loss_curve(tmp_path):
    rows = [
        {"step": 10 * k, "loss": 1 / k, "lr": 1e-4} | {f"loss_q{q}": (4 - q) / k for q in range(4)}
        for k in range(1, 50)
    ]
    rows[5]["loss"], rows[6]["loss_q2"] = float("nan"), None
    path = metrics_file(tmp_path, rows, tail='{"step": 500, "lo')
    drawn = plot_loss(path, tmp_path / "plots" / "loss_curve.png")
    width, height = Image.open(drawn).size
    assert width > 600 and height > 300


def test_a_resumed_run_overwrites_its_steps(tmp_path):
    logged = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0)]
    path = metrics_file(tmp_path, [{"step": step, "loss": loss} for step, loss in logged])
    rows = read_metrics(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 9.0), (2, 5.0), (3, 7.0)]


def test_smoothing_keeps_a_constant_and_quietens_noise():
    assert np.allclose(_smooth(np.full(300, 0.7)), 0.7)
    noisy = np.exp(np.random.default_rng(0).normal(size=900))
    assert _smooth(noisy)[100:].std() < 0.3 * noisy.std()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "loss": 1}\nnonsense\n{"step": 2, "loss": 1}\n', "line 2"),
        ('{"loss": 1}\n{"step": 2, "loss": 1}\n', "line 1"),
        ('{"step": 1, "lr": 1}\n', "no positive loss"),
        ("", "no positive loss"),
    ],
)
def test_bad_metrics(text, message, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        plot_loss(path, tmp_path / "x.png")
    with pytest.raises(InputError, match="no metrics file"):
        plot_loss(tmp_path / "none.jsonl", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
