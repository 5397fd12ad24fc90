"""``fastdiff rate-distortion``: its table is nll's, its pictures are what the table is about."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastdiff.checkpoints.checkpoint import load, save
from fastdiff.cli import main
from fastdiff.images import save_samples_npz, to_uint8
from fastdiff.models.unet import UNet
from fastdiff.process.gaussian import create_diffusion
from fastdiff.sampling.sampler import Sampler

STEPS = 5


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A class-conditional one that learns its variance."""
    torch.manual_seed(0)
    model = UNet(1, 32, 2, 1, (), channel_mult=(1, 1), num_classes=3, image_size=8)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    diffusion = create_diffusion(steps=40, noise_schedule="cosine", learn_sigma=True)
    info = {"image_size": [8, 8]}
    return save(tmp_path_factory.mktemp("network") / "ckpt", model, diffusion=diffusion, info=info)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    return save_samples_npz(path, array, np.arange(6) % 3)


def scored(name, network, images, out, *options):
    places = ["--checkpoint", str(network), "--data", str(images), "--out", str(out)]
    return main([name, *places, "--steps", str(STEPS), "--seed", "3", *options])


def tiles(path, columns):
    """The images of a picture, (rows, columns, 8, 8), of an unknown enlargement."""
    pixels = np.asarray(Image.open(path))
    pitch = (pixels.shape[1] - 2) // columns
    scale = (pitch - 2) // 8
    rows = (len(pixels) - 2) // pitch
    starts = 2 + pitch * np.arange(max(rows, columns))
    return np.stack(
        [
            [pixels[y : y + pitch - 2 : scale, x : x + pitch - 2 : scale] for x in starts[:columns]]
            for y in starts[:rows]
        ]
    )


@pytest.mark.seconds
def test_the_table_is_that_of_nll_and_the_pictures_are_of_its_rows(
    network, images, tmp_path, capsys
):
    out = tmp_path / "new" / "rd"
    assert scored("rate-distortion", network, images, out, "--batch-size", "4") == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "rate_distortion.json").read_text())
    assert scored("nll", network, images, tmp_path / "nll.json", "--batch-size", "4") == 0
    assert report == json.loads((tmp_path / "nll.json").read_text())

    parts, table = report["bits_per_dim"], report["rate_distortion"]
    assert table["timestep"] == [*report["steps"]["timestep"][::-1], -1] == [39, 29, 20, 10, 0, -1]
    assert table["rate"][-1] == pytest.approx(parts["total"])
    assert table["rate"][-2] == pytest.approx(parts["prior"] + parts["rate"])
    with (out / "rate_distortion.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["timestep", "rate_bits_per_dim", "distortion_rmse"]
    assert [[float(value) for value in row] for row in rows] == [
        list(row) for row in zip(*table.values(), strict=True)
    ]
    for figure in (parts["total"], table["rate"][-2], parts["decoder"], table["rate"][2]):
        assert f"{figure:.4f}" in printed
    for file in sorted(out.iterdir()):
        assert str(file) in printed and file.stat().st_size > 100
    assert len(list(out.iterdir())) == 5

    progress = tiles(out / "progressive_data.png", STEPS + 1).astype(float)
    assert np.array_equal(progress[:, -1], np.load(images)["arr_0"][..., 0])
    missed = progress[:, :-1] - progress[:, -1:]
    rmse = np.sqrt((missed**2).mean(axis=(0, 2, 3)))
    assert rmse == pytest.approx(table["distortion"][:-1], abs=0.05)  # but for the rounding

    loaded = load(network)
    labels = {"y": torch.arange(6) % 3}
    sampler = Sampler(loaded.model, loaded.diffusion, steps=STEPS)
    steps = list(sampler.iterate((6, 1, 8, 8), seed=3, model_kwargs=labels))
    expected = torch.stack([to_uint8(step["pred_xstart"])[:, 0] for step in steps], dim=1)
    assert np.array_equal(tiles(out / "progressive_samples.png", STEPS), expected.numpy())


@pytest.mark.seconds
def test_without_pictures(network, images, tmp_path):
    options = ["--num", "1", "--pictures", "0"]
    assert scored("rate-distortion", network, images, tmp_path / "rd", *options) == 0
    names = {path.name for path in (tmp_path / "rd").iterdir()}
    assert names == {f"rate_distortion.{kind}" for kind in ("csv", "json", "png")}


def test_bad_input(network, images, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    four = save_samples_npz(tmp_path / "four.npz", np.zeros((4, 8, 8, 1), np.uint8), np.arange(4))
    for data, out, options, message in [
        (images, tmp_path / "mine", [], "is not empty: choose another directory"),
        (images, tmp_path / "rd", ["--pictures", "-1"], "--pictures is -1; expected 0 or more"),
        (images, tmp_path / "rd", ["--steps", "41"], "41"),
        (four, tmp_path / "rd", [], "has 4 classes; the network was trained with 3"),
    ]:
        assert scored("rate-distortion", network, data, out, *options) == 2
        error = capsys.readouterr().err
        assert error.startswith("fastdiff rate-distortion: error: ") and error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "rd").exists()
