"""The variational bound of a checkpoint on a data set: what ``nll`` and ``rate-distortion`` share.

Image i of those that are scored draws the same noise in any batch, on any rank.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands import networks
from fastdiff.commands.checkpoint_options import (
    add_checkpoint_arguments,
    fingerprint,
    load_checkpoint,
)
from fastdiff.commands.data_options import KINDS_OF_DATA, add_reading_arguments
from fastdiff.commands.network_data import network_dataset
from fastdiff.data import ImageDataset
from fastdiff.data.spaced import evenly_spaced
from fastdiff.errors import InputError, TrainingError
from fastdiff.images import to_float
from fastdiff.optional import require
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.likelihood import (
    BitsPerDim,
    RateDistortion,
    counter_noise,
    rate_distortion,
    summarize_bpd,
)
from fastdiff.ranks import Ranks
from fastdiff.training.network import asked_by_bound

Terms = list[dict[str, Tensor]]  # calc_bpd_loop's, of every batch


def add_bound_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--data",
        required=True,
        default=argparse.SUPPRESS,
        metavar="SPEC",
        help=f"{KINDS_OF_DATA}; its classes are matched to the network's by name",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--num",
        type=int,
        default=argparse.SUPPRESS,
        help="how many images, evenly spaced in the set (default: all)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images scored together")
    parser.add_argument(
        "--respacing",
        "--steps",
        default=argparse.SUPPRESS,
        help="score the strided process: a number of steps, 10,15,20 or ddimN (default: all steps)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")


def check_bound_arguments(args: argparse.Namespace) -> None:
    """Options that were not given are None; InputError for numbers out of range."""
    for name in ("num", "respacing"):
        vars(args).setdefault(name, None)
    if args.batch_size < 1 or args.seed < 0 or (args.num is not None and args.num < 1):
        raise InputError("--batch-size and --num must be positive, and --seed not negative")


@dataclass(frozen=True)
class Bound:
    """What is scored, and by what."""

    checkpoint: Checkpoint
    diffusion: GaussianDiffusion
    dataset: ImageDataset

    @classmethod
    def of(cls, args: argparse.Namespace, device: str | None) -> "Bound":
        """What the options name. InputError before anything is scored."""
        checkpoint = load_checkpoint(args.checkpoint, args.weights, device)
        diffusion = checkpoint.diffusion
        if not isinstance(diffusion, GaussianDiffusion):
            raise InputError(
                f"{checkpoint.path} has a {type(diffusion).__name__} process; "
                "the bound is that of a GaussianDiffusion"
            )
        if args.respacing is not None:
            diffusion = diffusion.respace(args.respacing)
        dataset = evenly_spaced(network_dataset(args, checkpoint, "bits/dim"), args.num)
        return cls(checkpoint, diffusion, dataset)

    @property
    def model(self) -> Callable[..., Tensor]:
        """The network as the bound asks it."""
        return asked_by_bound(self.checkpoint.model, networks.self_condition(self.checkpoint))

    def facts(self) -> dict[str, Any]:
        """What ranks have to agree on."""
        return {
            "the checkpoint": fingerprint(self.checkpoint),
            "the number of images": len(self.dataset),
        }

    def images(self, start: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """x_0 of the scored images from number ``start`` on, float32 (n, C, H, W) on the network's
        device, and their labels as its arguments."""
        part = np.arange(start, min(start + count, len(self.dataset)))
        device = next(self.checkpoint.model.parameters()).device
        x_start, kwargs = to_float(self.dataset.gather(part).to(device)), {}
        if networks.num_classes(self.checkpoint) is not None:
            kwargs = networks.labelled(self.checkpoint, self.dataset.gather_labels(part))
        return x_start, kwargs

    def score(self, batch_size: int, seed: int, ranks: Ranks) -> Terms:
        """calc_bpd_loop's terms for every batch, on rank 0: the ranks share the batches."""
        starts, model = range(0, len(self.dataset), batch_size), self.model
        steps = len(ranks.share(starts)) * self.diffusion.num_timesteps
        with require("tqdm", "train").tqdm(
            total=steps, desc="scoring", unit="step", disable=ranks.rank > 0
        ) as bar:

            def score(start: int) -> dict[str, Tensor]:
                x_start, kwargs = self.images(start, batch_size)
                drawn = counter_noise(x_start, seed, start)

                def noise(t: int) -> Tensor:
                    bar.update()
                    return drawn(t)

                terms = self.diffusion.calc_bpd_loop(
                    model, x_start, model_kwargs=kwargs, noise=noise
                )
                return {name: value.cpu() for name, value in terms.items()}

            return ranks.each(score, starts, on_first=True)


def summarize(terms: Terms) -> BitsPerDim:
    """TrainingError where there is no figure."""
    summary = summarize_bpd(terms)
    if not math.isfinite(summary.total):
        raise TrainingError(f"the bound is {summary.total}: the network's output is not finite")
    return summary


def document(
    args: argparse.Namespace, bound: Bound, summary: BitsPerDim, terms: Terms
) -> dict[str, Any]:
    """All figures, for JSON. Timesteps are the trained process's, whatever the stride."""
    averages = dataclasses.asdict(summary)
    steps = {"timestep": bound.diffusion.timestep_map}
    steps |= {name: averages.pop(name) for name in ("vb", "xstart_mse", "mse")}
    return {
        "checkpoint": str(bound.checkpoint.path),
        "weights": bound.checkpoint.weights,
        "step": bound.checkpoint.step,
        "data": args.data,
        "seed": args.seed,
        "num_timesteps": bound.diffusion.num_timesteps,
        "bits_per_dim": {name: plain(value) for name, value in averages.items()},
        "steps": {name: plain(values) for name, values in steps.items()},
        "rate_distortion": {
            name: plain(values)
            for name, values in dataclasses.asdict(rate_table(bound, terms)).items()
        },
    }


def rate_table(bound: Bound, terms: Terms) -> RateDistortion:
    """The rate-distortion table with the trained process's timesteps."""
    timesteps = np.append(bound.diffusion.timestep_map[::-1], -1)
    return dataclasses.replace(rate_distortion(terms), timestep=timesteps)


def plain(value: Any) -> Any:
    """Numbers for JSON, which has no NaN: the standard error of a single image is null."""
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_error(value: float, stderr: float) -> str:
    """A figure and its standard error, where there is one."""
    return f"{value:.4f}" if math.isnan(stderr) else f"{value:.4f} ± {stderr:.4f}"
