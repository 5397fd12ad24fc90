"""What ``fastdiff sample`` makes of several networks, and of small images: a ``Cascade``."""

import argparse
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands import networks
from fastdiff.commands.class_options import class_names
from fastdiff.data import ImageDataset, load_dataset, match_classes
from fastdiff.errors import InputError
from fastdiff.images import to_float
from fastdiff.sampling.cascade import Cascade, Stage
from fastdiff.sampling.sampler import Sampler

BETWEEN = "/"  # of options that each network has its own of: commas separate sections of steps
STEPS_OF_MANY = f"; of a cascade one for all its networks, or one for each: 250{BETWEEN}27"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--low-res",
        default=argparse.SUPPRESS,
        metavar="SPEC",
        help="for a super-resolution network alone: the small images, a .npz, a folder or whatever "
        "train's --data takes; image i is made of the i-th, over and over",
    )
    parser.add_argument(
        "--cond-noise",
        default="0",
        metavar="X",
        help="noise the small images to this level, for networks that were trained with one "
        f"(default: 0, not); one for all super-resolution networks, or one for each: 0.1{BETWEEN}0",
    )
    parser.add_argument(
        "--cond-truncated",
        action="store_true",
        help="of --cond-noise in a cascade: stop the smaller network at that level instead",
    )


def checkpoint_paths(args: argparse.Namespace) -> list[str]:
    """Of the networks, in the order in which they are sampled. InputError for options that several
    networks do not go with."""
    if args.cascade is None:
        return [args.checkpoint]
    paths = [path.strip() for path in args.cascade.split(",")]
    if len(paths) < 2 or not all(paths):
        raise InputError(
            f"--cascade {args.cascade}: expected two checkpoints or more, the smallest first, with "
            "commas between them; --checkpoint samples one"
        )
    if args.low_res is not None:
        raise InputError("--low-res is for a super-resolution network alone, by --checkpoint")
    if args.timesteps is not None:
        raise InputError("--timesteps are of one network, by --checkpoint; a cascade takes --steps")
    return paths


def of_each(option: str, text: str, count: int) -> list[str]:
    """What ``text`` says of each of ``count`` networks: one word for all, or one for each."""
    parts = text.split(BETWEEN)
    if len(parts) not in (1, count):
        raise InputError(
            f"{option} {text} is for {len(parts)} networks, there are {count}: give one for all, "
            f"or one for each with {BETWEEN} between them"
        )
    return parts * count if len(parts) == 1 else parts


def cascade_of(
    args: argparse.Namespace, checkpoints: Sequence[Checkpoint], samplers: Sequence[Sampler]
) -> Cascade:
    """What samples them. InputError for networks that do not follow each other."""
    _check_classes(checkpoints)
    noised = [networks.is_upsampler(checkpoint) for checkpoint in checkpoints]
    noised[0] |= not any(noised)  # a level that no network takes is refused by the first
    levels = iter(of_each("--cond-noise", args.cond_noise, sum(noised)))
    stages = [
        _stage(checkpoint, sampler, _level(next(levels)) if takes else 0.0)
        for checkpoint, sampler, takes in zip(checkpoints, samplers, noised, strict=True)
    ]
    return Cascade(stages, truncated=args.cond_truncated, rounding=rounding(args))


def rounding(args: argparse.Namespace) -> str:
    return "truncate" if args.truncate else "nearest"


def _level(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise InputError(f"--cond-noise is {word!r}; expected a number in [0, 1]") from None


def _stage(checkpoint: Checkpoint, sampler: Sampler, noise_level: float) -> Stage:
    upsampler = networks.is_upsampler(checkpoint)
    return Stage(
        sampler,
        networks.image_shape(checkpoint),
        low_res_size=networks.small_size(checkpoint) if upsampler else None,
        cond_noise=networks.cond_noise(checkpoint),
        noise_level=noise_level,
        name=str(checkpoint.path),
    )


def _check_classes(checkpoints: Sequence[Checkpoint]) -> None:
    """InputError unless a label means the same to all networks that take one.

    An upsampler may do without. The base may not, where another network needs to be told what its
    images show.
    """
    base = checkpoints[0]
    count, names = networks.num_classes(base), class_names(base)
    for other in checkpoints[1:]:
        theirs, their_names = networks.num_classes(other), class_names(other)
        if theirs not in (None, count):
            raise InputError(
                f"{other.path} has {theirs} classes, and {base.path} {count or 'none'}: the "
                "networks of a cascade draw the same"
            )
        if None not in (names, their_names) and names != their_names:
            raise InputError(
                f"the classes of {other.path} have other names than those of {base.path}, or "
                "another order: the networks of a cascade draw the same"
            )


def small_images(args: argparse.Namespace, checkpoint: Checkpoint) -> "SmallImages | None":
    """Those of --low-res for the first network. InputError where it needs some and has none, or has
    classes and nothing says which of them the images show."""
    if args.low_res is None:
        if networks.is_upsampler(checkpoint):
            raise InputError(
                f"{checkpoint.path} is a super-resolution network: give small images by --low-res, "
                "or the network that draws them before it, by --cascade"
            )
        return None
    found = SmallImages(args.low_res, checkpoint)
    classes = networks.num_classes(checkpoint)
    if classes is not None and found.labels is None and args.classes is None:
        raise InputError(
            f"--low-res {args.low_res} does not say what its images show, and {checkpoint.path} "
            f"has {classes} classes: give --classes"
        )
    return found


class SmallImages:
    """The images of --low-res; image number i is made of the i-th of them, over and over.

    Attributes:
        labels: int64 (N,), numbered as the network's classes; None: nothing says what they show.
    """

    def __init__(self, spec: str, checkpoint: Checkpoint) -> None:
        if not networks.is_upsampler(checkpoint):
            raise InputError(f"--low-res {spec}: {checkpoint.path} is no super-resolution network")
        self.spec = spec
        self.images = _open(spec, checkpoint)
        classes = networks.num_classes(checkpoint)
        self.labels = None
        if classes is not None and self.images.labels is not None:
            names = class_names(checkpoint)
            self.labels = match_classes(self.images, names, classes, f"--low-res {spec}").labels

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, numbers: np.ndarray) -> Tensor:
        """(n, C, h, w) floats in [-1, 1], of the images ``numbers`` (n,)."""
        return to_float(self.images.gather(numbers % len(self)))

    def labels_of(self, numbers: np.ndarray) -> Tensor | None:
        """int64 (n,): what they show."""
        return None if self.labels is None else torch.from_numpy(self.labels[numbers % len(self)])

    def fingerprint(self) -> str:
        """What tells these images and labels from all others."""
        digest = hashlib.sha256()
        for start in range(0, len(self), 256):
            numbers = np.arange(start, min(start + 256, len(self)))
            digest.update(self.images.gather(numbers).numpy().tobytes())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return f"{len(self)} images, sha256 {digest.hexdigest()[:16]}"


def _open(spec: str, checkpoint: Checkpoint) -> ImageDataset:
    """InputError for images of another size or other channels than the network is given."""
    images = load_dataset(spec, class_cond=None, known_classes=class_names(checkpoint) or ())
    wanted = networks.channels(checkpoint), *networks.small_size(checkpoint)
    if images.shape != wanted:
        (c, h, w), (height, width) = wanted, images.image_size
        raise InputError(
            f"--low-res {spec} has {images.channels}-channel images of {height}x{width}; "
            f"{checkpoint.path} upsamples {c}-channel ones of {h}x{w}"
        )
    return images
