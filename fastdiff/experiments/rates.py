"""What a pass of an image through a network costs on this machine: measured, and counted."""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.data import ArrayDataset
from fastdiff.evaluation.features import FeatureNetwork
from fastdiff.images import to_float
from fastdiff.models.flops import flops, unet_flops
from fastdiff.models.unet import UNet
from fastdiff.ranks import ALONE
from fastdiff.sampling.sampler import Sampler
from fastdiff.training import TrainConfig, Trainer

LEAST_S = 0.5  # of a measurement
# The most pixels that are measured together: 8 images of 32x32 on a CPU, 128 on a GPU.
PIXELS = {"cpu": 2**13, "cuda": 2**17}
STEPS = 10  # of a measured call: what begins and ends it is shared by so many
LONG = 10  # a first call so many times longer than LEAST_S is the measurement


class Rate(NamedTuple):
    """Of one pass of one image: seconds in the batch that is measured, and operations."""

    seconds: float
    flops: int


def at_once(device: torch.device, size: tuple[int, int]) -> int:
    """How many images are measured together."""
    return max(1, PIXELS.get(device.type, PIXELS["cpu"]) // math.prod(size))


def noise_images(
    count: int, size: tuple[int, int], channels: int, classes: int | None
) -> ArrayDataset:
    """Images to measure with."""
    images = np.random.default_rng(0).integers(0, 256, (count, *size, channels), np.uint8)
    if classes is None:
        return ArrayDataset(images)
    names = [str(number) for number in range(classes)]
    return ArrayDataset(images, labels=np.arange(count) % classes, class_names=names)


def training_rate(
    model: UNet, diffusion: Any, data: ArrayDataset, config: TrainConfig, device: torch.device
) -> Rate:
    """Of the Trainer's own steps, the updates of weights and averages among them."""
    batch = min(config.batch_size, len(data))
    config = dataclasses.replace(config, batch_size=batch, shard=False, workers=0, fid_every=0)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        trainer = Trainer(
            model, diffusion, data, config, run, device=device, progress=False, ranks=ALONE
        )
        seconds = _seconds(trainer._train_step, device)
    return Rate(seconds / batch, unet_flops(model.config, data.image_size, training=True))


def sampling_rate(
    model: UNet, diffusion: Any, data: ArrayDataset, batch: int, device: torch.device
) -> Rate:
    """Of a step of DDPM."""
    batch, steps = min(batch, len(data)), min(STEPS, diffusion.num_timesteps)
    sampler = Sampler(model.to(device), diffusion, steps=steps)
    shape, labels = (batch, *data.shape), _labels(data, batch, device)
    seconds = _seconds(lambda: sampler.sample(shape, seed=0, model_kwargs=labels), device)
    return Rate(seconds / batch / steps, unet_flops(model.config, data.image_size))


def scoring_rate(
    model: UNet, diffusion: Any, data: ArrayDataset, batch: int, device: torch.device
) -> Rate:
    """Of a step of the variational bound."""
    batch, steps = min(batch, len(data)), min(STEPS, diffusion.num_timesteps)
    process, network = diffusion.respace(steps), model.to(device).eval()
    x_start = to_float(data.gather(np.arange(batch)).to(device))
    labels = _labels(data, batch, device)
    seconds = _seconds(lambda: process.calc_bpd_loop(network, x_start, model_kwargs=labels), device)
    return Rate(seconds / batch / steps, unet_flops(model.config, data.image_size))


def feature_rate(network: FeatureNetwork, data: ArrayDataset, device: torch.device) -> Rate:
    """Of the features of an image."""
    images = data.gather(np.arange(len(data))).to(device).expand(-1, 3, -1, -1)
    with torch.inference_mode():
        seconds = _seconds(lambda: network(images), device)
        return Rate(seconds / len(data), flops(lambda: network(images)) // len(data))


def _labels(data: ArrayDataset, batch: int, device: torch.device) -> dict[str, Any]:
    if data.labels is None:
        return {}
    return {"y": data.gather_labels(np.arange(batch)).to(device)}


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of a call, the mean of those in LEAST_S. The first (allocations, the choice of algorithms) is
    not counted, unless it took so long that this is nothing."""
    begun = time.perf_counter()
    call()
    _wait(device)
    if (first := time.perf_counter() - begun) > LONG * LEAST_S > 0:
        return first
    begun, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - begun < LEAST_S:
        call()
        _wait(device)
        calls += 1
    return (time.perf_counter() - begun) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
