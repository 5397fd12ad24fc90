"""``fastdiff interpolate``: what a checkpoint's process knows between two images.

A row of the picture is a pair of images and what lies between them: the first image, mixtures of
weight 0 … 1, the second. By shared noise (Ho et al. 2020, figures 8 and 9) there is a row for each
number of steps that the images are noised by; by DDIM (Song et al. 2020, figure 6) one for a pair.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands import networks
from fastdiff.commands.checkpoint_options import (
    add_checkpoint_arguments,
    describe,
    load_checkpoint,
    new_directory,
    writable_folder,
)
from fastdiff.commands.class_options import choose_classes, class_names, is_number
from fastdiff.commands.data_options import KINDS_OF_DATA, add_reading_arguments
from fastdiff.commands.method_options import add_method_option, named_method_options
from fastdiff.commands.network_data import network_dataset, network_pictures
from fastdiff.commands.numbers import check_least
from fastdiff.commands.step_options import OPTIONAL as STEP_OPTIONAL
from fastdiff.commands.step_options import add_step_arguments, step_arguments
from fastdiff.errors import InputError
from fastdiff.files import replacing
from fastdiff.images import MODES, channels_first, save_grid, to_bytes, to_float
from fastdiff.methods.registry import METHODS
from fastdiff.optional import require
from fastdiff.process.low_res import level_of
from fastdiff.sampling.interpolation import encode, lerp, slerp, through_noise
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import AUTO

MODES_OF_MIXING = ("shared-noise", "ddim")
# Options without a default of their own.
OPTIONAL = ("data", "t", "method", "method_option", "classes", "scale", *STEP_OPTIONAL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--between",
        action="append",
        nargs="+",
        required=True,
        default=argparse.SUPPRESS,
        metavar="IMAGE",
        help="two images: their numbers in --data, or two image files; may be given several times",
    )
    parser.add_argument("--data", default=argparse.SUPPRESS, metavar="SPEC", help=KINDS_OF_DATA)
    add_reading_arguments(parser)
    parser.add_argument(
        "--out",
        required=True,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="a new or empty folder: interpolation.png and interpolation.npz",
    )
    parser.add_argument(
        "--mode",
        choices=MODES_OF_MIXING,
        default=MODES_OF_MIXING[0],
        help="noise both by one draw, mix linearly and denoise; or encode both by DDIM, or another "
        "--method without noise, mix spherically and decode",
    )
    parser.add_argument(
        "--t",
        default=argparse.SUPPRESS,
        metavar="LIST",
        help="of shared-noise: by how many of the process's steps to noise, a row for each, "
        "0,250,500; 0 mixes the pixels (default: quarters of the process)",
    )
    parser.add_argument("--columns", type=int, default=9, help="mixtures, of weights 0 … 1")
    add_step_arguments(parser)
    parser.add_argument(
        "--method",
        choices=(*METHODS, AUTO),
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="the sampler, of ddim one that draws no noise: of fastdiff sample --method (default: "
        "ddpm, and ddim)",
    )
    add_method_option(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--classes",
        action="append",
        default=argparse.SUPPRESS,
        metavar="A[,B]",
        help="for a network with classes: that of all images, or of the first and of the second "
        "of every pair (default: the data's); a mixture has that of the nearer image",
    )
    parser.add_argument(
        "--scale",
        type=int,
        default=argparse.SUPPRESS,
        help="enlargement in the picture (default: enough to look at)",
    )


def run(args: argparse.Namespace) -> int:
    for name in OPTIONAL:
        vars(args).setdefault(name, None)
    _check_numbers(args)
    checkpoint = load_checkpoint(args.checkpoint, args.weights, getattr(args, "device", None))
    sampler = _sampler(args, checkpoint)
    levels = _levels(args, checkpoint, sampler) if args.mode == "shared-noise" else []
    pairs = _pairs(args, checkpoint)
    out = writable_folder(new_directory(args.out))
    print(describe(checkpoint, args.weights))
    rows = _by_noise(args, sampler, pairs, levels) if levels else _by_ddim(args, sampler, pairs)
    count = len(pairs.images) * max(1, len(levels))
    bar = require("tqdm", "train").tqdm(rows, total=count, desc="interpolating", unit="row")
    found = list(bar)
    print(_report(pairs, found))
    _write(args, pairs, found, out)
    return 0


@dataclass(frozen=True)
class _Pairs:
    """images: (P, 2, C, H, W) in [-1, 1], on the network's device. labels: int64 (P, 2), None for a
    network without classes."""

    images: Tensor
    labels: Tensor | None
    checkpoint: Checkpoint

    def kwargs(self, pair: int, weights: Tensor) -> dict[str, Tensor]:
        """The network's arguments for mixtures of a pair: each has the nearer image's label."""
        if self.labels is None:
            return {}
        return networks.labelled(self.checkpoint, self.labels[pair, (weights > 0.5).long()])


@dataclass(frozen=True)
class _Row:
    """images: (M, C, H, W) in [-1, 1], between those of a pair. t: how many steps of the process
    both were taken up."""

    pair: int
    t: int
    images: Tensor


def _by_noise(
    args: argparse.Namespace, sampler: Sampler, pairs: _Pairs, levels: list[tuple[int, int]]
) -> Iterator[_Row]:
    """Rows pair by pair; a pair draws the same noise at every level."""
    weights = torch.linspace(0, 1, args.columns)
    for pair, (first, second) in enumerate(pairs.images):
        mixed, kwargs = lerp(first, second, weights), pairs.kwargs(pair, weights)
        for steps, t in levels:
            draws: dict[str, Any] = {"seed": args.seed, "number": pair}
            yield _Row(pair, t, through_noise(sampler, mixed, steps, **draws, model_kwargs=kwargs))


def _by_ddim(args: argparse.Namespace, sampler: Sampler, pairs: _Pairs) -> Iterator[_Row]:
    """A row for each pair."""
    weights, ends = torch.linspace(0, 1, args.columns), torch.tensor([0.0, 1.0])
    for pair, images in enumerate(pairs.images):
        first, second = encode(sampler, images, pairs.kwargs(pair, ends))
        mixed, kwargs = slerp(first, second, weights), pairs.kwargs(pair, weights)
        decoded = sampler.sample(mixed.shape, noise=mixed, model_kwargs=kwargs)
        yield _Row(pair, sampler.process.num_timesteps, decoded)


def _report(pairs: _Pairs, rows: list[_Row]) -> str:
    """How much of the images themselves is left in each row, where the weights are 0 and 1."""
    lines = ["pair      t   RMSE of the first and the second image (of 255)"]
    for row in rows:
        ends = row.images[[0, -1]].clamp(-1, 1)
        first, second = (ends - pairs.images[row.pair]).square().mean(dim=(1, 2, 3)).sqrt() * 127.5
        lines.append(f"{row.pair:>4}  {row.t:>5}   {first:.2f}  {second:.2f}")
    return "\n".join(lines)


def _write(args: argparse.Namespace, pairs: _Pairs, rows: list[_Row], out: Path) -> None:
    """The picture, and the mixtures with what each is."""
    ends = np.stack([to_bytes(images) for images in pairs.images])
    mixtures = [to_bytes(row.images) for row in rows]
    each: dict[str, Any] = {"pair": [row.pair for row in rows], "t": [row.t for row in rows]}
    arrays: dict[str, Any] = {name: np.repeat(of, args.columns) for name, of in each.items()}
    arrays |= {"weight": np.tile(np.linspace(0, 1, args.columns), len(rows)), "ends": ends}
    with replacing(out / "interpolation.npz") as stream:
        np.savez(stream, np.concatenate(mixtures), **arrays)
    print(out / "interpolation.npz")
    if pairs.images.shape[2] not in MODES:
        print(f"no picture: a PNG cannot hold {pairs.images.shape[2]} channels")
        return
    shown = [
        image
        for row, images in zip(rows, mixtures, strict=True)
        for image in (ends[row.pair][0], *images, ends[row.pair][1])
    ]
    columns, picture = args.columns + 2, out / "interpolation.png"
    print(save_grid(channels_first(np.stack(shown)), picture, columns=columns, scale=args.scale))


# --- What the options mean --------------------------------------------------------------------


def _check_numbers(args: argparse.Namespace) -> None:
    if args.columns < 2:
        raise InputError(f"--columns is {args.columns}; expected 2 or more, the ends among them")
    check_least(args, 1, "scale")
    check_least(args, 0, "seed")
    for pair in args.between:
        if len(pair) != 2:
            raise InputError(
                f"--between {' '.join(pair)}: {len(pair)} image{'s' * (len(pair) > 1)}; expected "
                "two, and --between again for another pair"
            )
    if args.mode == "ddim" and args.t is not None:
        raise InputError("--t is of --mode shared-noise; ddim goes its own way through all steps")


def _sampler(args: argparse.Namespace, checkpoint: Checkpoint) -> Sampler:
    method = args.method or ("ddim" if args.mode == "ddim" else "ddpm")
    sampler = Sampler(
        checkpoint.model,
        checkpoint.diffusion,
        **step_arguments(args, args.steps, checkpoint, method),
        method=method,
        method_options=named_method_options(method, args.method_option),
        self_condition=networks.self_condition(checkpoint),
    )
    if args.mode == "ddim":
        sampler.settings.encoding_table(sampler.diffusion)  # refuses what draws noise, at once
    return sampler


def _levels(
    args: argparse.Namespace, checkpoint: Checkpoint, sampler: Sampler
) -> list[tuple[int, int]]:
    """(steps of the sampler, steps of the process) of each row: to the level that the sampler has
    nearest to the one that was asked for."""
    process, strided = (
        level_of(each.signal_scale, each.noise_scale)  # finite where no signal is left, too
        for each in (checkpoint.diffusion, sampler.diffusion)
    )
    found = []
    for t in _steps_to_noise(args.t, len(process)):
        if t == 0:
            found.append((0, 0))
            continue
        row = int(np.abs(strided - process[t - 1]).argmin())
        taken = 1 + int(np.abs(process - strided[row]).argmin())
        if taken != t:
            print(f"t = {t}: the nearest of {len(strided)} steps is t = {taken}")
        found.append((row + 1, taken))
    return found


def _steps_to_noise(text: str | None, steps: int) -> list[int]:
    """--t, or quarters of the process. InputError for what it has not got."""
    if text is None:
        return sorted({round(part * steps / 4) for part in range(5)})
    words = [word.strip() for word in text.split(",")]
    if wrong := [word for word in words if not is_number(word, steps + 1)]:
        raise InputError(
            f"--t {text}: {wrong[0]!r}; expected numbers 0 … {steps}, the steps of the process, "
            "with commas between them"
        )
    return [int(word) for word in words]


def _pairs(args: argparse.Namespace, checkpoint: Checkpoint) -> _Pairs:
    """The images of --between, with labels where the network takes any."""
    named = [name for pair in args.between for name in pair]
    classes = networks.num_classes(checkpoint)
    labels = None
    if args.classes is not None or (classes is not None and args.data is None):
        labels = _labels(args.classes, checkpoint, len(args.between))
    if args.data is None:
        dataset = network_pictures(list(map(Path, named)), checkpoint, "--between", "interpolation")
        numbers = np.arange(len(named))
    else:
        dataset = network_dataset(args, checkpoint, "interpolation", labelled=labels is None)
        numbers = np.array([_number(name, len(dataset)) for name in named])
        if labels is None and classes is not None:
            labels = dataset.gather_labels(numbers).unflatten(0, (-1, 2))
    device = next(checkpoint.model.parameters()).device
    images = to_float(dataset.gather(numbers).to(device)).unflatten(0, (-1, 2))
    return _Pairs(images, labels, checkpoint)


def _number(name: str, count: int) -> int:
    if not is_number(name, count):
        raise InputError(
            f"--between: {name!r} is no image of --data; expected numbers 0 … {count - 1} "
            "(image files are given without --data)"
        )
    return int(name)


def _labels(texts: list[str] | None, checkpoint: Checkpoint, pairs: int) -> Tensor:
    """int64 (pairs, 2), of --classes."""
    count, names = networks.num_classes(checkpoint), class_names(checkpoint)
    if texts is None:
        raise InputError(f"the network has {count} classes: give --classes for the image files")
    chosen = choose_classes(texts, count, names)
    if len(chosen) not in (1, 2):
        raise InputError(
            f"--classes {','.join(texts)}: {len(chosen)} classes; expected one for all images, or "
            "two, for the first and the second of every pair"
        )
    return torch.tensor([chosen[0], chosen[-1]]).expand(pairs, 2)
