"""``fastdiff evaluate`` from the command line."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

from fastdiff.commands import evaluate
from fastdiff.data import load_dataset
from fastdiff.errors import InputError
from fastdiff.evaluation import scores
from fastdiff.evaluation.features import NETWORKS
from fastdiff.images import save_samples_npz
from score_tools import NAME, Pixels


def run(*arguments):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return evaluate.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.seconds
def test_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scores, "DRAWS", 10)
    data = load_dataset("digits", class_cond=True)
    images = data.images[:300].permute(0, 2, 3, 1).numpy()
    samples = save_samples_npz(tmp_path, images, data.labels[:300])
    out = tmp_path / "scores" / "evaluation.json"
    code = run(
        "--samples", samples, "--data", "digits", "--classifier-steps", 50, "--device", "cpu",
        "--out", out,
    )  # fmt: skip
    assert code == 0
    report = json.loads(out.read_text())
    assert report["samples"] == {"count": 300, "shape": [8, 8, 1], "file": str(samples)}
    assert report["real"]["data"] == "digits"
    assert report["label_agreement"] > 0.9 and report["nearest"]["copies"] == 300
    printed = capsys.readouterr().out
    for line in ("mean confidence", "Fréchet distance", "nearest real image", "copies 300"):
        assert line in printed


@pytest.mark.seconds
def test_a_folder_resized_to_the_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scores, "DRAWS", 10)
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(0, 256, (20 + i, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    samples = save_samples_npz(tmp_path / "s.npz", rng.integers(0, 256, (6, 8, 8, 3), np.uint8))
    assert run("--samples", samples, "--data", tmp_path, "--image-size", 8) == 0
    assert "no classifier: the data have no labels" in capsys.readouterr().out
    with pytest.raises(InputError, match="mixed sizes"):
        run("--samples", samples, "--data", tmp_path)


def test_bad_input(tmp_path):
    small = save_samples_npz(tmp_path / "small.npz", np.zeros((3, 4, 4, 1), np.uint8))
    cases = [
        (("--samples", tmp_path / "none.npz", "--data", "digits"), "no file"),
        (("--samples", small, "--data", tmp_path / "none"), "no data at"),
        (("--samples", small, "--data", "digits"), "samples are 4x4"),
        (("--samples", small, "--data", "digits", "--seed", -1), "--seed"),
        (("--samples", small, "--data", "digits", "--num", 0), "--num must be positive"),
        (("--samples", small, "--data", "digits", "--device", "abacus"), "no device 'abacus'"),
        (("--samples", small, "--data", "digits", "--classifier-steps", 0), "--classifier-steps"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            run(*arguments)


# The scores of papers


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", rng.integers(0, 256, (30, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "fake.npz", rng.integers(0, 256, (20, 8, 8, 3), np.uint8))
    return tmp_path


LITE = ("--features", "efficientnet-lite0", "--device", "cpu")


def test_scores_of_papers(pictures, capsys, monkeypatch):
    monkeypatch.setitem(NETWORKS, NAME, lambda weights, resize: Pixels())
    both = ("--samples", pictures / "fake.npz", "--data", pictures / "real.npz")
    kept = ("--features-dir", pictures / "kept", "--write-reference", pictures / "ref.npz")
    out = pictures / "scores.json"
    assert run(*both, "--metrics", "fid,sfid,is,kid,prc", *LITE, *kept, "--out", out) == 0
    scores = json.loads(out.read_text())
    assert (scores["samples"], scores["real"], scores["published"]) == (20, 30, False)
    assert (scores["rounding"], scores["resizing"]) == ("none, given as bytes", "none")
    printed = capsys.readouterr().out
    for words in ("FID", "Inception score", "KID", "coverage", "pixels is not the network of the"):
        assert words in printed

    reference = ("--reference", pictures / "ref.npz", "--metrics", "fid,sfid", *LITE)
    assert run("--samples", pictures / "fake.npz", *reference, "--out", out) == 0
    again = json.loads(out.read_text())
    assert run(*both, "--num", 10, "--metrics", "is", *LITE) == 0
    assert "20 samples against 10 real images" in capsys.readouterr().out
    assert again["fid"] == scores["fid"] and again["sfid"] == scores["sfid"]
    assert again["real"] is None


def test_few_samples_are_said(pictures, capsys, monkeypatch):
    monkeypatch.setitem(NETWORKS, NAME, lambda weights, resize: Pixels())
    few = save_samples_npz(pictures / "few.npz", np.load(pictures / "fake.npz")["arr_0"][:9])
    run("--samples", few, "--data", pictures / "real.npz", "--metrics", "fid", *LITE)
    note = (
        "9 samples for 12 features: their covariance lacks rank, and a Fréchet distance comes out"
    )
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("deep", [np.float32, np.float64, np.uint16])
def test_how_samples_became_bytes_is_chosen_and_said(pictures, monkeypatch, deep):
    monkeypatch.setitem(NETWORKS, NAME, lambda weights, resize: Pixels())
    levels = np.load(pictures / "fake.npz")["arr_0"] + 0.7  # of 255, above a byte
    levels = levels.clip(0, 255)
    given = levels * 257 if deep == np.uint16 else levels / 127.5 - 1
    np.savez(pictures / "deep.npz", given.astype(deep))
    np.savez(pictures / "nearest.npz", levels.round().astype(np.uint8))
    np.savez(pictures / "truncate.npz", levels.astype(np.uint8))

    def scores(samples, *flags):
        arguments = ("--samples", pictures / f"{samples}.npz", "--data", pictures / "real.npz")
        out = pictures / "out.json"
        assert run(*arguments, "--metrics", "fid", *LITE, "--out", out, *flags) == 0
        return json.loads(out.read_text())

    for rounding, flags in (("nearest", ()), ("truncate", ("--truncate",))):
        found = scores("deep", *flags)
        assert found["rounding"] == rounding and found["fid"] == scores(rounding)["fid"]
    with pytest.raises(InputError, match="is uint8 already: --truncate goes with uint16 and flo"):
        scores("nearest", "--truncate")
    np.savez(pictures / "deep.npz", levels.astype(np.float32))
    with pytest.raises(InputError, match=r"expected floats in \[-1, 1\].*its values run from"):
        scores("deep")


def test_flags_of_scores_that_do_not_fit(pictures):
    samples = ("--samples", pictures / "fake.npz")
    data = ("--data", pictures / "real.npz")
    cases = [
        (samples, "give the real images by --data, or with --metrics their --reference"),
        ((*samples, *data, "--metrics", "fid", "--reference", "r.npz"), "give the real images by"),
        ((*samples, *data, "--features-dir", "x"), "--features-dir goes with --metrics"),
        ((*samples, *data, "--k", 2), "--k goes with --metrics"),
        ((*samples, *data, "--truncate"), "--truncate goes with --metrics"),
        ((*samples, *data, "--resize", "own"), "--resize goes with --metrics"),
        (
            (*samples, *data, "--metrics", "fid", "--classifier-steps", 5),
            "--classifier-steps goes without --metrics",
        ),
        ((*samples, *data, "--metrics", ","), "--metrics names none: expected some of fid"),
        ((*samples, *data, "--metrics", "fid", "--k", 0, *LITE), "--k must be positive"),
        ((*samples, *data, "--metrics", "fid,blur", *LITE), "metric 'blur': expected some of fid"),
        ((*samples, *data, "--metrics", "fid"), "--features inception needs its weights"),
        (
            (*samples, "--metrics", "fid", "--reference", pictures / "real.npz", *LITE),
            "holds no moments .mu and sigma, mu_s and sigma_s.; give images to --data",
        ),
        (
            (*samples, "--metrics", "fid", "--reference", pictures / "none.npz", *LITE),
            "no file '.*none.npz'",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            run(*arguments)
