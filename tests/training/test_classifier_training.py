"""A classifier of noisy images in a Trainer: its loss, its log, resuming, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff import EncoderUNet, NoisyClassification, load
from fastdiff.data import ArrayDataset
from fastdiff.errors import InputError
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas
from fastdiff.training import TrainConfig, Trainer
from training_tools import make_dataset, make_diffusion, make_model, read_lines

SETTINGS = {"batch_size": 16, "steps": 30, "lr": 3e-3, "ema": (), "log_every": 10}
SETTINGS |= {"save_every": 15, "tensorboard": False}


def classifier(**changes) -> EncoderUNet:
    torch.manual_seed(1)
    arguments = {"image_size": 8, "in_channels": 1, "model_channels": 32, "out_channels": 3}
    arguments |= {"num_res_blocks": 1, "attention_resolutions": (), "channel_mult": (1,)}
    arguments["pool"] = "attention"
    return EncoderUNet(**{**arguments, "dropout": 0.1, **changes})


def patterns() -> ArrayDataset:
    """A class for each of three pictures: plain, stripes across, stripes down."""
    down = np.broadcast_to(np.arange(8) % 2 * 255, (8, 8)).astype(np.uint8)
    pictures = np.stack([np.full((8, 8), 128, np.uint8), down.T, down])
    labels = np.arange(24) % 3
    return ArrayDataset(
        pictures[labels][..., None], labels=labels, class_names=["plain", "across", "down"]
    )


def objective(**changes) -> NoisyClassification:
    return NoisyClassification(make_diffusion(steps=40, learn_sigma=False, **changes))


def trainer(run_dir, *, model=None, process=None, data=None, **settings) -> Trainer:
    return Trainer(
        classifier() if model is None else model,
        objective() if process is None else process,
        patterns() if data is None else data,
        TrainConfig(**{**SETTINGS, **settings}),
        run_dir,
        device="cpu",
        progress=False,
    )


def test_the_loss_is_the_cross_entropy_at_the_networks_timesteps():
    process = objective(rescale_timesteps=True)
    diffusion, seen = process.diffusion, []

    def model(x, t, scale):
        seen.append((x, t))
        return scale * x.flatten(1)[:, :4]

    x, z = torch.randn(2, 5, 1, 3, 3, dtype=torch.float64)
    t, y = torch.tensor([0, 9, 20, 30, 39]), torch.tensor([0, 1, 2, 3, 0])
    found = process.training_losses(model, x, t, {"y": y, "scale": 2.0}, noise=z)
    ((x_t, timesteps),) = seen
    signal, noise = (
        torch.from_numpy(level)[t].view(-1, 1, 1, 1)
        for level in (diffusion.signal_scale, diffusion.noise_scale)
    )
    assert (x_t - (signal * x + noise * z)).abs().max() < 1e-12
    assert timesteps.tolist() == [step * 25.0 for step in t.tolist()]
    log_p = (2 * x_t.flatten(1)[:, :4]).log_softmax(1)
    assert (found["loss"] + log_p[range(5), y]).abs().max() < 1e-12
    assert found["accuracy"].tolist() == (log_p.argmax(1) == y).double().tolist()
    again = process.training_losses(model, x, t, {"y": y, "scale": 2.0}, seed=3, step=2)
    assert torch.equal(
        again["loss"],
        process.training_losses(model, x, t, {"y": y, "scale": 2.0}, seed=3, step=2)["loss"],
    )
    assert process.from_config(process.to_config()).to_config() == process.to_config()


@pytest.mark.seconds
def test_it_learns_and_resumes_bit_for_bit(tmp_path):
    assert trainer(tmp_path / "whole").fit() == 30
    lines = read_lines(tmp_path / "whole")
    assert [line["step"] for line in lines] == [10, 20, 30]
    first, last = lines[0], lines[-1]
    assert last["loss"] < 0.6 * math.log(3) and last["accuracy"] > first["accuracy"]
    # There is less to see in more noise.
    assert last["accuracy_q0"] > 0.9 and last["loss_q0"] < 0.7 * last["loss_q3"]

    trainer(tmp_path / "part", steps=15).fit()
    resumed = Trainer.resume(
        tmp_path / "part", patterns(), changes={"steps": 30}, device="cpu", progress=False
    )
    resumed.fit()
    assert read_lines(tmp_path / "part")[-1] == last
    whole, part = (load(tmp_path / name) for name in ("whole", "part"))
    assert type(part.model) is EncoderUNet and type(part.diffusion) is NoisyClassification
    assert part.info["class_names"] == ["plain", "across", "down"]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, part.model.state_dict()[name])


def test_any_network_that_answers_logits(tmp_path):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 3)

        def forward(self, x, t):
            return self.layer(x.flatten(1))

    steps = {"steps": 2, "log_every": 1, "microbatch": 5}
    assert trainer(tmp_path / "run", model=Linear(), **steps).fit() == 2
    assert all(0 <= line["accuracy"] <= 1 for line in read_lines(tmp_path / "run"))


def unlabelled():
    return ArrayDataset(np.zeros((24, 8, 8, 1), np.uint8))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: {"process": make_diffusion()}, "a GaussianDiffusion does not train a network Enc"),
        (lambda: {"model": make_model()}, "a NoisyClassification does not train a network UNet"),
        (lambda: {"data": unlabelled()}, "the network has 3 classes, .* images have no labels"),
        (lambda: {"data": make_dataset(classes=4)}, "has 3 classes, the training images have 4"),
        (lambda: {"data": make_dataset(size=16), "model": classifier()}, "is for 8x8"),
        (lambda: {"sample_every": 5}, "sample_every is 5, and a classifier draws no samples"),
        (lambda: {"fid_every": 5}, "fid_every is 5, and a classifier draws no samples"),
        (lambda: {"nll_every": 5}, "nll_every is 5, .* not of a NoisyClassification"),
        (lambda: {"label_dropout": 0.1}, "label_dropout is 0.1, which needs a class-conditional"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, parts, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path / "run", **parts())
    assert not (tmp_path / "run").exists()


def test_refuses_other_processes():
    with pytest.raises(InputError, match="needs a GaussianDiffusion, .* got a VarianceExploding"):
        NoisyClassification(VarianceExploding(geometric_sigmas(10)))
    with pytest.raises(InputError, match="expected 'noisy_classification'"):
        NoisyClassification.from_config(make_diffusion().to_config())
    with pytest.raises(InputError, match="the classifier needs y"):
        objective().training_losses(
            lambda x, t: x.flatten(1), torch.zeros(2, 3), torch.zeros(2).long()
        )
