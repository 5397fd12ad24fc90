"""``fastdiff average``: a power-function average of any width, made of a run's snapshots."""

import argparse

from fastdiff.checkpoints.checkpoint import save
from fastdiff.checkpoints.snapshots import reconstruct
from fastdiff.commands.checkpoint_options import new_directory
from fastdiff.models.ema import power_name

FAR = 0.05  # of a profile's norm: more than this is another average


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "--run",
        required=True,
        metavar="RUN_DIR",
        dest="run_dir",
        help="a run trained with --ema-sigma-rel and --ema-snapshot-every",
    )
    parser.add_argument(
        "--sigma-rel",
        type=float,
        required=True,
        metavar="X",
        help="the width wanted: the standard deviation of the memory as a share of the steps",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="one with snapshots (default: the newest)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")


def run(args: argparse.Namespace) -> int:
    out = new_directory(args.out)
    made = reconstruct(args.run_dir, args.sigma_rel, getattr(args, "step", None))
    found = made.checkpoint
    path = save(out, found.model, diffusion=found.diffusion, step=found.step, info=found.info)
    print(
        f"{power_name(args.sigma_rel)} of step {found.step}, of {made.snapshots} snapshots: its "
        f"profile is off by {100 * made.off:.2g} %"
    )
    if made.off > FAR:
        print(
            "warning: that is another average than was asked for; take a width nearer to those of "
            "the snapshots, or train with more of them"
        )
    print(path)
    return 0
