"""``--classifier``: a classifier of noisy images that guides sampling, fit to the network."""

import argparse

import numpy as np

from fastdiff.checkpoints.checkpoint import Checkpoint, load
from fastdiff.checks import is_finite
from fastdiff.commands import networks
from fastdiff.commands.checkpoint_options import describe
from fastdiff.commands.class_options import class_names
from fastdiff.errors import InputError
from fastdiff.methods.table import COLUMNS
from fastdiff.process.classification import NoisyClassification
from fastdiff.process.update import classifier_gain
from fastdiff.sampling.sampler import Sampler

# So many gradients in the first step, or more, leave nothing of an image (1,673 of them, on the
# digits by a cosine schedule). Where a process keeps some signal to its end they are about one.
ASTRAY = 100.0


def add_classifier_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classifier",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="guide by this classifier of noisy images, a checkpoint or a run of fastdiff train "
        "--preset classifier-*; the network may be one without classes (default: none)",
    )
    parser.add_argument(
        "--classifier-scale",
        type=float,
        default=argparse.SUPPRESS,
        metavar="S",
        help="what the classifier's gradient is multiplied by (default: 1)",
    )


def load_classifier(args: argparse.Namespace, guided: Checkpoint) -> Checkpoint | None:
    """The classifier of --classifier, on the device of ``guided``'s network; None where none is
    asked for. InputError for one that cannot guide that network."""
    if args.classifier is None:
        if args.classifier_scale is not None:
            raise InputError("--classifier-scale goes with --classifier, which is not given")
        return None
    if args.classifier_scale is None:
        args.classifier_scale = 1.0
    if not is_finite(args.classifier_scale):
        raise InputError(f"--classifier-scale is {args.classifier_scale}; expected a finite number")
    if networks.is_upsampler(guided):
        raise InputError(
            f"--classifier guides what draws of noise alone, and {guided.path} is a "
            "super-resolution network: guide the network that draws its --low-res"
        )
    device = next(guided.model.parameters()).device
    found = load(args.classifier, device=device)
    if not isinstance(found.diffusion, NoisyClassification):
        raise InputError(
            f"--classifier {found.path} holds no classifier of noisy images but a "
            f"{type(found.model).__name__}; fastdiff train --preset classifier-* trains one"
        )
    _check_fit(found, guided)
    found.model.requires_grad_(False)  # of x alone
    return found


def describe_guidance(classifier: Checkpoint, sampler: Sampler) -> str:
    """A line on the classifier's weights; another where its first step is bound to go astray."""
    line = f"guided by {describe(classifier, 'ema')}"
    table = sampler.table
    if table.method == "ddpm":
        return line
    c = table.packed[0, COLUMNS.index("c")]
    factor = float(c * classifier_gain(sampler.diffusion, table)[0])
    if factor < ASTRAY:
        return line
    return (
        f"{line}\nwarning: at timestep {float(table.timesteps[0]):g} x_t holds hardly any signal, "
        f"and --method {table.method} moves x by {factor:,.0f} times the classifier's gradient "
        "there; take --method ddpm, or a process that ends with more signal (linear)"
    )


def _check_fit(classifier: Checkpoint, guided: Checkpoint) -> None:
    """InputError where the two are of other images, classes or noise."""
    for words, fact in (
        ("images of {}x{}", networks.image_size),
        ("{} channels", lambda checkpoint: (networks.channels(checkpoint),)),
        ("{} classes", lambda checkpoint: (networks.num_classes(checkpoint),)),
        ("the classes {!s:.60}", lambda checkpoint: (class_names(checkpoint),)),
        ("a process of {} steps", lambda checkpoint: (checkpoint.diffusion.num_timesteps,)),
    ):
        theirs, ours = fact(classifier), fact(guided)
        if theirs != ours and None not in (*theirs, *ours):
            raise _misfit(classifier, guided, words.format(*theirs), words.format(*ours))
    process, own = classifier.diffusion.diffusion, guided.diffusion
    for level in ("signal_scale", "noise_scale", "model_timesteps"):
        # Others' schedules are known in float32.
        if not np.allclose(getattr(process, level), getattr(own, level), rtol=1e-3, atol=0):
            how = "timesteps (--rescale-timesteps)" if "time" in level else "noise levels"
            raise _misfit(classifier, guided, f"other {how}", "its own: train one for them")


def _misfit(classifier: Checkpoint, guided: Checkpoint, theirs: str, ours: str) -> InputError:
    return InputError(
        f"--classifier {classifier.path} is for {theirs}, the network of {guided.path} for {ours}"
    )
