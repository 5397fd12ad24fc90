"""Fréchet distances while a run trains, and the best weights that are kept by them."""

import json

import pytest
import torch

import rank_runs
import score_tools
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.run_directory import identify
from fastdiff.cli import main
from fastdiff.errors import InputError
from fastdiff.evaluation.features import NETWORKS, FeatureNetwork, feature_network
from fastdiff.training import scores
from score_tools import NAME, Pixels, asked
from training_tools import make_trainer, read_lines, resume_trainer

QUICK = {"steps": 6, "fid_every": 2, "fid_samples": 20, "sample_steps": 2, "ema": ()}


class Means(FeatureNetwork):
    name, published, resizing = "means", False, "none"
    widths = {"pooled": 4, "logits": 2, "spatial": 3}

    def forward(self, images):
        values = images.float().flatten(1) / 255
        return {kind: values[:, :width] for kind, width in self.widths.items()}


@pytest.fixture(autouse=True)
def means(monkeypatch):
    monkeypatch.setattr(scores, "feature_network", lambda *arguments: Means())


@pytest.mark.seconds
def test_the_best_weights_are_kept(tmp_path):
    trainer, weights = make_trainer(tmp_path / "run", log_every=1, **QUICK), {}
    measured = {}

    def look(trainer, values):
        if "fid" in values:
            measured[trainer.step] = values["fid"]
            weights[trainer.step] = {
                name: value.clone() for name, value in trainer.model.state_dict().items()
            }

    trainer.callbacks.append(look)
    trainer.fit()
    assert sorted(measured) == [2, 4, 6]
    lines = {line["step"]: line for line in read_lines(tmp_path / "run")}
    for step, fid in measured.items():
        assert lines[step]["fid"] == fid
        assert 0 <= lines[step]["copies"] <= 1 and 0 < lines[step]["class_coverage"] <= 1
    best = min(measured, key=measured.__getitem__)
    kept = checkpoint.load(tmp_path / "run" / "best")
    assert kept.step == best and kept.info["scores"]["fid"] == measured[best]
    assert all(torch.equal(v, weights[best][n]) for n, v in kept.model.state_dict().items())
    assert identify(tmp_path / "run").kind == "run"


@pytest.mark.seconds
def test_a_resumed_run_knows_its_best(tmp_path):
    make_trainer(tmp_path, **QUICK).fit()
    config = tmp_path / "best" / "config.json"
    document = json.loads(config.read_text())
    document["info"]["scores"]["fid"] = -1.0  # nothing will be better
    config.write_text(json.dumps(document))
    assert resume_trainer(tmp_path, steps=8).fit() == 8
    assert json.loads(config.read_text())["step"] == document["step"]


def test_what_has_no_distance_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(InputError, match="needs its weights, none are given"):
        make_trainer(tmp_path, **{**QUICK, "fid_features": "inception"})
    with pytest.raises(InputError, match="fid_features is 'vgg', expected one of"):
        make_trainer(tmp_path, **{**QUICK, "fid_features": "vgg"})


@pytest.mark.seconds
def test_ranks_measure_what_one_does_and_go_on(cifar, start, tmp_path, monkeypatch):
    settings = "--fid-every 2 --fid-samples 12 --sample-steps 2 --save-every 2".split()

    def command(run, steps, *more):
        return rank_runs.command(cifar, tmp_path / run, *settings, "--steps", steps, *more)

    monkeypatch.setitem(NETWORKS, NAME, lambda weights, resize: Pixels())
    monkeypatch.setattr(scores, "feature_network", feature_network)
    assert main(command("one", "6")) == 0

    first, second = tmp_path / "first", tmp_path / "second"
    codes, log = start(2, score_tools.command(command("two", "4"), first)).finish()
    assert codes == [0, 0], log
    assert asked(first) == {0: 25 + 2 * 6, 1: 25 + 2 * 6}  # 50 images once, 12 samples twice
    again = score_tools.command(command("two", "6", "--resume"), second)
    codes, log = start(2, again).finish()
    assert codes == [0, 0], log
    assert asked(second) == {0: 6, 1: 6}

    found, expected = (
        [line for line in read_lines(tmp_path / run) if "fid" in line] for run in ("two", "one")
    )
    assert [line["step"] for line in found] == [2, 4, 6]
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("fid", "copies", "class_coverage"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-2)
    least = min(found, key=lambda line: line["fid"])
    kept = checkpoint.load(tmp_path / "two" / "best")
    assert (kept.step, kept.info["scores"]["fid"]) == (least["step"], least["fid"])
