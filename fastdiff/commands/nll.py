"""``fastdiff nll``: the variational bound on −log p(x) of images, in bits per dimension."""

import argparse

import numpy as np

from fastdiff.commands.bound import (
    Bound,
    Terms,
    add_bound_arguments,
    check_bound_arguments,
    document,
    summarize,
    with_error,
)
from fastdiff.commands.checkpoint_options import describe
from fastdiff.commands.output import said_once
from fastdiff.commands.reports import check_report, write_report
from fastdiff.process.likelihood import BitsPerDim
from fastdiff.ranks import join


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bound_arguments(parser)
    parser.add_argument(
        "--out",
        default=argparse.SUPPRESS,
        metavar="FILE.json",
        help="write there every term, timestep by timestep, and the rate-distortion table",
    )


def run(args: argparse.Namespace) -> int:
    vars(args).setdefault("out", None)
    check_bound_arguments(args)
    ranks = join(getattr(args, "device", None))
    with ranks.heard(), said_once(ranks):
        bound = ranks.together(lambda: Bound.of(args, ranks.device))
        ranks.agree(bound.facts())
        if args.out is not None:
            parts = ("checkpoint", "bits_per_dim", "steps")
            ranks.on_first(lambda: check_report(args.out, parts))
        print(describe(bound.checkpoint, args.weights))
        terms = bound.score(args.batch_size, args.seed, ranks)
        ranks.on_first(lambda: _finish(args, bound, terms))
        ranks.leave()
    return 0


def _finish(args: argparse.Namespace, bound: Bound, terms: Terms) -> None:
    """Sum up, write, print."""
    summary = summarize(terms)
    if args.out is not None:  # before anything can go wrong with printing
        write_report(args.out, document(args, bound, summary, terms))
    print(_report(summary))
    if args.out is not None:
        print(args.out)


def _report(summary: BitsPerDim) -> str:
    """The total with its standard error, its parts, and the steps' terms by quartile."""
    lines = [
        f"{summary.count} images: {with_error(summary.total, summary.total_stderr)} bits/dim",
        f"  prior    {with_error(summary.prior, summary.prior_stderr)}   KL of q(x_T | x_0)",
        f"  rate     {with_error(summary.rate, summary.rate_stderr)}   KL terms, t > 0",
        f"  decoder  {with_error(summary.decoder, summary.decoder_stderr)}   "
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
