"""``fastdiff rate-distortion``: progressive lossy coding by a checkpoint (Ho et al. 2020, 4.3).

A sender gives x_T and then, step by step, x_{t-1} ~ q(x_{t-1} | x_t, x_0), each at the cost of its
KL from the receiver's p(x_{t-1} | x_t) (algorithms 3 and 4). At any t the receiver can stop and
take the x_0 that the network expects: the rate is what it has received, the distortion what it
misses.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from fastdiff.commands import networks
from fastdiff.commands.bound import (
    Bound,
    Terms,
    add_bound_arguments,
    check_bound_arguments,
    document,
    rate_table,
    summarize,
    with_error,
)
from fastdiff.commands.checkpoint_options import describe, new_directory, writable_folder
from fastdiff.commands.numbers import check_least
from fastdiff.commands.output import said_once
from fastdiff.commands.reports import write_csv, write_report
from fastdiff.commands.trajectory import Trajectory
from fastdiff.data.spaced import spaced_numbers
from fastdiff.files import replacing
from fastdiff.images import (
    MAX_TRAJECTORY_COLUMNS,
    MODES,
    channels_first,
    save_trajectory,
    to_uint8,
)
from fastdiff.optional import require
from fastdiff.process.likelihood import BitsPerDim, RateDistortion, counter_noise
from fastdiff.ranks import join
from fastdiff.sampling.sampler import Sampler


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bound_arguments(parser)
    parser.add_argument(
        "--out",
        required=True,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="a new or empty folder: rate_distortion.csv, .json and .png, and the pictures",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=8,
        metavar="N",
        help="picture the estimates of x_0 over time: of the first N images that are scored, and "
        "of N new samples (0: none)",
    )


def run(args: argparse.Namespace) -> int:
    check_bound_arguments(args)
    check_least(args, 0, "pictures")
    ranks = join(getattr(args, "device", None))
    with ranks.heard(), said_once(ranks):
        bound = ranks.together(lambda: Bound.of(args, ranks.device))
        ranks.agree(bound.facts())
        out = ranks.on_first(lambda: _place(args))
        print(describe(bound.checkpoint, args.weights))
        terms = bound.score(args.batch_size, args.seed, ranks)
        ranks.on_first(lambda: _finish(args, bound, terms, out))
        ranks.leave()
    return 0


def _place(args: argparse.Namespace) -> Path:
    """The folder of --out; what draws is looked for before the work, too."""
    require("matplotlib.figure", "demo")
    return writable_folder(new_directory(args.out))


def _finish(args: argparse.Namespace, bound: Bound, terms: Terms, out: Path) -> None:
    """Sum up, write, draw, print."""
    summary, table = summarize(terms), rate_table(bound, terms)
    rows = spaced_numbers(bound.diffusion.num_timesteps, MAX_TRAJECTORY_COLUMNS - 1).tolist()
    print(_report(summary, table, rows))
    write_report(out / "rate_distortion.json", document(args, bound, summary, terms))
    write_csv(out / "rate_distortion.csv", _rows(table))
    _plot(table, out / "rate_distortion.png")
    print(out / "rate_distortion.json", out / "rate_distortion.csv", sep="\n")
    print(out / "rate_distortion.png")
    count, channels = min(args.pictures, len(bound.dataset)), bound.dataset.channels
    if count and channels not in MODES:
        print(f"no pictures: a PNG cannot hold {channels} channels")
    elif count:
        _picture_data(bound, rows, count, args.seed, out / "progressive_data.png")
        _picture_samples(bound, rows, count, args.seed, out / "progressive_samples.png")
        print(out / "progressive_data.png", out / "progressive_samples.png", sep="\n")


def _report(summary: BitsPerDim, table: RateDistortion, rows: list[int]) -> str:
    """The split that the paper gives, and the table's rows that are pictured."""
    lines = [
        f"{summary.count} images: {with_error(summary.total, summary.total_stderr)} bits/dim",
        f"  rate        {table.rate[-2]:.4f}   down to the last x_t, "
        f"where the RMSE is {table.distortion[-2]:.2f} of 255",
        f"  distortion  {summary.decoder:.4f}   the decoder's, from there to no error at all",
        "",
        "timestep t   bits/dim received   RMSE of 255",
    ]
    for row in [*rows, len(table.rate) - 1]:
        t = table.timestep[row]
        lines.append(
            f"{'lossless' if t < 0 else t:>10}   {table.rate[row]:>17.4f}   "
            f"{table.distortion[row]:>11.2f}"
        )
    return "\n".join(lines)


def _rows(table: RateDistortion) -> list[dict[str, int | float]]:
    names = ("timestep", "rate_bits_per_dim", "distortion_rmse")
    columns = (table.timestep, table.rate, table.distortion)
    values = zip(*(column.tolist() for column in columns), strict=True)
    return [dict(zip(names, row, strict=True)) for row in values]


def _plot(table: RateDistortion, path: Path) -> None:
    """Distortion and rate over the reverse steps, and one over the other (figure 5)."""
    figure = require("matplotlib.figure", "demo").Figure(figsize=(12, 3.6), layout="constrained")
    error, bits, over_rate = figure.subplots(1, 3)
    rate, distortion = table.rate[:-1], table.distortion[:-1]
    steps = np.arange(len(rate))  # 0: with x_T alone
    distorted, received = "distortion (RMSE, 0 … 255)", "rate (bits/dim)"
    for axes, x, y, names in (
        (error, steps, distortion, ("reverse process steps", distorted)),
        (bits, steps, rate, ("reverse process steps", received)),
        (over_rate, rate, distortion, (received, distorted)),
    ):
        axes.plot(x, y, color="black", linewidth=1.6)
        axes.set(xlabel=names[0], ylabel=names[1], ylim=(0, None))
        axes.grid(True, alpha=0.3)
    over_rate.plot(table.rate[-2:], table.distortion[-2:], ":", color="black", label="lossless")
    over_rate.legend(fontsize="small")
    with replacing(path) as stream:
        figure.savefig(stream, format="png", dpi=110)


@torch.no_grad()
def _picture_data(bound: Bound, rows: list[int], count: int, seed: int, path: Path) -> None:
    """A row for each of the first images: what the receiver of its x_t expects, and the image."""
    x_start, kwargs = bound.images(0, count)
    model, drawn, diffusion = bound.model, counter_noise(x_start, seed, 0), bound.diffusion
    frames = []
    for row in rows:
        t = diffusion.num_timesteps - 1 - row
        at = torch.full((count,), t, device=x_start.device)
        x_t = diffusion.q_sample(x_start, at, drawn(t))  # that which was scored
        out = diffusion.p_mean_variance(model, x_t, at, model_kwargs=kwargs)
        frames.append(to_uint8(out["pred_xstart"]))
    save_trajectory([*frames, to_uint8(x_start)], path)


def _picture_samples(bound: Bound, rows: list[int], count: int, seed: int, path: Path) -> None:
    """The same of new samples (of the images' classes, where there are any), as they are drawn."""
    x_start, kwargs = bound.images(0, count)
    condition = networks.self_condition(bound.checkpoint)
    sampler = Sampler(bound.checkpoint.model, bound.diffusion, self_condition=condition)
    trajectory = Trajectory(count, rows, "x0")
    sampler.sample(x_start.shape, seed=seed, model_kwargs=kwargs, callback=trajectory.add)
    save_trajectory(channels_first(np.stack(trajectory.moments)), path)
