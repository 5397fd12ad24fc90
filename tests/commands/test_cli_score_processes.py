"""``fastdiff nll`` and its like in several processes: one's figures, one report, one error."""

import json
import re

import numpy as np
import pytest

from fastdiff.cli import main
from fastdiff.images import save_samples_npz
from parts_tools import files, save_network


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Of three classes that can be told apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    array = (rng.integers(0, 90, (90, 8, 8, 1)) + 80 * labels[:, None, None, None]).astype(np.uint8)
    folder = tmp_path_factory.mktemp("images")
    return save_samples_npz(folder / "real.npz", array, labels, ["ant", "bee", "cat"])


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    array = np.random.default_rng(1).integers(0, 256, (600, 8, 8, 1), np.uint8)
    return save_samples_npz(tmp_path_factory.mktemp("fakes") / "fake.npz", array)


def nll(checkpoint, images, out, *options):
    places = ["--checkpoint", str(checkpoint), "--data", str(images), "--out", str(out)]
    small = ["--num", "11", "--batch-size", "2", "--respacing", "4", "--device", "cpu"]
    return ["nll", *places, *small, *options]


def evaluate(fakes, images, out, *options):
    places = ["--samples", str(fakes), "--data", str(images), "--out", str(out)]
    return ["evaluate", *places, "--classifier-steps", "8", "--device", "cpu", *options]


def only_line(log):
    (line,) = [line for line in log.splitlines() if ": error: " in line]
    return line.partition(": error: ")[2]


@pytest.mark.parametrize("count", [2, 4])
def test_nll_of_processes_is_that_of_one(checkpoint, images, start, tmp_path, count):
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    assert main(nll(checkpoint, images, alone)) == 0
    codes, log = start(count, nll(checkpoint, images, shared)).finish()
    assert codes == [0] * count, log
    assert json.loads(shared.read_text()) == json.loads(alone.read_text())
    assert log.count("11 images: ") == 1 and log.count("90 images") == 1
    share = -(-6 // count) * 4  # steps of the first process, the only one with a bar
    assert f"{share}/{share}" in log and len(re.findall("scoring: +0%", log)) == 1


@pytest.mark.long
def test_rates_and_distortions_of_processes_are_those_of_one(checkpoint, images, start, tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--pictures", "3"]
    _, *rest = nll(checkpoint, images, tmp_path / "alone", *options)
    assert main(["rate-distortion", *rest]) == 0
    _, *rest = nll(checkpoint, images, tmp_path / "shared", *options)
    codes, log = start(2, ["rate-distortion", *rest]).finish()
    assert codes == [0, 0], log
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
    assert log.count("11 images: ") == 1


def test_more_processes_than_batches_to_score(checkpoint, images, start, tmp_path):
    out = tmp_path / "nll.json"
    codes, log = start(3, nll(checkpoint, images, out, "--num", "1")).finish()
    assert codes == [0] * 3, log
    assert json.loads(out.read_text())["bits_per_dim"]["count"] == 1


@pytest.mark.seconds
def test_evaluation_by_processes_is_that_of_one(fakes, images, start, tmp_path):
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    assert main(evaluate(fakes, images, alone)) == 0
    codes, log = start(3, evaluate(fakes, images, shared)).finish()
    assert codes == [0] * 3, log
    found = json.loads(shared.read_text())
    assert found == json.loads(alone.read_text()) and found["classifier"]["members"] == 4
    assert log.count("600 samples of 8x8x1") == 1 and log.count("90 images") == 1


@pytest.mark.seconds
def test_evaluation_without_a_classifier(fakes, tmp_path, start):
    plain = np.random.default_rng(2).integers(0, 256, (7, 8, 8, 1), np.uint8)
    data = save_samples_npz(tmp_path / "plain.npz", plain)
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    assert main(evaluate(fakes, data, alone)) == 0
    codes, log = start(3, evaluate(fakes, data, shared)).finish()
    assert codes == [0] * 3, log
    assert json.loads(shared.read_text()) == json.loads(alone.read_text())


def test_what_cannot_be_scored_is_said_once(checkpoint, images, fakes, start, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    large = save_samples_npz(tmp_path / "large.npz", np.zeros((5, 9, 9, 1), np.uint8))
    for argv, message in [
        (nll(checkpoint, tmp_path / "none", tmp_path / "o"), "no data at"),
        (nll(checkpoint, images, mine), "is there already and no report of this command"),
        (evaluate(fakes, images, mine), "is there already and no report of this command"),
        (evaluate(large, images, tmp_path / "o"), "the samples are 9x9"),
    ]:
        codes, log = start(2, argv).finish()
        assert codes == [2, 2] and message in only_line(log), log
    assert mine.read_text() == "{}" and not (tmp_path / "o").exists()


def test_processes_that_score_different_networks(checkpoint, images, start, tmp_path):
    other = save_network(tmp_path / "other", seed=1)
    each = [nll(path, images, tmp_path / "nll.json") for path in (checkpoint, other)]
    codes, log = start(2, each).finish()
    assert codes == [2, 2] and "the ranks disagree: the checkpoint is " in only_line(log)


def test_a_network_gone_nan_is_said_once(images, start, tmp_path):
    broken = save_network(tmp_path / "broken", seed=0, spoiled=True)
    codes, log = start(2, nll(broken, images, tmp_path / "nll.json")).finish()
    assert codes == [2, 2] and "the network's output is not finite" in only_line(log)
    assert not (tmp_path / "nll.json").exists()


@pytest.mark.seconds
def test_papers_scores_of_processes_are_those_of_one(start, tmp_path):
    rng = np.random.default_rng(2)
    places = []
    for name in ("fake", "real"):
        pixels = rng.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
        places.append(save_samples_npz(tmp_path / f"{name}.npz", pixels))
    words = ["--samples", str(places[0]), "--data", str(places[1]), "--metrics", "fid,is,kid,prc"]
    words += ["--features", "efficientnet-lite0", "--device", "cpu", "--out"]
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    assert main(["evaluate", *words, str(alone)]) == 0
    codes, log = start(2, ["evaluate", *words, str(shared)]).finish()
    assert codes == [0, 0], log
    expected, found = (json.loads(path.read_text()) for path in (alone, shared))
    for name in ("fid", "inception_score", "kid", "precision", "recall", "density", "coverage"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
