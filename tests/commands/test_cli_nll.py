import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff.checkpoints.checkpoint import load, save
from fastdiff.cli import main
from fastdiff.images import save_samples_npz, to_float
from fastdiff.models.unet import UNet
from fastdiff.ops.counters import sampling_step
from fastdiff.ops.normal import normal
from fastdiff.process.gaussian import create_diffusion
from fastdiff.process.likelihood import summarize_bpd
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas


def unet(**options):
    torch.manual_seed(0)
    arguments = {
        "in_channels": 1,
        "model_channels": 32,
        "out_channels": 2,
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "channel_mult": (1, 1),
    }
    model = UNet(**arguments | options)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def process(**options):
    return create_diffusion(steps=12, noise_schedule="cosine", learn_sigma=True, **options)


INFO = {"image_size": [8, 8], "channels": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("nll") / "ckpt", unet(), diffusion=process(), info=INFO)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images in a file, with labels."""
    array = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    return save_samples_npz(path, array, np.arange(10) % 3)


def nll(checkpoint, data, *options):
    return main(["nll", "--checkpoint", str(checkpoint), "--data", str(data), *options])


@pytest.mark.seconds
def test_the_figures_and_where_they_go(checkpoint, images, tmp_path, capsys):
    out = tmp_path / "deep" / "nll.json"
    assert nll(checkpoint, images, "--batch-size", "4", "--seed", "5", "--out", str(out)) == 0
    printed = capsys.readouterr()
    report = json.loads(out.read_text())

    loaded = load(checkpoint)
    x_start = to_float(torch.from_numpy(np.load(images)["arr_0"]).permute(0, 3, 1, 2))
    terms = loaded.diffusion.calc_bpd_loop(
        loaded.model,
        x_start,
        noise=lambda t: normal(x_start.shape, seed=5, step=sampling_step(t)),
    )
    summary = summarize_bpd(terms)
    for name in ("count", "total", "total_stderr", "prior", "rate", "decoder", "decoder_stderr"):
        assert report["bits_per_dim"][name] == pytest.approx(getattr(summary, name), rel=1e-4)
    parts = report["bits_per_dim"]
    assert parts["total"] == pytest.approx(parts["prior"] + parts["rate"] + parts["decoder"])
    assert report["steps"]["timestep"] == list(range(12))
    for name in ("vb", "xstart_mse", "mse"):
        assert report["steps"][name] == pytest.approx(getattr(summary, name).tolist(), rel=1e-3)
    table = report["rate_distortion"]
    assert len(table["rate"]) == len(table["distortion"]) == 13
    assert table["rate"][-1] == pytest.approx(parts["total"]) and table["distortion"][-1] == 0

    text = f"10 images: {summary.total:.4f} ± {summary.total_stderr:.4f} bits/dim"
    assert text[:-12] in printed.out
    assert str(out) in printed.out
    for row in ("0 … 2", "3 … 5", "6 … 8", "9 … 11"):  # by quartile
        assert row in printed.out
    assert "36/36" in printed.err  # three batches of twelve steps


@pytest.mark.seconds
def test_batches_do_not_change_the_figures(checkpoint, images, tmp_path):
    totals = []
    for size in ("1", "7", "64"):
        out = tmp_path / f"{size}.json"
        assert nll(checkpoint, images, "--batch-size", size, "--out", str(out)) == 0
        totals.append(json.loads(out.read_text())["bits_per_dim"]["total"])
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-5)


def test_num_takes_evenly_spaced_images(checkpoint, images, tmp_path):
    chosen = np.load(images)["arr_0"][[0, 4, 9]]
    three = save_samples_npz(tmp_path / "three.npz", chosen)
    totals = []
    for data, options in ((images, ["--num", "3"]), (three, [])):
        assert nll(checkpoint, data, *options, "--out", str(tmp_path / "nll.json")) == 0
        totals.append(json.loads((tmp_path / "nll.json").read_text())["bits_per_dim"])
    assert totals[0] == totals[1] and totals[0]["count"] == 3


def test_one_image_has_no_standard_error(checkpoint, images, tmp_path, capsys):
    out = tmp_path / "nll.json"
    assert nll(checkpoint, images, "--num", "1", "--out", str(out)) == 0
    report = json.loads(out.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert report["bits_per_dim"]["total_stderr"] is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{images}: 10 images"  # what was found comes first
    (first,) = [line for line in lines if line.startswith("1 images: ")]
    assert "±" not in first


def test_respacing_scores_the_strided_process(checkpoint, images, tmp_path):
    out = tmp_path / "nll.json"
    options = ["--num", "2", "--respacing", "4", "--out", str(out)]
    assert nll(checkpoint, images, *options) == 0
    report = json.loads(out.read_text())
    assert report["num_timesteps"] == 4
    assert report["steps"]["timestep"] == [0, 4, 7, 11]


def test_class_labels_reach_the_network(images, tmp_path):
    model = unet(num_classes=3)
    seen = []
    save(tmp_path / "ckpt", model, diffusion=process(), info={**INFO, "num_classes": 3})
    forward = UNet.forward

    def spy(self, x, timesteps, y=None, low_res=None):
        seen.append(y.tolist())
        return forward(self, x, timesteps, y, low_res)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet, "forward", spy)
        assert nll(tmp_path / "ckpt", images, "--num", "4", "--respacing", "2") == 0
    assert seen == [[0, 0, 0, 0]] * 2  # images 0, 3, 6, 9, by their labels i mod 3


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num", "0"], "--batch-size and --num must be positive"),
        (["--batch-size", "0"], "--batch-size and --num must be positive"),
        (["--seed", "-1"], "--seed not negative"),
        (["--respacing", "13"], "13"),
        (["--respacing", "ddim5"], "no integer stride"),
        (["--weights", "0.9"], "has no weights '0.9'"),
    ],
)
def test_bad_options(checkpoint, images, capsys, options, message):
    assert nll(checkpoint, images, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdiff nll: error: ") and error.count("\n") == 1
    assert message in error


def test_bad_data_and_places(checkpoint, images, tmp_path, capsys):
    assert nll(checkpoint, tmp_path / "nothing") == 2
    assert "no data at" in capsys.readouterr().err
    assert nll(tmp_path, images) == 2
    assert "is not a checkpoint directory" in capsys.readouterr().err
    assert nll(checkpoint, images, "--out", str(tmp_path)) == 2
    assert "is a directory; expected a file" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert nll(checkpoint, images, "--out", str(tmp_path / "file" / "nll.json")) == 2
    assert "cannot write into --out" in capsys.readouterr().err


def test_data_of_another_shape_or_with_other_classes(images, tmp_path, capsys):
    save(tmp_path / "wide", unet(), diffusion=process(), info={"image_size": [8, 6]})
    assert nll(tmp_path / "wide", images) == 2
    assert "(1, 8, 8); the network was trained with (1, 8, 6)" in capsys.readouterr().err
    save(tmp_path / "more", unet(num_classes=4), diffusion=process(), info=INFO)
    assert nll(tmp_path / "more", images) == 2
    assert "has 3 classes; the network was trained with 4" in capsys.readouterr().err


def test_a_network_gone_nan_gives_no_figure(images, tmp_path, capsys):
    model = unet()
    nn.init.constant_(model.out[2].bias, float("nan"))
    save(tmp_path / "ckpt", model, diffusion=process(), info=INFO)
    out = tmp_path / "nll.json"
    assert nll(tmp_path / "ckpt", images, "--num", "1", "--out", str(out)) == 2
    assert "the network's output is not finite" in capsys.readouterr().err
    assert not out.exists()


def test_only_gaussian_diffusion_has_the_bound(images, tmp_path, capsys, monkeypatch):
    save(tmp_path / "ckpt", unet(), diffusion=process(), info=INFO)
    found = load(tmp_path / "ckpt")
    found.diffusion = VarianceExploding(geometric_sigmas(5))
    monkeypatch.setattr("fastdiff.commands.checkpoint_options.load", lambda *a, **k: found)
    assert nll(tmp_path / "ckpt", images) == 2
    assert "has a VarianceExploding process" in capsys.readouterr().err


def test_standard_errors_are_those_of_the_mean(checkpoint, images, tmp_path):
    out = tmp_path / "nll.json"
    assert nll(checkpoint, images, "--batch-size", "1", "--respacing", "3", "--out", str(out)) == 0
    parts = json.loads(out.read_text())["bits_per_dim"]
    loaded = load(checkpoint)
    x_start = to_float(torch.from_numpy(np.load(images)["arr_0"]).permute(0, 3, 1, 2))
    totals = loaded.diffusion.respace(3).calc_bpd_loop(
        loaded.model,
        x_start,
        noise=lambda t: normal(x_start.shape, seed=0, step=sampling_step(t)),
    )["total_bpd"]
    assert parts["total_stderr"] == pytest.approx(totals.std().item() / math.sqrt(10), rel=1e-3)
