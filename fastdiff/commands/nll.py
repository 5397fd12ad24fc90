"""``fastdiff nll``: the variational bound on −log p(x) of images, in bits per dimension."""

import argparse
import dataclasses
import math
from typing import Any

import numpy as np
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands import networks
from fastdiff.commands.checkpoint_options import (
    add_checkpoint_arguments,
    describe,
    fingerprint,
    load_checkpoint,
)
from fastdiff.commands.class_options import class_names
from fastdiff.commands.data_options import KINDS_OF_DATA, add_reading_arguments, reading_options
from fastdiff.commands.output import said_once
from fastdiff.commands.reports import check_report, write_report
from fastdiff.data import ImageDataset, load_dataset, match_classes
from fastdiff.data.dataset import check_bytes
from fastdiff.errors import InputError, TrainingError
from fastdiff.images import to_float
from fastdiff.optional import require
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.likelihood import (
    BitsPerDim,
    counter_noise,
    rate_distortion,
    summarize_bpd,
)
from fastdiff.ranks import Ranks, join
from fastdiff.training.network import asked_by_bound


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        default=argparse.SUPPRESS,
        help="score the strided process: a number of steps, 10,15,20 or ddimN (default: all steps)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--out",
        default=argparse.SUPPRESS,
        metavar="FILE.json",
        help="write there every term, timestep by timestep, and the rate-distortion table",
    )


def run(args: argparse.Namespace) -> int:
    for name in ("num", "respacing", "out"):
        vars(args).setdefault(name, None)
    if args.batch_size < 1 or args.seed < 0 or (args.num is not None and args.num < 1):
        raise InputError("--batch-size and --num must be positive, and --seed not negative")
    ranks = join(getattr(args, "device", None))
    with ranks.heard(), said_once(ranks):
        checkpoint, diffusion, dataset = ranks.together(lambda: _prepare(args, ranks.device))
        ranks.agree(
            {"the checkpoint": fingerprint(checkpoint), "the number of images": len(dataset)}
        )
        if args.out is not None:
            parts = ("checkpoint", "bits_per_dim", "steps")
            ranks.on_first(lambda: check_report(args.out, parts))
        print(describe(checkpoint, args.weights))
        terms = _score(args, checkpoint, diffusion, dataset, ranks)
        ranks.on_first(lambda: _finish(args, checkpoint, diffusion, terms))
        ranks.leave()
    return 0


def _prepare(
    args: argparse.Namespace, device: str | None
) -> tuple[Checkpoint, GaussianDiffusion, ImageDataset]:
    """What the options name. InputError before anything is scored."""
    checkpoint = load_checkpoint(args, device, args.checkpoint)
    diffusion = checkpoint.diffusion
    if not isinstance(diffusion, GaussianDiffusion):
        raise InputError(
            f"{checkpoint.path} has a {type(diffusion).__name__} process; "
            "the bound is that of a GaussianDiffusion"
        )
    if args.respacing is not None:
        diffusion = diffusion.respace(args.respacing)
    dataset = _dataset(args, checkpoint)
    return checkpoint, diffusion, dataset


def _finish(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    diffusion: GaussianDiffusion,
    terms: list[dict[str, Tensor]],
) -> None:
    """Sum up, write, print. TrainingError where there is no figure."""
    summary = summarize_bpd(terms)
    if not math.isfinite(summary.total):
        raise TrainingError(f"the bound is {summary.total}: the network's output is not finite")
    if args.out is not None:  # before anything can go wrong with printing
        write_report(args.out, _document(args, checkpoint, diffusion, summary, terms))
    print(_report(summary))
    if args.out is not None:
        print(args.out)


def _dataset(args: argparse.Namespace, checkpoint: Checkpoint) -> ImageDataset:
    """The images in the format, and the classes in the numbers, the network was trained with."""
    height, width = networks.image_size(checkpoint)
    channels, classes = networks.channels(checkpoint), networks.num_classes(checkpoint)
    names = class_names(checkpoint)
    dataset = load_dataset(
        args.data,
        image_size=height if height == width else None,
        channels=channels if channels in (1, 3, 4) else None,
        class_cond=classes is not None,
        known_classes=names or (),
        **reading_options(vars(args)),
    )
    print(dataset.describe(), flush=True)
    check_bytes(dataset, "bits/dim")
    found = (dataset.channels, *dataset.image_size)
    if found != (channels, height, width):
        raise InputError(
            f"--data {args.data} has images of (C, H, W) {found}; the network was trained with "
            f"{(channels, height, width)}"
        )
    return match_classes(dataset, names, classes, f"--data {args.data}")


def _score(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    diffusion: GaussianDiffusion,
    dataset: ImageDataset,
    ranks: Ranks,
) -> list[dict[str, Tensor]]:
    """calc_bpd_loop's terms for every batch, on rank 0: the ranks share the batches. Image i draws
    the same noise in any batch, on any rank."""
    device = next(checkpoint.model.parameters()).device
    count = min(args.num or len(dataset), len(dataset))
    indices = np.linspace(0, len(dataset) - 1, count).round().astype(np.int64)
    starts = range(0, count, args.batch_size)
    model = asked_by_bound(checkpoint.model, networks.self_condition(checkpoint))
    labels = networks.num_classes(checkpoint) is not None
    steps = len(ranks.share(starts)) * diffusion.num_timesteps
    with require("tqdm", "train").tqdm(
        total=steps, desc="scoring", unit="step", disable=ranks.rank > 0
    ) as bar:

        def score(start: int) -> dict[str, Tensor]:
            part = indices[start : start + args.batch_size]
            x_start = to_float(dataset.gather(part).to(device))
            kwargs = {}
            if labels:
                kwargs = networks.labelled(checkpoint, dataset.gather_labels(part))

            drawn = counter_noise(x_start, args.seed, start)

            def noise(t: int) -> Tensor:
                bar.update()
                return drawn(t)

            terms = diffusion.calc_bpd_loop(model, x_start, model_kwargs=kwargs, noise=noise)
            return {name: value.cpu() for name, value in terms.items()}

        return ranks.each(score, starts, on_first=True)


def _report(summary: BitsPerDim) -> str:
    """The total with its standard error, its parts, and the steps' terms by quartile."""
    lines = [
        f"{summary.count} images: {_with_error(summary.total, summary.total_stderr)} bits/dim",
        f"  prior    {_with_error(summary.prior, summary.prior_stderr)}   KL of q(x_T | x_0)",
        f"  rate     {_with_error(summary.rate, summary.rate_stderr)}   KL terms, t > 0",
        f"  decoder  {_with_error(summary.decoder, summary.decoder_stderr)}   "
        "negative log-likelihood, t = 0",
        "",
        "steps t         bits/dim   MSE of x_0   MSE of eps",
    ]
    for steps in _quartiles(len(summary.vb)):
        first, last = steps[0], steps[-1]
        lines.append(
            f"{first:>5} … {last:<5}  {summary.vb[steps].sum():>9.4f}  "
            f"{summary.xstart_mse[steps].mean():>10.4g}  {summary.mse[steps].mean():>10.4g}"
        )
    return "\n".join(lines)


def _quartiles(num_timesteps: int) -> list[np.ndarray]:
    return [part for part in np.array_split(np.arange(num_timesteps), 4) if len(part)]


def _with_error(value: float, stderr: float) -> str:
    return f"{value:.4f}" if math.isnan(stderr) else f"{value:.4f} ± {stderr:.4f}"


def _document(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    diffusion: GaussianDiffusion,
    summary: BitsPerDim,
    terms: list[dict[str, Tensor]],
) -> dict[str, Any]:
    averages = dataclasses.asdict(summary)
    steps = {"timestep": diffusion.timestep_map}
    steps |= {name: averages.pop(name) for name in ("vb", "xstart_mse", "mse")}
    return {
        "checkpoint": str(checkpoint.path),
        "weights": checkpoint.weights,
        "step": checkpoint.step,
        "data": args.data,
        "seed": args.seed,
        "num_timesteps": diffusion.num_timesteps,
        "bits_per_dim": {name: _plain(value) for name, value in averages.items()},
        "steps": {name: _plain(values) for name, values in steps.items()},
        "rate_distortion": {
            name: _plain(values)
            for name, values in dataclasses.asdict(rate_distortion(terms)).items()
        },
    }


def _plain(value: Any) -> Any:
    """Numbers for JSON, which has no NaN: the standard error of a single image is null."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    return None if isinstance(value, float) and not math.isfinite(value) else value
