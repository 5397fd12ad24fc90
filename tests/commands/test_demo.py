"""The demo, end to end: what `make demo` left behind, and a shorter run of the same commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.run_directory import newest_checkpoint
from fastdiff.cli import main
from paths import ROOT

DEMO = ROOT / "runs" / "demo"


def check_scores(report: dict, *, confidence: float, frechet_ratio: float, share: float) -> None:
    """Recognised by a classifier of the real digits, all ten there, near the real distribution."""
    assert report["classifier"]["held_out_accuracy"] >= 0.95
    assert report["confidence"]["samples"] >= confidence
    assert report["classes"]["absent"] == []
    assert len(report["classes"]["shares"]) == 10
    assert report["classes"]["max_share"] <= share
    frechet = report["frechet"]
    assert frechet["samples"] <= frechet_ratio * frechet["halves"]
    # The scores must be able to tell bad samples: noise fails them.
    assert report["confidence"]["noise"] < confidence
    assert frechet["noise"] > frechet_ratio * frechet["halves"]
    # Memorising would bring samples nearer to the training images than those are to each other.
    nearest = report["nearest"]
    assert nearest["samples"]["mean"] > 0.8 * nearest["real"]["mean"]


@pytest.mark.skipif(not (DEMO / "evaluation.json").exists(), reason="make demo has not run here")
def test_the_demo_that_ran_here_meets_its_scores():
    report = json.loads((DEMO / "evaluation.json").read_text())
    check_scores(report, confidence=0.85, frechet_ratio=1.7, share=0.15)
    with np.load(DEMO / "samples_1000x8x8x1.npz") as samples:
        assert samples["arr_0"].shape == (1000, 8, 8, 1)
        assert samples["arr_0"].dtype == np.uint8
    assert min(Image.open(DEMO / "grid.png").size) >= 400
    assert Image.open(DEMO / "loss_curve.png").size[0] >= 400


def run_demo(folder: Path, *, training: int, number: int, steps: int) -> dict:
    """What evaluate says after so many steps of training, samples, and steps to each of them."""
    run, samples, scores = (str(folder / name) for name in ("run", "samples", "evaluation.json"))
    train = ["train", "--preset", "digits", "--data", "digits", "--out", run]
    assert main([*train, "--steps", str(training)]) == 0
    sample = ["sample", "--checkpoint", run, "--out", samples]
    assert main([*sample, "--num", str(number), "--steps", str(steps)]) == 0
    npz = f"{samples}/samples_{number}x8x8x1.npz"
    assert main(["evaluate", "--samples", npz, "--data", "digits", "--out", scores]) == 0
    assert checkpoint.load(newest_checkpoint(run)).step == training
    assert Image.open(f"{samples}/grid.png").size[0] >= 400
    assert Image.open(f"{run}/loss_curve.png").size[0] >= 400
    losses = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"]
    return json.loads(Path(scores).read_text())


@pytest.mark.long
def test_a_shorter_demo_meets_bounds_to_match(tmp_path, capsys):
    scores = run_demo(tmp_path, training=700, number=400, steps=50)
    check_scores(scores, confidence=0.75, frechet_ratio=10.0, share=0.30)
    assert "mean confidence" in capsys.readouterr().out


@pytest.mark.seconds
def test_after_a_minute_samples_are_nearer_to_digits_than_noise(tmp_path, capsys):
    scores = run_demo(tmp_path, training=100, number=100, steps=10)
    assert scores["classifier"]["held_out_accuracy"] >= 0.95
    assert scores["confidence"]["samples"] > scores["confidence"]["noise"]
    assert scores["frechet"]["samples"] < 0.7 * scores["frechet"]["noise"]
    assert "mean confidence" in capsys.readouterr().out
