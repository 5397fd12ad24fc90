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
    check_scores(report, confidence=0.85, frechet_ratio=5.0, share=0.25)
    with np.load(DEMO / "samples_1000x8x8x1.npz") as samples:
        assert samples["arr_0"].shape == (1000, 8, 8, 1)
        assert samples["arr_0"].dtype == np.uint8
    assert min(Image.open(DEMO / "grid.png").size) >= 400
    assert Image.open(DEMO / "loss_curve.png").size[0] >= 400


@pytest.mark.slow
def test_a_short_demo_meets_bounds_to_match(tmp_path, capsys):
    run = str(tmp_path / "run")
    samples = str(tmp_path / "samples")
    train = ["train", "--preset", "digits", "--data", "digits", "--out", run, "--steps", "700"]
    assert main(train) == 0
    assert (
        main(["sample", "--checkpoint", run, "--out", samples, "--num", "400", "--steps", "50"])
        == 0
    )
    npz = f"{samples}/samples_400x8x8x1.npz"
    scores = tmp_path / "evaluation.json"
    assert main(["evaluate", "--samples", npz, "--data", "digits", "--out", str(scores)]) == 0

    check_scores(json.loads(scores.read_text()), confidence=0.75, frechet_ratio=10.0, share=0.30)
    assert checkpoint.load(newest_checkpoint(run)).step == 700
    assert Image.open(f"{samples}/grid.png").size[0] >= 400
    assert Image.open(f"{run}/loss_curve.png").size[0] >= 400
    losses = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"]
    assert "mean confidence" in capsys.readouterr().out
