import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdiff import UNet
from fastdiff.checkpoints.checkpoint import save
from fastdiff.evaluation.features import NETWORKS, FeatureNetwork
from fastdiff.experiments import rates
from fastdiff.models import presets
from fastdiff.process.gaussian import create_diffusion

SIZES = {
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "channel_mult": (1,),
    "image_size": 8,
}


@pytest.fixture
def images(tmp_path):
    """``images(side)``: the path of pictures of noise of three classes, as data."""

    def made(side, channels=3, classes=True, count=10):
        rng = np.random.default_rng(side)
        pixels = rng.integers(0, 256, (count, side, side, channels), np.uint8)
        path = tmp_path / f"images{side}x{channels}{'labelled' if classes else ''}.npz"
        np.savez(path, *[pixels, np.arange(count) % 3][: 1 + classes])
        return path

    return made


@pytest.fixture
def network(tmp_path):
    """``network(name, learned)``: a checkpoint of a small network of 8x8 pictures."""

    def made(name, learned, **changes):
        torch.manual_seed(0)
        model = UNet(3, 32, 6 if learned else 3, **{**SIZES, **changes})
        for parameter in model.parameters():  # the last layer starts at zero
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        diffusion = create_diffusion(steps=30, noise_schedule="cosine", learn_sigma=learned)
        return save(tmp_path / name, model, diffusion=diffusion, info={"image_size": [8, 8]})

    return made


@pytest.fixture
def hasty(monkeypatch):
    """Rates of one call."""
    monkeypatch.setattr(rates, "LEAST_S", 0)
    monkeypatch.setitem(rates.PIXELS, "cpu", 128)


class Means(FeatureNetwork):
    """Features in no time: means of parts of a picture."""

    name, published, resizing = "means", False, "to 4x4"
    widths = {"pooled": 48, "logits": 48, "spatial": 48}

    def __init__(self, weights, resize):
        super().__init__()

    def forward(self, images):
        means = F.adaptive_avg_pool2d(images.float(), 4).flatten(1)
        return dict.fromkeys(self.widths, means)


@pytest.fixture
def small(monkeypatch, hasty):
    """Presets of CIFAR-10 with a network of 8x8 pictures, as ``network`` makes it, and features
    without a network."""
    monkeypatch.setitem(NETWORKS, "efficientnet-lite0", Means)
    for name in ("ddpm-cifar10", "iddpm-cifar10"):
        preset = presets.get(name)
        learned = preset.diffusion.get("learn_sigma", False)
        model = {"model_channels": 32, "out_channels": 6 if learned else 3, **SIZES}
        diffusion = {"steps": 30, "noise_schedule": "cosine", "learn_sigma": learned}
        changes = {"model": {"in_channels": 3, **model}, "diffusion": diffusion}
        monkeypatch.setitem(presets.PRESETS, name, dataclasses.replace(preset, **changes))
