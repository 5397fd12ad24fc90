"""Guidance by a network's own answer without a condition, or by a weaker network's."""

import argparse
from typing import Any

import numpy as np

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands import networks
from fastdiff.commands.checkpoint_options import load_checkpoint
from fastdiff.errors import InputError

# Of the options below those that have no default of their own, and those that decide what is drawn.
OPTIONAL = ("guidance_scale", "guide", "guidance_reuse")
DECISIVE = ("guidance_scale", "guidance_rescale", "guidance_reuse")


def add_guidance_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=argparse.SUPPRESS,
        help="classifier-free guidance, for a network trained with label dropout, or by --guide "
        "(of a cascade: its base; default: none)",
    )
    parser.add_argument(
        "--guide",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="guide by this weaker network (smaller, or trained for less long) of the same images "
        "and process, in place of the network without its label: autoguidance",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="PHI",
        help="of guidance: bring the guided output's standard deviation back to the conditional's, "
        "by this share (0 none, 1 wholly)",
    )
    parser.add_argument(
        "--guidance-reuse",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="of guidance: run the unconditional half, or the guide, at every Nth step, and reuse "
        "its difference between (default: at every step)",
    )


def load_guide(args: argparse.Namespace, guided: Checkpoint) -> Checkpoint | None:
    """The network of --guide, None where none is asked for. InputError for one that cannot guide
    ``guided``, and for options of guidance without a scale."""
    if args.guidance_scale is None:
        for name in ("guide", "guidance_reuse", "guidance_rescale"):
            if getattr(args, name):
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} goes with --guidance-scale, which is not given")
        return None
    if args.guide is None:
        if networks.null_label(guided) is None:
            raise InputError(
                "--guidance-scale needs a network that was trained with label dropout "
                "(it has a class of its own for 'no label'), or a --guide; this one was not"
            )
        return None
    found = load_checkpoint(args.guide, args.weights, getattr(args, "device", None))
    for words, fact in (
        ("images of {}x{}", networks.image_size),
        ("{} channels", lambda checkpoint: (networks.channels(checkpoint),)),
        ("{} classes", lambda checkpoint: (networks.num_classes(checkpoint),)),
        ("predictions of {}", lambda checkpoint: (checkpoint.diffusion.mean_type,)),
    ):
        theirs, ours = fact(found), fact(guided)
        if theirs != ours:
            raise _misfit(found, guided, words.format(*theirs), words.format(*ours))
    for level in ("signal_scale", "noise_scale", "model_timesteps"):
        theirs, ours = (getattr(of.diffusion, level) for of in (found, guided))
        if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=1e-3, atol=0):
            raise _misfit(found, guided, "another process", "its own: train one for that")
    return found


def guidance_arguments(
    args: argparse.Namespace, checkpoint: Checkpoint, guide: Checkpoint | None
) -> dict[str, Any]:
    """Sampler's of these options, for the network that is guided."""
    if args.guidance_scale is None:
        return {}
    return {
        "guidance_scale": args.guidance_scale,
        "guidance_rescale": args.guidance_rescale,
        "guidance_reuse": args.guidance_reuse,
        "guide": None if guide is None else guide.model,
    }


def _misfit(guide: Checkpoint, guided: Checkpoint, theirs: str, ours: str) -> InputError:
    return InputError(
        f"--guide {guide.path} is for {theirs}, the network of {guided.path} for {ours}"
    )
