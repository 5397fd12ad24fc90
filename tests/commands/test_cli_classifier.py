"""Classifier guidance from the command line: trained, converted, sampled with, and refused."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff import EncoderUNet, NoisyClassification, UNet, create_diffusion, load, save
from fastdiff.cli import main
from fastdiff.images import load_samples_npz

COSINE = {"steps": 20, "noise_schedule": "cosine"}
NAMES = ["ant", "bee", "cat"]


def awake(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def save_network(path, *, size=8, names=NAMES, recipe=COSINE, **changes):
    torch.manual_seed(0)
    arguments = {"in_channels": 1, "out_channels": 1, "model_channels": 32, "num_res_blocks": 1}
    arguments |= {"attention_resolutions": (), "channel_mult": (1,), "image_size": size}
    model = awake(UNet(**{**arguments, **changes}))
    info = {"image_size": [size, size], "channels": model.in_channels}
    if model.num_classes is not None:
        info |= {"num_classes": model.num_classes, "class_names": names}
    return save(path, model, diffusion=create_diffusion(**recipe), info=info)


def save_classifier(path, *, size=8, names=NAMES, recipe=COSINE, channels=1):
    torch.manual_seed(1)
    model = EncoderUNet(size, channels, 32, len(names), 1, (), channel_mult=(1,), pool="spatial")
    info = {"image_size": [size, size], "channels": channels, "class_names": names}
    info["num_classes"] = len(names)
    process = NoisyClassification(create_diffusion(**recipe))
    return save(path, awake(model), diffusion=process, info=info)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    save_network(folder / "network")
    save_classifier(folder / "classifier")
    return folder


def sample(saved, out, *options, network="network"):
    argv = ["--checkpoint", str(saved / network), "--out", str(out), "--device", "cpu"]
    return main(["sample", *argv, "--num", "6", "--steps", "5", "--no-pngs", *options])


def drawn(folder):
    (file,) = folder.glob("*.npz")
    return load_samples_npz(file)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_a_network_without_classes_draws_those_of_the_classifier(saved, tmp_path, capsys, method):
    options = ["--classifier", str(saved / "classifier"), "--method", method]
    images = {}
    for scale in ("0", "1", "20"):
        assert sample(saved, tmp_path / scale, *options, "--classifier-scale", scale) == 0
        images[scale], labels = drawn(tmp_path / scale)
    out = capsys.readouterr().out
    assert f"guided by {saved / 'classifier'}: weights, on cpu" in out
    # Cosine schedules end in next to no signal, of which algorithm 2 makes much.
    warned = "warning: at timestep 19 x_t holds hardly any signal, and --method ddim moves x by"
    assert (warned in out) == (method == "ddim")
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert sample(saved, tmp_path / "plain", "--method", method) == 0
    assert np.array_equal(drawn(tmp_path / "plain")[0], images["0"])
    assert not np.array_equal(images["1"], images["0"])
    classifier = load(saved / "classifier").model

    def log_p(images):
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        return classifier(x, torch.zeros(6)).log_softmax(1)[range(6), labels].mean()

    assert log_p(images["20"]) > log_p(images["0"])


def test_chosen_classes_and_a_network_with_classes(saved, tmp_path):
    save_network(tmp_path / "network", num_classes=3, null_class=True)
    options = ["--classifier", str(saved / "classifier"), "--classes", "cat,0"]
    assert sample(tmp_path, tmp_path / "out", *options, "--guidance-scale", "2") == 0
    assert drawn(tmp_path / "out")[1].tolist() == [2, 0, 2, 0, 2, 0]


def test_images_of_another_scale_are_other_images(saved, tmp_path, capsys):
    options = ["--num", "2", "--classifier", str(saved / "classifier"), "--classifier-scale"]
    for scale, there in (("2", False), ("2", True), ("3", False)):
        assert sample(saved, tmp_path, *options, scale) == 0
        assert ("holds these images already" in capsys.readouterr().out) == there


def one_line(capsys):
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("network", "classifier", "message"),
    [
        ({}, {"size": 16}, "is for images of 16x16, the network of .* for images of 8x8"),
        ({}, {"channels": 3}, "is for 3 channels, the network of .* for 1 channels"),
        ({"num_classes": 4, "names": None}, {}, "is for 3 classes, the network of .* 4 classes"),
        ({"num_classes": 3, "names": ["x", "y", "z"]}, {}, "is for the classes .*'ant'.*'x'"),
        ({"recipe": {**COSINE, "steps": 40}}, {}, "for a process of 20 steps, .* of 40 steps"),
        (
            {"recipe": {"steps": 100, "noise_schedule": "linear"}},
            {"recipe": {"steps": 100, "noise_schedule": "cosine"}},
            "is for other noise levels, the network of .* for its own: train one for them",
        ),
        ({"recipe": {**COSINE, "rescale_timesteps": True}}, {}, "is for other timesteps"),
    ],
)
def test_refuses_a_classifier_of_something_else(tmp_path, capsys, network, classifier, message):
    save_network(tmp_path / "network", **network)
    save_classifier(tmp_path / "classifier", **classifier)
    assert sample(tmp_path, tmp_path / "out", "--classifier", str(tmp_path / "classifier")) == 2
    line = one_line(capsys)
    assert line.startswith("fastdiff sample: error: --classifier ")
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classifier-scale", "2"], "--classifier-scale goes with --classifier, which is not"),
        (["--classifier", "{}/classifier", "--classifier-scale", "nan"], "scale is nan; expected"),
        (["--classifier", "{}/network"], "/network holds no classifier of noisy images but a UNet"),
        (["--classifier", "{}/none"], "/none is not a checkpoint directory"),
        (["--classifier", "{}/classifier", "--classes", "dog"], "'dog' is no class; there are 0"),
    ],
)
def test_refuses_options_that_make_no_guidance(saved, tmp_path, capsys, options, message):
    options = [option.format(saved) for option in options]
    assert sample(saved, tmp_path / "out", *options) == 2
    assert message in one_line(capsys)


def test_a_classifier_makes_no_pictures(saved, tmp_path, capsys):
    assert sample(saved, tmp_path / "out", network="classifier") == 2
    assert "holds a classifier, which makes no pictures" in one_line(capsys)


# --- Training and converting ---

TRAIN = "--preset classifier-digits --model-channels 32 --channel-mult 1 --attention-resolutions "
TRAIN += "none --diffusion-steps 20 --batch-size 8 --steps 2 --quiet --no-tensorboard --device cpu"


def train(out, *options):
    return main(["train", "--data", "digits", "--out", str(out), *TRAIN.split(), *options])


@pytest.mark.seconds
def test_trained_resumed_and_sampled_with(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--pool", "adaptive") == 0
    found = load(run)
    assert found.model.config["pool"] == "adaptive" and found.model.num_classes == 10
    assert found.diffusion.num_timesteps == 20 and found.weights == "model"
    assert main(["train", "--out", str(run), "--resume", "--steps", "3", "--quiet"]) == 0
    assert load(run).step == 3
    capsys.readouterr()
    assert main(["train", "--out", str(run), "--resume", "--pool", "attention"]) == 2
    assert "--pool is 'attention', but" in one_line(capsys)
    assert main(["train", "--out", str(run), "--resume", "--diffusion-steps", "40"]) == 2
    assert "--diffusion-steps is 40, but" in one_line(capsys)
    again = ["--init", str(run), "--dropout", "0.3"]
    assert main(["train", "--data", "digits", "--out", str(tmp_path / "b"), *again, "--steps", "1",
                 "--quiet", "--no-tensorboard"]) == 0  # fmt: skip
    assert load(tmp_path / "b").model.config["dropout"] == 0.3

    save_network(tmp_path / "network", recipe={**COSINE, "rescale_timesteps": True})
    assert sample(tmp_path, tmp_path / "out", "--classifier", str(run), "--num", "3") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-class-cond"], "a classifier needs images with classes: leave --no-class-cond out"),
        (["--preset", "digits", "--pool", "spatial"], "--pool is of a classifier, and the preset"),
        (["--pool", "max"], "pool='max'; expected one of adaptive"),
        (["--sample-every", "1"], "sample_every is 1, and a classifier draws no samples"),
    ],
)
def test_refuses_to_train_what_is_none(tmp_path, capsys, options, message):
    assert train(tmp_path / "run", *options) == 2
    assert message in one_line(capsys)


def test_published_weights_are_converted(tmp_path, capsys):
    torch.manual_seed(0)
    model = EncoderUNet.from_preset("classifier-digits", out_channels=7).eval()
    torch.save(model.state_dict(), tmp_path / "classifier.pt")

    def convert(*options):
        argv = ["--model", str(tmp_path / "classifier.pt"), "--out", str(tmp_path / "out")]
        return main(["convert", *argv, *options])

    for options, message in (
        ([], "is a classifier's, .* give --preset: classifier-64"),
        (["--preset", "adm-64"], "preset adm-64 is of a network UNet, not of EncoderUNet"),
        (["--preset", "classifier-64"], "holds the weights of another network"),
        (["--preset", "classifier-digits", "--num-heads", "2"], "--num-heads is of a U-Net, and"),
    ):
        assert convert(*options) == 2
        assert re.search(message, one_line(capsys))
    assert convert("--preset", "classifier-digits") == 0
    found = load(tmp_path / "out")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.0, 500.0])
    assert torch.equal(found.model(x, t), model(x, t))
    assert found.info["num_classes"] == 7 and found.diffusion.num_timesteps == 1000
