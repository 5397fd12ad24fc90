"""``fastdiff interpolate``: pairs, levels and labels as asked for, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.checkpoints.checkpoint import load
from fastdiff.cli import main
from fastdiff.images import load_samples_npz, save_samples_npz, to_float, to_uint8
from fastdiff.sampling.interpolation import encode, lerp, slerp, through_noise
from fastdiff.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six in a file, of the network's three classes, and two as PNGs."""
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        Image.fromarray(array[i, :, :, 0]).save(folder / f"{i}.png")
    return save_samples_npz(folder / "images.npz", array, np.arange(6) % 3, ["ant", "bee", "cat"])


def interpolate(checkpoint, out, *options):
    return main(["interpolate", "--checkpoint", str(checkpoint), "--out", str(out), *options])


def arrays(out):
    with np.load(out / "interpolation.npz") as archive:
        return dict(archive)


def close(found, expected):
    """uint8 (N, H, W, C) and floats (N, C, H, W), but for what another batch rounds otherwise."""
    expected = to_uint8(expected).permute(0, 2, 3, 1).int().numpy()
    return found.shape == expected.shape and np.abs(found - expected).max() <= 1


@pytest.mark.seconds
def test_shared_noise(checkpoint, images, tmp_path, capsys):
    pairs = ["--between", "0", "4", "--between", "2", "3"]
    options = ["--t", "0,60,100", "--columns", "3", "--steps", "4", "--seed", "5", "--scale", "1"]
    assert interpolate(checkpoint, tmp_path / "out", "--data", str(images), *pairs, *options) == 0
    printed = capsys.readouterr().out
    assert "t = 60: the nearest of 4 steps is t = 67" in printed
    found, real = arrays(tmp_path / "out"), np.load(images)["arr_0"]
    assert found["pair"].tolist() == [0] * 9 + [1] * 9
    assert found["t"].tolist() == [0, 0, 0, 67, 67, 67, 100, 100, 100] * 2
    assert found["weight"].tolist() == [0, 0.5, 1] * 6
    assert np.array_equal(found["ends"], real[[[0, 4], [2, 3]]])

    loaded = load(checkpoint)
    sampler = Sampler(loaded.model, loaded.diffusion, steps=4)
    x = to_float(torch.from_numpy(real).permute(0, 3, 1, 2))
    for pair, (one, other) in enumerate([(0, 4), (2, 3)]):
        mixed = lerp(x[one], x[other], torch.tensor([0, 0.5, 1]))
        labels = {"y": torch.tensor([one, one, other]) % 3}  # the nearer image's
        for row, steps in enumerate([0, 3, 4]):
            expected = through_noise(
                sampler, mixed, steps, seed=5, number=pair, model_kwargs=labels
            )
            start = 9 * pair + 3 * row
            assert close(found["arr_0"][start : start + 3], expected)
    for pair, (one, other) in enumerate([(0, 4), (2, 3)]):  # without a step nothing is lost
        assert np.array_equal(found["arr_0"][9 * pair], real[one])
        assert np.array_equal(found["arr_0"][9 * pair + 2], real[other])

    picture = np.asarray(Image.open(tmp_path / "out" / "interpolation.png"))
    assert picture.shape == (6 * 10 + 2, 5 * 10 + 2)  # between its ends
    assert np.array_equal(picture[2:10, 2:10], real[0, :, :, 0])
    assert np.array_equal(picture[2:10, 22:30], found["arr_0"][1, :, :, 0])
    assert np.array_equal(picture[-10:-2, -10:-2], real[3, :, :, 0])
    assert load_samples_npz(tmp_path / "out" / "interpolation.npz")[0].shape == (18, 8, 8, 1)


@pytest.mark.seconds
def test_ddim_between_image_files(checkpoint, images, tmp_path, capsys):
    files = [str(images.parent / f"{i}.png") for i in range(2)]
    options = ["--mode", "ddim", "--classes", "bee,0", "--columns", "4", "--steps", "20"]
    assert interpolate(checkpoint, tmp_path / "out", "--between", *files, *options) == 0
    found = arrays(tmp_path / "out")
    assert found["t"].tolist() == [100] * 4 and found["pair"].tolist() == [0] * 4

    loaded = load(checkpoint)
    sampler = Sampler(loaded.model, loaded.diffusion, steps=20, method="ddim")
    real = np.load(images)["arr_0"][:2]
    assert np.array_equal(found["ends"], real[None])
    x = to_float(torch.from_numpy(real).permute(0, 3, 1, 2))
    latents = encode(sampler, x, {"y": torch.tensor([1, 0])})
    mixed = slerp(*latents, torch.linspace(0, 1, 4))
    labels = {"y": torch.tensor([1, 1, 0, 0])}
    decoded = sampler.sample(mixed.shape, noise=mixed, model_kwargs=labels)
    assert close(found["arr_0"], decoded)
    errors = (decoded[[0, -1]] - x).square().mean(dim=(1, 2, 3)).sqrt() * 127.5
    assert "   0    100   {:.2f}  {:.2f}".format(*errors) in capsys.readouterr().out


@pytest.mark.seconds
def test_the_method_that_is_named_encodes_and_decodes(checkpoint, images, tmp_path):
    options = ["--data", str(images), "--between", "0", "3", "--mode", "ddim", "--columns", "3"]
    given = [*options, "--steps", "10", "--method", "unipc", "--method-option", "order=2"]
    assert interpolate(checkpoint, tmp_path / "out", *given) == 0
    found, loaded = arrays(tmp_path / "out"), load(checkpoint)
    sampler = Sampler(loaded.model, loaded.diffusion, steps=10, method="unipc")
    sampler.configure(method_options={"order": 2})
    real = np.load(images)
    x = to_float(torch.from_numpy(real["arr_0"][[0, 3]]).permute(0, 3, 1, 2))
    labels = torch.from_numpy(real["arr_1"][[0, 3]]).long()
    mixed = slerp(*encode(sampler, x, {"y": labels}), torch.linspace(0, 1, 3))
    labels = {"y": labels[[0, 1, 1]]}
    assert close(found["arr_0"], sampler.sample(mixed.shape, noise=mixed, model_kwargs=labels))


def test_bad_input(checkpoint, images, tmp_path, capsys):
    pictures = [str(images.parent / f"{i}.png") for i in range(2)]
    data, two = ["--data", str(images)], ["--between", "0", "1"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    four = save_samples_npz(tmp_path / "four.npz", np.zeros((4, 8, 8, 1), np.uint8), np.arange(4))
    for options, message in [
        ([*data, "--between", "0"], "--between 0: 1 image; expected two"),
        ([*data, "--between", "0", "1", "2"], "--between 0 1 2: 3 images; expected two"),
        ([*data, "--between", "0", "6"], "'6' is no image of --data; expected numbers 0 … 5"),
        ([*data, "--between", *pictures], "(image files are given without --data)"),
        ([*two, "--classes", "0"], "no file '0'; give --data too for images by their numbers"),
        (["--between", *pictures], "the network has 3 classes: give --classes"),
        ([*data, *two, "--classes", "0,1,2"], "3 classes; expected one for all images, or two"),
        ([*data, *two, "--t", "0,101"], "'101'; expected numbers 0 … 100"),
        ([*data, *two, "--t", "half"], "'half'; expected numbers 0 … 100"),
        ([*data, *two, "--t", "5", "--mode", "ddim"], "--t is of --mode shared-noise"),
        ([*data, *two, "--method", "ddpm", "--mode", "ddim"], "method 'ddpm' draws noise here"),
        ([*data, *two, "--method-option", "order=2"], "order"),
        ([*data, *two, "--columns", "1"], "--columns is 1; expected 2 or more"),
        ([*data, *two, "--seed", "-1"], "--seed is -1"),
        ([*data, *two, "--scale", "0"], "--scale is 0"),
        (["--data", str(four), *two], "has 4 classes"),
        ([*data, *two, "--out", str(tmp_path / "mine")], "is not empty"),
    ]:
        assert interpolate(checkpoint, tmp_path / "out", "--steps", "2", *options) == 2, options
        error = capsys.readouterr().err
        assert error.startswith("fastdiff interpolate: error: ") and error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "out").exists()


def test_images_of_another_shape_than_the_network_s(checkpoint, images, tmp_path, capsys):
    loaded = load(checkpoint)
    loaded.info["image_size"] = [8, 6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.commands.checkpoint_options.load", lambda *a, **k: loaded)
        for between in (["0", "1", "--data", str(images)], [str(images.parent / "0.png")] * 2):
            options = ["--between", *between, "--classes", "0"]
            assert interpolate(checkpoint, tmp_path / "out", *options) == 2
            assert "(1, 8, 8); the network was trained with (1, 8, 6)" in capsys.readouterr().err
