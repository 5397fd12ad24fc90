"""Fréchet distances while a run trains, and the best weights that are kept by them."""

import json

import pytest
import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.run_directory import identify
from fastdiff.errors import InputError
from fastdiff.evaluation.features import FeatureNetwork
from fastdiff.training import scores
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
