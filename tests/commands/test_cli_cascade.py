"""``fastdiff sample --cascade`` and ``--low-res``: from training to pictures, and refusals."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff.checkpoints.checkpoint import load, save
from fastdiff.cli import main
from fastdiff.data import load_dataset
from fastdiff.images import load_samples_npz, read_samples, save_samples_npz
from fastdiff.models.encoder_unet import EncoderUNet
from fastdiff.models.unet import UNet
from fastdiff.process.classification import NoisyClassification
from fastdiff.process.gaussian import create_diffusion

NAMES = ["ant", "bee", "cat"]
DRAW = ["--num", "4", "--steps", "3", "--no-pngs", "--device", "cpu"]


def awaken(model):
    """The last layer starts at zero."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def network(folder, *, size, classes=3, names=NAMES, upsample_from=0, cond_noise=0.0, channels=1):
    torch.manual_seed(size)
    model = UNet(
        channels, 32, channels, 1, (), channel_mult=(1,), num_classes=classes, image_size=size,
        super_res=bool(upsample_from), noise_cond=bool(cond_noise), use_scale_shift_norm=True,
    )  # fmt: skip
    awaken(model)
    info = {"image_size": [size, size], "upsample_from": upsample_from, "cond_noise": cond_noise}
    info = {name: value for name, value in info.items() if value}
    if names is not None and classes:
        info["class_names"] = names
    diffusion = create_diffusion(steps=50, noise_schedule="cosine")
    return str(save(folder, model, diffusion=diffusion, info=info))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """4 → 8 → 16 pixels; the last was trained with noise, and has no classes."""
    folder = tmp_path_factory.mktemp("networks")
    base = network(folder / "base", size=4)
    up = network(folder / "up", size=8, upsample_from=4)
    last = network(folder / "last", size=16, classes=None, upsample_from=8, cond_noise=0.5)
    return base, up, last


def classifier(folder):
    """Of what the first network draws."""
    torch.manual_seed(0)
    model = EncoderUNet(4, 1, 32, 3, 1, (), channel_mult=(1,), pool="spatial")
    awaken(model)
    process = NoisyClassification(create_diffusion(steps=50, noise_schedule="cosine"))
    info = {"image_size": [4, 4], "channels": 1, "num_classes": 3, "class_names": NAMES}
    return str(save(folder, model, diffusion=process, info=info))


def sample(out, *options):
    return main(["sample", "--out", str(out), *options])


def drawn(folder):
    (file,) = folder.glob("samples_*.npz")
    return file, *load_samples_npz(file)


@pytest.mark.seconds
def test_a_cascade_is_its_networks_one_after_the_other(checkpoints, tmp_path, capsys):
    options = [*DRAW[:2], *DRAW[4:], "--batch-size", "3", "--seed", "5", "--cond-noise", "0/0.2"]
    cascade = ["--cascade", ",".join(checkpoints), "--steps", "3/2/4", "--trajectory", "1"]
    cascade += ["--trajectory-of", "x0"]
    guide = ["--classifier", classifier(tmp_path / "classifier"), "--classifier-scale", "5"]
    assert sample(tmp_path / "all", *options, *cascade, *guide) == 0
    printed = capsys.readouterr().out
    assert "4 images, 3 + 2 + 4 steps each" in printed
    assert all(path in printed for path in checkpoints)
    _, images, labels = drawn(tmp_path / "all")
    assert images.shape == (4, 16, 16, 1) and labels.tolist() == [0, 1, 2, 0]
    assert (tmp_path / "all" / "trajectory_x0.png").exists()

    sample(tmp_path / "unguided", *options, *cascade)
    assert not np.array_equal(drawn(tmp_path / "unguided")[1], images)

    small = guide  # of the first network alone
    for i, (path, steps) in enumerate(zip(checkpoints, "324", strict=True)):
        alone = ["--num", "4", "--steps", steps, "--no-pngs", "--seed", "5", "--batch-size", "3"]
        alone += ["--cond-noise", "0.2"] if i == 2 else []
        sample(tmp_path / str(i), "--checkpoint", path, *alone, *small, "--device", "cpu")
        file, last, _ = drawn(tmp_path / str(i))
        small = ["--low-res", str(file)]
    assert np.array_equal(last, images)


@pytest.mark.seconds
def test_image_i_is_the_same_in_any_batch_and_run(checkpoints, tmp_path):
    cascade = ["--cascade", ",".join(checkpoints[:2]), "--steps", "3", "--no-pngs", "--seed", "1"]
    sample(tmp_path / "whole", *cascade, "--num", "5")
    sample(tmp_path / "parts", *cascade, "--num", "3", "--first-sample", "2", "--batch-size", "2")
    whole, parts = drawn(tmp_path / "whole")[1], drawn(tmp_path / "parts")[1]
    assert np.abs(whole[2:].astype(int) - parts).max() <= 1  # a batch of another size rounds so
    assert whole[2:].std() > 5 * np.abs(whole[2:].astype(int) - parts).std()


def test_small_images_say_what_their_enlargements_show(checkpoints, tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "small.npz"
    save_samples_npz(file, rng.integers(0, 256, (3, 4, 4, 1), np.uint8), np.array([2, 0, 2]), NAMES)
    options = ["--checkpoint", checkpoints[1], "--low-res", str(file), "--steps", "2", "--no-pngs"]
    sample(tmp_path / "as they are", *options)
    found = read_samples(drawn(tmp_path / "as they are")[0])
    assert found.labels.tolist() == [2, 0, 2] and found.class_names == NAMES
    sample(tmp_path / "more", *options, "--num", "4")
    again = read_samples(drawn(tmp_path / "more")[0])
    assert again.labels.tolist() == [2, 0, 2, 2]
    assert not np.array_equal(again.images[0], again.images[3])  # the same picture, other noise
    sample(tmp_path / "told", *options, "--classes", "bee")
    assert read_samples(drawn(tmp_path / "told")[0]).labels.tolist() == [1, 1, 1]


def test_other_small_images_are_another_run(checkpoints, tmp_path, capsys):
    """Parts that were drawn of other images are not gone on with."""
    file, out = tmp_path / "small.npz", tmp_path / "out"
    save_samples_npz(file, np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]), NAMES)
    options = ["--checkpoint", checkpoints[1], "--low-res", str(file), "--steps", "2", "--no-pngs"]
    sample(out, *options)
    first = drawn(out)[1]
    save_samples_npz(file, np.full((2, 4, 4, 1), 255, np.uint8), np.array([0, 1]), NAMES)
    sample(out, *options)
    assert "already" not in capsys.readouterr().out
    assert not np.array_equal(drawn(out)[1], first)


@pytest.mark.seconds
def test_from_training_to_a_score(tmp_path, capsys):
    """Base and upsampler trained on the digits, sampled together and scored by commands alone."""
    data = ["--data", "digits", "--device", "cpu", "--quiet", "--no-tensorboard", "--steps", "2"]
    small = ["--model-channels", "32", "--channel-mult", "1", "--num-res-blocks", "1"]
    small += ["--attention-resolutions", "none", "--batch-size", "8", "--class-cond"]
    up = ["--upsample-from", "4", "--cond-noise", "0.5", "--cond-blur", "0.5"]
    assert main(["train", "--out", str(tmp_path / "up"), *data, *small, *up]) == 0
    digits = load_dataset("digits", class_cond=True)
    large = digits.gather(np.arange(100)).numpy()[:, 0]
    halved = large.reshape(-1, 4, 2, 4, 2).mean((2, 4)).astype(np.uint8)[..., None]
    save_samples_npz(tmp_path / "small.npz", halved, digits.labels[:100])
    data[1] = str(tmp_path / "small.npz")
    assert main(["train", "--out", str(tmp_path / "base"), *data, *small]) == 0
    assert load(tmp_path / "up").info["upsample_from"] == 4
    cascade = ["--cascade", f"{tmp_path / 'base'},{tmp_path / 'up'}", "--cond-noise", "0.3"]
    assert sample(tmp_path / "out", *cascade, "--cond-truncated", "--num", "10", *DRAW[2:]) == 0
    file, images, labels = drawn(tmp_path / "out")
    assert images.shape == (10, 8, 8, 1) and sorted(labels.tolist()) == list(range(10))
    report = tmp_path / "report.json"
    options = ["--samples", str(file), "--data", "digits", "--classifier-steps", "2"]
    assert main(["evaluate", *options, "--out", str(report)]) == 0
    assert json.loads(report.read_text())["samples"]["file"] == str(file)


@pytest.mark.parametrize(
    "command",
    ["nll", "rate-distortion --out out", "interpolate --between 1 2 --out out"]
    + ["reproduce ddpm-cifar10 --out out"],
)
def test_what_takes_no_upsampler(command, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--checkpoint", checkpoints[1], "--data", "digits"]) == 2
    error = capsys.readouterr().err.strip()
    assert "up is a super-resolution network, which draws of small images" in error
    assert "\n" not in error and not list(tmp_path.iterdir())


def refusals(base, up, last, folder):
    """Options, and what the line says that refuses them."""
    four = folder / "four.npz"
    colour, wide = folder / "colour.npz", folder / "wide.npz"
    save_samples_npz(four, np.zeros((2, 4, 4, 1), np.uint8))
    save_samples_npz(colour, np.zeros((2, 4, 4, 3), np.uint8))
    save_samples_npz(wide, np.zeros((2, 5, 5, 1), np.uint8))
    silent = network(folder / "silent", size=8, upsample_from=4)
    config = json.loads((folder / "silent" / "config.json").read_text())
    del config["info"]["upsample_from"]
    (folder / "silent" / "config.json").write_text(json.dumps(config))
    five = network(folder / "five", size=8, classes=5, names=None, upsample_from=4)
    other = network(folder / "other", size=8, names=["ant", "cat", "bee"], upsample_from=4)
    plain = network(folder / "plain", size=4, classes=None)
    return [
        (["--cascade", base], "expected two checkpoints or more, the smallest first"),
        (["--cascade", f"{base},"], "expected two checkpoints or more"),
        (["--cascade", f"{base},{last}"], "upsamples images of 8x8, and .*base makes 4x4"),
        (["--cascade", f"{up},{last}"], "up is a super-resolution network: give small images"),
        (["--cascade", f"{base},{plain}"], "plain is no super-resolution network"),
        (["--cascade", f"{base},{five}"], "five has 5 classes, and .*base 3"),
        (["--cascade", f"{plain},{up}"], "up has 3 classes, and .*plain none"),
        (["--cascade", f"{base},{other}"], "have other names than those of .*base, or another"),
        (["--cascade", f"{base},{up}", "--steps", "1/2/3"], "is for 3 networks, there are 2"),
        (["--cascade", f"{base},{up}", "--cond-noise", "0.1"], "trained on clean images alone"),
        (["--cascade", f"{base},{up}", "--cond-noise", "a"], "--cond-noise is 'a'; expected a num"),
        (["--checkpoint", base, "--cond-noise", "0.1"], "small images, which .*base is not given"),
        (["--cascade", f"{base},{up}", "--cond-noise", "0/0"], "is for 2 networks, there are 1"),
        (["--cascade", f"{base},{up}", "--low-res", str(four)], "network alone, by --checkpoint"),
        (["--cascade", f"{base},{up}", "--classifier", up], "up holds no classifier of noisy"),
        (
            ["--checkpoint", up, "--low-res", str(four), "--classifier", base],
            "what draws of noise alone, and .*up is a super-resolution network",
        ),
        (["--checkpoint", up], "super-resolution network: give small images by --low-res"),
        (["--checkpoint", base, "--low-res", str(four)], "base is no super-resolution network"),
        (["--checkpoint", silent, "--low-res", str(four)], "does not say the side of the small"),
        (["--checkpoint", up, "--low-res", str(four)], "has 3 classes: give --classes"),
        (["--checkpoint", up, "--low-res", str(colour)], "3-channel images of 4x4; .*1-channel"),
        (["--checkpoint", up, "--low-res", str(wide)], "images of 5x5; .* ones of 4x4"),
        (["--checkpoint", last, "--low-res", str(four), "--cond-noise", "0.7"], "of 4x4; .* 8x8"),
    ]


@pytest.mark.seconds
def test_what_does_not_fit_is_one_line(checkpoints, tmp_path, capsys):
    cases = refusals(*checkpoints, tmp_path)
    for options, message in cases:
        capsys.readouterr()
        assert sample(tmp_path / "out", *options) == 2, options
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and error.startswith("fastdiff sample: error: ")
        assert re.search(message, error), error
