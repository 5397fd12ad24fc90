"""What a run shows of itself at intervals, each rank a part: a grid of samples, and bits/dim."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.data import ImageDataset, Items
from fastdiff.images import to_float, to_uint8
from fastdiff.models.replicas.replica import replica_of
from fastdiff.process.likelihood import counter_noise, summarize_bpd
from fastdiff.ranks import ALONE, Ranks
from fastdiff.sampling.sampler import Sampler
from fastdiff.training import network
from fastdiff.training.loss_curve import plot_loss
from fastdiff.training.metrics import read_metrics
from fastdiff.training.run import Run


def draw_samples(trainer: Run, count: int) -> Tensor:
    """``count`` samples as uint8 (count, C, H, W) on the CPU, one class after the other.

    The noise is the same at every step of a run, so that its grids can be compared, and on any
    number of ranks, of which each draws some.
    """
    config, ranks, diffusion = trainer.config, _sharing(trainer), trainer.diffusion
    strided = getattr(diffusion, "learns_variance", False) or diffusion.mean_type == "previous_x"
    sampler = Sampler(
        trainer.model,
        diffusion,
        steps=min(config.sample_steps, diffusion.num_timesteps),
        # A fixed variance wants all of its steps; DDIM does without them.
        method="ddpm" if strided else "ddim",
        dtype=network.PRECISIONS.get(config.dtype),
        self_condition=config.self_condition or None,
        capture=False if trainer.is_spread else "auto",  # a block is gathered when it runs
    )

    def drawn(numbers: range) -> Tensor:
        x, kwargs = _example(trainer, np.asarray(numbers))
        shape = (len(numbers), *x.shape[1:])
        first = numbers.start
        images = sampler.sample(shape, seed=config.seed, first_sample=first, model_kwargs=kwargs)
        return to_uint8(images).cpu()

    # A grid at once; of more as many as a rank's part of a batch, which fits where training does.
    at_once = max(config.sample_count, config.batch_size) // ranks.count or 1
    parts = [range(i, min(i + at_once, count)) for i in range(0, count, at_once)]
    return torch.cat(ranks.each(drawn, parts))


def _sharing(trainer: Run) -> Ranks:
    """The ranks that share the work. Of a network spread over them all have to do all of it: each
    pass gathers the parts that the others hold."""
    return ALONE if trainer.is_spread else trainer.ranks


def _example(trainer: Run, numbers: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
    """x of the shape of what is trained on, and the network's arguments for samples ``numbers``:
    the classes in turn, else what the first items of the data have."""
    data = trainer.data
    if isinstance(data, ImageDataset) and not trainer.config.upsample_from:
        x = torch.empty(len(numbers), *data.shape)
        classes = data.num_classes
        given: Any = {} if classes is None else torch.from_numpy(numbers % classes)
    elif isinstance(data, ImageDataset | Items):
        x, given = data.batch(numbers % len(data))
    else:
        x, given = trainer.feed.last or _next_batch(trainer)
        chosen = torch.from_numpy(numbers % len(x))
        x, given = x[chosen], {name: value[chosen] for name, value in given.items()}
    return x, _arguments(trainer, x, given)


def _arguments(trainer: Run, x: Tensor, given: Any) -> dict[str, Tensor]:
    """The network's, of a batch that was read: with the small image of each x, unaugmented."""
    kwargs = network.arguments_of(given, trainer.feed.label)
    kwargs = network.on(trainer.device, kwargs, x.dim())
    return kwargs | trainer.feed.low_res.plain(to_float(x.to(trainer.device)))


def _next_batch(trainer: Run) -> Any:
    """A look at the batch that the next step will get, where there was no step yet."""
    batch = next(trainer.stream)
    trainer.stream.position -= 1
    return batch


def measure_nll(trainer: Run) -> dict[str, float]:
    """The bound on bits/dim over the first ``nll_images`` of a set, and its standard error.

    Image i draws the same noise in any batch, on any number of ranks.
    """
    config, dataset, ranks = trainer.config, trainer.eval_dataset, _sharing(trainer)
    steps, diffusion = config.nll_steps, trainer.diffusion
    process = diffusion.respace(steps) if 0 < steps < diffusion.num_timesteps else diffusion
    size = config.microbatch or config.batch_size
    count = min(config.nll_images, len(dataset))
    with replica_of(trainer.model) as replica:
        model = network.asked_by_bound(replica, config.self_condition or None)

        def score(start: int) -> dict[str, Tensor]:
            images, given = dataset.batch(np.arange(start, min(start + size, count)))
            x_start = to_float(images.to(trainer.device))
            kwargs = _arguments(trainer, images, given)
            noise = counter_noise(x_start, config.seed, start)
            terms = process.calc_bpd_loop(model, x_start, model_kwargs=kwargs, noise=noise)
            return {name: value.cpu() for name, value in terms.items()}

        summary = summarize_bpd(ranks.each(score, range(0, count, size)))
    return {"bits_per_dim": summary.total, "bits_per_dim_stderr": summary.total_stderr}


def plot_curve(run_dir: Path) -> None:
    """Draw loss_curve.png, where matplotlib is installed and a loss above 0 was logged."""
    metrics = run_dir / "metrics.jsonl"
    drawable = any(record.get("loss", 0) > 0 for record in read_metrics(metrics))
    if drawable and importlib.util.find_spec("matplotlib") is not None:
        plot_loss(metrics, run_dir / "loss_curve.png")
