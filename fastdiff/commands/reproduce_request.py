"""What ``fastdiff reproduce`` is asked for, checked: an experiment, its data, its checkpoints."""

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands import networks
from fastdiff.commands.checkpoint_options import load_checkpoint
from fastdiff.commands.config_file import Reader
from fastdiff.commands.data_options import reading_options
from fastdiff.commands.train_options import part_of
from fastdiff.commands.train_process import build_process
from fastdiff.data import ImageDataset, load_dataset
from fastdiff.errors import InputError
from fastdiff.experiments.scaling import Scale
from fastdiff.experiments.table import (
    AnyExperiment,
    Experiment,
    OverCompute,
    OverSteps,
    named,
)
from fastdiff.models import presets
from fastdiff.models.unet import UNet
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.training import TrainConfig

# Of the network's arguments: what a checkpoint may have otherwise than the preset. Its classes and
# channels are the data's.
FREE = {"dropout", "image_size", "num_classes", "in_channels", "out_channels"}


@dataclass(frozen=True)
class Training:
    """A training of a preset with flags, as ``fastdiff train`` has it."""

    preset: str
    flags: tuple[str, ...]

    @cached_property
    def given(self) -> Mapping[str, Any]:
        return vars(parsed("train", ("--out", "-", "--preset", self.preset, *self.flags)))

    @cached_property
    def config(self) -> TrainConfig:
        return TrainConfig(**{**presets.get(self.preset).train, **part_of(self.given, "train")})

    @cached_property
    def model(self) -> dict[str, Any]:
        return {**presets.get(self.preset).model, **part_of(self.given, "model")}

    @cached_property
    def diffusion(self) -> GaussianDiffusion:
        recipe, flags = presets.get(self.preset).diffusion, part_of(self.given, "diffusion")
        return build_process(recipe, flags, f"the preset {self.preset}")


@dataclass(frozen=True)
class Request:
    """The arguments of the command.

    Attributes:
        settings: what must be the same when it goes on, JSON values by their names as flags.
        checkpoints: by the flags that name them.
        data: real images; ``eval_data`` those whose bits/dim are measured; ``spec`` and
            ``eval_spec`` name them.
        reading: flags of how the data are read, for every command.
        device: flags that name it, for every command.
    """

    experiment: AnyExperiment
    out: Path
    scale: Scale
    settings: Mapping[str, Any]
    data: ImageDataset
    spec: str
    eval_data: ImageDataset
    eval_spec: str
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
    train_flags: tuple[str, ...] = ()
    sample_flags: tuple[str, ...] = ()
    reading: tuple[str, ...] = ()
    device: tuple[str, ...] = ()

    def training(self, preset: str, *flags: str) -> Training:
        """As the experiment, its scale and then the user's flags have it."""
        whole = Training(preset, flags)
        scaled = self.scale.training(whole.config, whole.model)
        smaller = [word for name, value in scaled.items() for word in (f"--{name}", str(value))]
        return Training(preset, (*flags, *smaller, *self.train_flags))


def parsed(command: str, words: tuple[str, ...]) -> argparse.Namespace:
    """The arguments of one of fastdiff's commands. InputError for words that are none."""
    parser = Reader(add_help=False, allow_abbrev=False)
    import_module(f"fastdiff.commands.{command}").add_arguments(parser)
    try:
        return parser.parse_args(words)
    except InputError as error:
        raise InputError(f"fastdiff {command} {shlex.join(words)}: {error}") from None


def read_request(args: argparse.Namespace) -> Request:
    """InputError where the parts do not fit each other."""
    experiment, scale = named(args.name), Scale(args.scale)
    device = () if args.device is None else ("--device", args.device)
    _check_used(args, experiment)
    checkpoints = _checkpoints(args, experiment)
    shape, classes = _format(experiment, checkpoints)
    reading = reading_options(vars(args))
    data, eval_data = (
        None if spec is None else _dataset(args, spec, experiment.name, shape, classes, reading)
        for spec in (args.data, args.eval_data)
    )
    assert data is not None
    paths = {name: str(checkpoint.path) for name, checkpoint in checkpoints.items()}
    settings = {
        "name": experiment.name,
        "scale": scale.factor,
        **{name: _absolute(getattr(args, name)) for name in ("data", "eval_data")},
        **paths,
        **{name: getattr(args, name) for name in ("image_size", "features", "feature_weights")},
        **{name: getattr(args, name) for name in ("train_flags", "sample_flags")},
        **reading,
    }
    request = Request(
        experiment,
        Path(args.out),
        scale,
        settings,
        data,
        args.data,
        eval_data or data,
        args.eval_data or args.data,
        checkpoints,
        tuple(shlex.split(args.train_flags)),
        tuple(shlex.split(args.sample_flags)),
        _reading_words(args, reading),
        device,
    )
    _check_networks(request)
    return request


def _check_used(args: argparse.Namespace, experiment: AnyExperiment) -> None:
    """InputError for flags of what is not done."""
    if args.train_flags and (args.checkpoint or isinstance(experiment, OverSteps)):
        raise InputError("--train-flags: nothing is trained where checkpoints are given")
    scored = isinstance(experiment, OverCompute) or (
        isinstance(experiment, Experiment) and experiment.bits_per_dim is not None
    )
    if args.eval_data is not None and not scored:
        raise InputError(f"--eval-data: {experiment.name} measures no bits/dim")


def _checkpoints(args: argparse.Namespace, experiment: AnyExperiment) -> dict[str, Checkpoint]:
    """Those that are given, loaded. InputError for one of no use, and where one is missing."""
    takes = {Experiment: ("checkpoint",), OverSteps: ("learned", "fixed"), OverCompute: ()}
    own = takes[type(experiment)]
    given = {
        name: path
        for name in ("checkpoint", "learned", "fixed")
        if (path := getattr(args, name)) is not None
    }
    for name in given:
        if name not in own:
            wanted = " and ".join(f"--{known}" for known in own) or "no checkpoint"
            raise InputError(f"--{name}: {experiment.name} takes {wanted}")
    if isinstance(experiment, OverSteps) and len(given) < len(own):
        raise InputError(
            f"{experiment.name} compares two checkpoints: --learned, with a learned variance, and "
            "--fixed, with a fixed one"
        )
    return {name: load_checkpoint(path, "ema", args.device) for name, path in given.items()}


def _format(
    experiment: AnyExperiment, checkpoints: Mapping[str, Checkpoint]
) -> tuple[tuple[int, int, int], bool]:
    """(C, H, W) of the images, and whether they have classes."""
    if isinstance(experiment, OverSteps):
        one = checkpoints["learned"]
        return networks.image_shape(one), networks.num_classes(one) is not None
    preset = experiment.preset if isinstance(experiment, Experiment) else experiment.presets[0]
    model = presets.get(preset).model
    side = model["image_size"]
    return (model["in_channels"], side, side), model.get("num_classes") is not None


def _dataset(
    args: argparse.Namespace,
    spec: str,
    name: str,
    shape: tuple[int, int, int],
    classes: bool,
    reading: Mapping[str, Any],
) -> ImageDataset:
    if args.image_size not in (None, shape[1]):
        raise InputError(f"--image-size is {args.image_size}; the images of {name} are {shape[1]}")
    dataset = load_dataset(spec, image_size=args.image_size, class_cond=classes, **reading)
    if dataset.shape != shape:
        raise InputError(
            f"{spec} has images of (C, H, W) {dataset.shape}, {name} those of {shape}: give such, "
            f"or --image-size {shape[1]} to resize and crop pictures in {shape[0]} channels"
        )
    print(dataset.describe(), flush=True)
    return dataset


def _absolute(spec: str | None) -> str | None:
    """The path of data as it will be found from another folder too; a name of data stays."""
    return str(Path(spec).resolve()) if spec is not None and Path(spec).exists() else spec


def _reading_words(args: argparse.Namespace, reading: Mapping[str, Any]) -> tuple[str, ...]:
    words = [] if args.image_size is None else ["--image-size", str(args.image_size)]
    for name, value in reading.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return tuple(words)


def _check_networks(request: Request) -> None:
    """InputError where a checkpoint is of another network than the experiment's."""
    experiment = request.experiment
    if isinstance(experiment, OverSteps):
        _check_pair(request.checkpoints["learned"], request.checkpoints["fixed"], request)
    elif isinstance(experiment, Experiment) and request.checkpoints:
        _check_own(request.checkpoints["checkpoint"], experiment, request)


def _check_own(checkpoint: Checkpoint, experiment: Experiment, request: Request) -> None:
    """It is the paper's network, or what it is at this scale."""
    of = f"--checkpoint {checkpoint.path}"
    _check_images(of, checkpoint, request.data)
    problems = []
    for training in (
        Training(experiment.preset, experiment.train),
        request.training(experiment.preset, *experiment.train),
    ):
        problems.append(_difference(checkpoint, training))
    if None not in problems:
        raise InputError(
            f"{of} is another network than that of {experiment.name}: {problems[0]}; give a "
            "checkpoint of it, or leave --checkpoint out to train one"
        )
    guided = any(sampling.passes > 1 for sampling in experiment.samplings)
    if guided and networks.null_label(checkpoint) is None:
        raise InputError(
            f"{of} was trained without label dropout, and {experiment.name} samples with guidance"
        )


def _difference(checkpoint: Checkpoint, training: Training) -> str | None:
    """The first thing in which the network or its process differs, in words."""
    if not isinstance(checkpoint.model, UNet):
        return f"it is a {type(checkpoint.model).__name__}, expected fastdiff's UNet"
    for name, wanted in training.model.items():
        found = checkpoint.model.config[name]
        if name not in FREE and found != (list(wanted) if isinstance(wanted, tuple) else wanted):
            return f"{name} is {found!r}, expected {wanted!r}"
    theirs, ours = checkpoint.diffusion, training.diffusion
    for name in ("num_timesteps", "var_type", "mean_type"):
        found, wanted = getattr(theirs, name), getattr(ours, name)
        if found != wanted:
            return f"{name} is {found!r}, expected {wanted!r}"
    if not np.allclose(theirs.betas, ours.betas, rtol=1e-4):
        return "its noise schedule is another one"
    return None


def _check_pair(learned: Checkpoint, fixed: Checkpoint, request: Request) -> None:
    for name, checkpoint in (("learned", learned), ("fixed", fixed)):
        of = f"--{name} {checkpoint.path}"
        _check_images(of, checkpoint, request.data)
        if not isinstance(checkpoint.model, UNet):
            raise InputError(f"{of} holds a {type(checkpoint.model).__name__}, expected a UNet")
        if not isinstance(checkpoint.diffusion, GaussianDiffusion):
            raise InputError(f"{of} has no GaussianDiffusion")
    if not learned.diffusion.learns_variance or fixed.diffusion.var_type != "fixed_large":
        raise InputError(
            f"--learned has the variance {learned.diffusion.var_type} and --fixed "
            f"{fixed.diffusion.var_type}, expected a learned one and fixed_large"
        )
    if not np.array_equal(learned.diffusion.betas, fixed.diffusion.betas):
        raise InputError("--learned and --fixed have other noise schedules, expected the same")


def _check_images(of: str, checkpoint: Checkpoint, data: ImageDataset) -> None:
    found = networks.image_shape(checkpoint)
    if found != data.shape:
        raise InputError(f"{of} makes images of (C, H, W) {found}, the data are {data.shape}")
    if networks.num_classes(checkpoint) != data.num_classes:
        raise InputError(
            f"{of} has {networks.num_classes(checkpoint) or 'no'} classes, the data "
            f"{data.num_classes or 'none'}"
        )
