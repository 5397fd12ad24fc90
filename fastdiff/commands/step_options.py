"""Which steps of its process a checkpoint is sampled at: by number and spacing, or from a file."""

import argparse
from typing import Any

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands.named_values import named_values
from fastdiff.errors import InputError
from fastdiff.process.respacing import SPACINGS
from fastdiff.process.spacings import spacing_options
from fastdiff.sampling.timesteps_file import MeasuredTimesteps

DEFAULT_STEPS = 50

# Of the options below those that have no default of their own.
OPTIONAL = ("steps", "spacing", "spacing_option", "timesteps")


def add_step_arguments(parser: argparse.ArgumentParser, *, of_many: str = "") -> None:
    """``of_many``: how --steps is given for several networks, where there may be several."""
    parser.add_argument(
        "--steps",
        default=argparse.SUPPRESS,
        help="sampling steps: a number, one per section (10,15,20) or ddimN "
        f"(default: {DEFAULT_STEPS}, or all of a shorter process){of_many}",
    )
    parser.add_argument(
        "--spacing",
        choices=SPACINGS,
        default=argparse.SUPPRESS,
        help=f"which timesteps the steps take (default: {SPACINGS[0]})",
    )
    parser.add_argument(
        "--spacing-option",
        action="append",
        default=argparse.SUPPRESS,
        metavar="NAME=VALUE",
        help="of the spacing: rho=5 of karras and polynomial, alpha=0.5 and beta=0.7 of beta, "
        "and of all these and exponential rounded=True, for a network that is given whole "
        "timesteps; may be given several times",
    )
    parser.add_argument(
        "--timesteps",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="in place of --steps and --spacing: what fastdiff timesteps measured for this network",
    )


def step_arguments(
    args: argparse.Namespace, steps: str | None, checkpoint: Checkpoint, method: str
) -> dict[str, Any]:
    """Sampler's of these options; ``steps``: this network's part of --steps.

    InputError for a spacing's options that are none of its own, and for a file beside other
    options, or of another process or method.
    """
    for name in OPTIONAL:
        vars(args).setdefault(name, None)
    given = args.spacing_option or []
    if args.timesteps is not None:
        if steps or given or args.spacing is not None:
            raise InputError("--timesteps says which steps are taken: leave out --steps and others")
        measured = MeasuredTimesteps.load(args.timesteps)
        return {"timesteps": measured.of_process(checkpoint.diffusion, method)}
    spacing = args.spacing or SPACINGS[0]
    return {
        "steps": steps_of(steps, checkpoint),
        "spacing": args.spacing,
        "spacing_options": named_values(
            "--spacing-option", given, f"--spacing {spacing}", spacing_options(spacing)
        ),
    }


def steps_of(asked: str | None, checkpoint: Checkpoint) -> str | int:
    """--steps, or what is taken where there is none."""
    return asked or min(DEFAULT_STEPS, checkpoint.diffusion.num_timesteps)
