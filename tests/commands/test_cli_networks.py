"""Commands with networks that are not fastdiff's UNet: what they need of one, and say."""

import json

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import cli, create_diffusion
from fastdiff.images import load_samples_npz, to_uint8
from fastdiff.training import TrainConfig, Trainer
from network_tools import Plain, SmallDiT, diffusers_unet
from training_tools import make_dataset

SAMPLE = ["--num", "3", "--steps", "3", "--method", "ddim", "--device", "cpu", "--no-pngs"]


def cosine(**changes):
    return create_diffusion(steps=8, noise_schedule="cosine", **changes)


def trained(run, model, data, **settings):
    given = {"batch_size": 4, "steps": 1, "ema": (), "tensorboard": False, **settings}
    config = TrainConfig(**given)
    Trainer(model, cosine(), data, config, run, device="cpu", progress=False).fit()
    return run


def in_a_file(folder):
    path = folder / "images.npz"
    np.savez(path, arr_0=np.asarray(make_dataset().images).transpose(0, 2, 3, 1))
    return path


def drawn(run, out, *options) -> np.ndarray:
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(out), *SAMPLE, *options]) == 0
    return load_samples_npz(next(out.glob("samples_*.npz")))


def error_of(capsys, *arguments) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1
    return message[0]


NETWORKS = [
    (SmallDiT, "y"),
    (diffusers_unet, None),
    (lambda: diffusers_unet(num_class_embeds=3), "class_labels"),
]


@pytest.mark.seconds
@pytest.mark.parametrize(("make", "label"), NETWORKS)
def test_pictures_of_any_network(tmp_path, make, label):
    torch.manual_seed(0)
    run = trained(tmp_path / "run", make(), make_dataset())
    images, labels = drawn(run, tmp_path / "out")
    checkpoint = fastdiff.load(run)
    kwargs = {} if label is None else {label: torch.arange(3)}
    assert (labels is None) == (label is None)
    sampler = fastdiff.Sampler(checkpoint.model, checkpoint.diffusion, steps=3, method="ddim")
    expected = to_uint8(sampler.sample((3, 1, 8, 8), seed=0, model_kwargs=kwargs))
    assert np.abs(images[..., 0].astype(int) - expected[:, 0].numpy()).max() <= 1


@pytest.mark.seconds
def test_guidance_by_a_networks_own_null_label(tmp_path):
    run = trained(tmp_path / "run", SmallDiT(), make_dataset(), label_dropout=0.2)
    guided, _ = drawn(run, tmp_path / "guided", "--guidance-scale", "3")
    plain, _ = drawn(run, tmp_path / "plain")
    assert not np.array_equal(guided, plain)


class OwnEstimate(SmallDiT):
    """Samples differ where it is given what it predicted."""

    def forward(self, x, t, y, own=None):
        return super().forward(x if own is None else x + own, t, y)


@pytest.mark.seconds
def test_a_self_conditioned_network_is_sampled_and_scored_as_one(tmp_path):
    torch.manual_seed(0)
    run = trained(tmp_path / "run", OwnEstimate(), make_dataset(), self_condition="own")
    checkpoint = fastdiff.load(run)
    images, _ = drawn(run, tmp_path / "out")
    own = {"self_condition": "own"}
    sampler = fastdiff.Sampler(
        checkpoint.model, checkpoint.diffusion, steps=3, method="ddim", **own
    )
    expected = sampler.sample((3, 1, 8, 8), seed=0, model_kwargs={"y": torch.arange(3)})
    found = images[..., 0].astype(int)
    assert np.abs(found - to_uint8(expected)[:, 0].numpy()).max() <= 1


@pytest.mark.seconds
def test_bits_of_any_network(tmp_path):
    images = str(in_a_file(tmp_path))
    run = trained(tmp_path / "run", diffusers_unet(), make_dataset())
    out = tmp_path / "bits.json"
    options = ["--num", "4", "--device", "cpu", "--out", str(out)]
    assert cli.main(["nll", "--checkpoint", str(run), "--data", images, *options]) == 0
    assert json.loads(out.read_text())["bits_per_dim"]["total"] > 0


class Sketched(SmallDiT):
    def forward(self, x, t, y, sketch):
        return super().forward(x + sketch, t, y)


class Unnumbered(Plain):
    def __init__(self):
        super().__init__()
        self.config = {}

    def forward(self, x, t, y):
        return super().forward(x, t)


INFO = {"image_size": 8, "channels": 1}


@pytest.mark.parametrize(
    ("make", "info", "words"),
    [
        (Sketched, INFO, "a Sketched, which needs sketch"),
        (Unnumbered, INFO, "how many classes its Unnumbered has"),
        (SmallDiT, {"image_size": [16], "channels": 1}, "x of 1 axes"),
        (SmallDiT, {"channels": 1}, "image size (info.image_size)"),
        (Plain, INFO, "holds the weights of a Plain and not how it is made"),
    ],
)
def test_what_the_command_line_does_not_draw(tmp_path, capsys, make, info, words):
    path = fastdiff.save(tmp_path / "c", make(), diffusion=cosine(), info=info)
    out = tmp_path / "out"
    assert words in error_of(capsys, "sample", "--checkpoint", path, "--out", out, *SAMPLE)


@pytest.mark.seconds
def test_training_goes_on_with_any_network(tmp_path, capsys):
    images = in_a_file(tmp_path)
    run = trained(tmp_path / "run", diffusers_unet(), make_dataset())
    quick = ["--data", images, "--steps", "2", "--batch-size", "4", "--device", "cpu", "--quiet"]
    quick += ["--no-tensorboard", "--out", tmp_path / "new"]
    begin = ["train", "--init", run, "--init-weights", "model", *quick]
    words = error_of(capsys, *begin, "--channel-mult", "1,2")
    assert "--channel-mult is of fastdiff's UNet" in words and "UNet2DModel" in words
    assert cli.main([str(argument) for argument in begin]) == 0
    words = error_of(capsys, "train", "--resume", *quick, "--channel-mult", "1,2")
    assert "--channel-mult is of fastdiff's UNet" in words
    quick[3] = "3"
    assert cli.main([str(argument) for argument in ["train", "--resume", *quick]]) == 0
    assert fastdiff.load(tmp_path / "new").step == 3
