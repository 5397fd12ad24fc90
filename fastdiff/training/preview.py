"""What a run shows of itself at intervals: a grid of samples, and bits/dim."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.data import ImageDataset, iterate_once
from fastdiff.images import to_float, to_uint8
from fastdiff.models.replicas.replica import replica_of
from fastdiff.models.unet import UNet
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.likelihood import summarize_bpd
from fastdiff.sampling.sampler import Sampler
from fastdiff.training.config import TrainConfig
from fastdiff.training.loss_curve import plot_loss
from fastdiff.training.metrics import read_metrics


def draw_samples(
    model: UNet, diffusion: GaussianDiffusion, size: tuple[int, int], config: TrainConfig
) -> Tensor:
    """``sample_count`` samples as uint8 (count, C, H, W) on the CPU, one class after the other.

    The noise is the same at every step of a run, so that its grids can be compared.
    """
    count = config.sample_count
    strided = diffusion.learns_variance or diffusion.mean_type == "previous_x"
    sampler = Sampler(
        model,
        diffusion,
        steps=min(config.sample_steps, diffusion.num_timesteps),
        # A fixed variance wants all of its steps; DDIM does without them.
        method="ddpm" if strided else "ddim",
        dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
    )
    kwargs = {}
    if model.num_classes is not None:
        device = next(model.parameters()).device
        kwargs["y"] = torch.arange(count, device=device) % model.num_classes
    shape = (count, model.in_channels, *size)
    return to_uint8(sampler.sample(shape, seed=config.seed, model_kwargs=kwargs)).cpu()


def measure_nll(
    model: UNet, diffusion: GaussianDiffusion, dataset: ImageDataset, config: TrainConfig
) -> dict[str, float]:
    """The bound on bits/dim over the first ``nll_images`` of a set, and its standard error."""
    steps = config.nll_steps
    process = diffusion.respace(steps) if 0 < steps < diffusion.num_timesteps else diffusion
    batch_size = config.microbatch or config.batch_size
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(config.seed)
    terms: list[dict[str, Tensor]] = []
    left = min(config.nll_images, len(dataset))
    with replica_of(model) as network:
        for batch, labels in iterate_once(dataset, min(batch_size, left)):
            x_start = to_float(batch[:left].to(device))
            kwargs = {} if model.num_classes is None else {"y": labels[:left].to(device)}
            terms.append(
                process.calc_bpd_loop(network, x_start, model_kwargs=kwargs, generator=generator)
            )
            left -= len(x_start)
            if left <= 0:
                break
    summary = summarize_bpd(terms)
    return {"bits_per_dim": summary.total, "bits_per_dim_stderr": summary.total_stderr}


def plot_curve(run_dir: Path) -> None:
    """Draw loss_curve.png, where matplotlib is installed and a loss was logged."""
    metrics = run_dir / "metrics.jsonl"
    drawable = any("loss" in record for record in read_metrics(metrics))
    if drawable and importlib.util.find_spec("matplotlib") is not None:
        plot_loss(metrics, run_dir / "loss_curve.png")
