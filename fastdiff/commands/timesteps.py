"""``fastdiff timesteps``: the timesteps at which a checkpoint's few steps come nearest to many.

What it finds is a file for ``fastdiff sample --timesteps``.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands import networks
from fastdiff.commands.checkpoint_options import (
    add_checkpoint_arguments,
    describe,
    load_checkpoint,
    writable_folder,
)
from fastdiff.commands.method_options import add_method_option, named_method_options
from fastdiff.commands.numbers import check_least
from fastdiff.errors import InputError
from fastdiff.methods.registry import METHODS
from fastdiff.optional import require
from fastdiff.sampling.measured_timesteps import measured_timesteps

# Options without a default of their own.
OPTIONAL = ("method_option", "guidance_scale")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the .json that is written")
    parser.add_argument("--steps", type=int, default=10, help="how many to choose, 2 or more")
    parser.add_argument(
        "--method", choices=METHODS, default="dpmsolver++", metavar="NAME", help=", ".join(METHODS)
    )
    add_method_option(parser)
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=argparse.SUPPRESS,
        help="classifier-free guidance, for a network trained with label dropout (default: none)",
    )
    parser.add_argument(
        "--budget",
        type=int,
        default=1200,
        help="the most network calls, of --num samples each: --fine-steps and those of each trial",
    )
    parser.add_argument(
        "--fine-steps", type=int, default=200, help="of the solution that is to be come near to"
    )
    parser.add_argument("--num", type=int, default=32, help="samples whose errors are measured")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--rounded",
        action="store_true",
        help="whole timesteps only, where a network takes no others",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network"
    )


def run(args: argparse.Namespace) -> int:
    for name in OPTIONAL:
        vars(args).setdefault(name, None)
    check_least(args, 1, "num", "fine_steps")
    check_least(args, 0, "seed")
    out = Path(args.out)
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; expected a file, such as {out}/timesteps.json")
    checkpoint = load_checkpoint(args.checkpoint, args.weights, getattr(args, "device", None))
    kwargs, uncond_kwargs = _labels(args, checkpoint)
    writable_folder(out.parent)
    print(describe(checkpoint, args.weights))
    with require("tqdm", "train").tqdm(total=args.budget, unit="call") as bar:

        def progress(calls: int, error: float) -> None:
            bar.set_description(f"error {error:.4g}")
            bar.update(calls - bar.n)

        found = measured_timesteps(
            checkpoint.model,
            checkpoint.diffusion,
            args.steps,
            shape=(args.num, *networks.image_shape(checkpoint)),
            budget=args.budget,
            method=args.method,
            method_options=named_method_options(args.method, args.method_option),
            fine_steps=args.fine_steps,
            seed=args.seed,
            rounded=args.rounded,
            model_kwargs=kwargs,
            uncond_kwargs=uncond_kwargs,
            progress=progress,
            guidance_scale=args.guidance_scale,
            dtype=torch.bfloat16 if args.dtype == "bfloat16" else None,
            self_condition=networks.self_condition(checkpoint),
        )
    found.save(out)
    for spacing, error in found.by_spacing.items():
        print(f"{spacing}: error {error:.4g}")
    print(f"measured: error {found.error:.4g}, after {found.calls} network calls of {args.num}")
    print(f"timesteps {', '.join(f'{step:.6g}' for step in found.timesteps)}")
    print(out)
    return 0


def _labels(
    args: argparse.Namespace, checkpoint: Checkpoint
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The network's arguments, classes in turn, and those without a condition. InputError for
    guidance of a network that has none."""
    classes, null = networks.num_classes(checkpoint), networks.null_label(checkpoint)
    if args.guidance_scale is not None and null is None:
        raise InputError(
            "--guidance-scale needs a network that was trained with label dropout "
            "(it has a class of its own for 'no label'); this one was not"
        )
    if classes is None:
        return {}, None
    kwargs = networks.labelled(checkpoint, torch.arange(args.num) % classes)
    if args.guidance_scale is None or null is None:
        return kwargs, None
    return kwargs, networks.unlabelled(kwargs, null)
