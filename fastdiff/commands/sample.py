"""``fastdiff sample``: images from a checkpoint, as a grid, PNGs and .npz.

The unit of work is a batch of images with fixed numbers. Each is a file as soon as it is drawn, so
ranks share the batches and a restart draws those that are missing; then all become one .npz.
"""

import argparse
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands import guidance_options, networks, upsampling
from fastdiff.commands.checkpoint_options import (
    add_checkpoint_arguments,
    describe,
    fingerprint,
    load_checkpoint,
    writable_folder,
)
from fastdiff.commands.class_options import choose_classes, class_names
from fastdiff.commands.classifier_options import (
    add_classifier_arguments,
    describe_guidance,
    load_classifier,
)
from fastdiff.commands.guidance_options import add_guidance_arguments
from fastdiff.commands.method_options import OPTIONAL as METHOD_OPTIONAL
from fastdiff.commands.method_options import add_method_arguments, method_arguments
from fastdiff.commands.numbers import check_least
from fastdiff.commands.sample_parts import Batch, Merged, Parts, split
from fastdiff.commands.step_options import OPTIONAL as STEP_OPTIONAL
from fastdiff.commands.step_options import add_step_arguments, step_arguments
from fastdiff.commands.trajectory import KINDS, Trajectory
from fastdiff.data.spaced import spaced_numbers
from fastdiff.files import remove_unfinished
from fastdiff.images import (
    MAX_TRAJECTORY_COLUMNS,
    MODES,
    channels_first,
    save_grid,
    save_pngs,
    save_trajectory,
    to_bytes,
)
from fastdiff.optional import require
from fastdiff.ranks import join
from fastdiff.sampling.cascade import Cascade
from fastdiff.sampling.classifier_gradient import classifier_gradient
from fastdiff.sampling.sampler import Sampler

DEFAULT_NUM = 64
GRID_IMAGES = 100  # more than these no longer make a picture one can look at

# Options without a default of their own; their help says what happens without them.
OPTIONAL: tuple[str, ...] = ("checkpoint", "cascade", "low_res", "num", "classes")
OPTIONAL += ("classifier", "classifier_scale", "columns", "scale")
OPTIONAL += guidance_options.OPTIONAL + METHOD_OPTIONAL + STEP_OPTIONAL

# Options that decide, as they stand, what the images are and which of them make a batch.
DECISIVE: tuple[str, ...] = ("method", "spacing", "dtype", "truncate")
DECISIVE += ("classifier_scale", "seed", "first_sample", "num", "batch_size")
DECISIVE += ("cond_noise", "cond_truncated", *guidance_options.DECISIVE, *METHOD_OPTIONAL)
DECISIVE += ("spacing_option",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser, cascade=True)
    parser.add_argument(
        "--out", required=True, default=argparse.SUPPRESS, metavar="DIR", help="where the images go"
    )
    parser.add_argument(
        "--num",
        type=int,
        default=argparse.SUPPRESS,
        help=f"how many images (default: {DEFAULT_NUM}, or as many as --low-res has)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images sampled together")
    add_step_arguments(parser, of_many=upsampling.STEPS_OF_MANY)
    add_method_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--first-sample",
        type=int,
        default=0,
        help="number of the first image; image i of a seed is the same in any run",
    )
    parser.add_argument(
        "--classes",
        action="append",
        default=argparse.SUPPRESS,
        metavar="LIST",
        help="classes in turn, numbers or names (3, or 0,1,2, or cat,dog), or 'all' (default: all, "
        "if any); names with commas in double quotes, as in CSV, and number:3 or name:3 where one "
        "word could be both; may be given several times",
    )
    add_guidance_arguments(parser)
    add_classifier_arguments(parser)
    upsampling.add_arguments(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network"
    )
    parser.add_argument("--truncate", action="store_true", help="round to bytes as published code")
    parser.add_argument("--no-pngs", action="store_true", help="no PNG per image")
    parser.add_argument(
        "--columns",
        type=int,
        default=argparse.SUPPRESS,
        help="of the grid (default: as square as it gets)",
    )
    parser.add_argument(
        "--scale",
        type=int,
        default=argparse.SUPPRESS,
        help="enlargement in the pictures (default: enough to look at)",
    )
    parser.add_argument(
        "--trajectory",
        type=int,
        default=0,
        metavar="N",
        help="picture the denoising of the first N images",
    )
    parser.add_argument(
        "--trajectory-of",
        choices=KINDS,
        default="xt",
        help="what is pictured at each step: x_t, or x0, the image that the network expects there",
    )


def run(args: argparse.Namespace) -> int:
    for name in OPTIONAL:
        vars(args).setdefault(name, None)
    ranks = join(getattr(args, "device", None))
    task = ranks.together(lambda: _prepare(args, ranks.device))
    with closing(task.parts), ranks.heard():
        settings = _settings(args, task)
        ranks.agree(settings)
        missing = ranks.on_first(lambda: _open(task, settings, args.weights))
        started = time.perf_counter()
        _draw(args, task, ranks.share(missing), shown=ranks.rank == 0)
        ranks.leave()  # every part is on the disk now
        if ranks.rank == 0:
            if missing:
                _report(task, missing, time.perf_counter() - started)
            _finish(args, task, missing)
    return 0


@dataclass(frozen=True)
class _Task:
    checkpoints: list[Checkpoint]  # of the networks, the smallest first
    cascade: Cascade
    classifier: Checkpoint | None  # by which the first network is guided
    guide: Checkpoint | None  # likewise
    classes: list[int]  # to go through in turn; empty for a network without classes
    low_res: upsampling.SmallImages | None
    parts: Parts


def _prepare(args: argparse.Namespace, device: str | None) -> _Task:
    """What the options mean. InputError before anything is made, but for a new --out."""
    _check_numbers(args)
    paths = upsampling.checkpoint_paths(args)
    steps = upsampling.of_each("--steps", args.steps or "", len(paths))
    checkpoints = [load_checkpoint(path, args.weights, device, upsamplers=True) for path in paths]
    base = checkpoints[0]
    classifier = load_classifier(args, base)
    guide = guidance_options.load_guide(args, base)
    low_res = upsampling.small_images(args, base)
    if args.num is None:
        args.num = DEFAULT_NUM if low_res is None else len(low_res)
    # Of an unconditional network the classifier knows the classes that there are.
    named = base if networks.num_classes(base) else classifier or base
    names = class_names(named)
    classes = choose_classes(args.classes, networks.num_classes(named), names)
    guidance = guidance_options.guidance_arguments(args, base, guide)
    samplers = [_sampler(args, base, steps[0], guidance, classifier)]
    samplers += [_sampler(args, c, s) for c, s in zip(checkpoints[1:], steps[1:], strict=True)]
    sampled = upsampling.cascade_of(args, checkpoints, samplers)
    channels, height, width = sampled.stages[-1].shape
    followed = args.trajectory if channels in MODES else 0
    batches = split(args.first_sample, args.num, args.batch_size, followed)
    shape = (height, width, channels)
    kind = KINDS[args.trajectory_of]
    parts = Parts(writable_folder(args.out), batches, shape, names, frames=kind.part)
    return _Task(checkpoints, sampled, classifier, guide, classes, low_res, parts)


def _open(task: _Task, settings: dict[str, Any], weights: str) -> list[Batch]:
    """Say what is there already; the batches still to draw."""
    for checkpoint in task.checkpoints:
        print(describe(checkpoint, weights))
    if task.guide is not None:
        print(f"guided by {describe(task.guide, weights)}")
    if task.classifier is not None:
        print(describe_guidance(task.classifier, task.cascade.stages[0].sampler))
    parts = task.parts
    parts.check_targets()
    missing = parts.open(settings)
    for name in ("grid.png", "trajectory*.png", "png/*"):
        remove_unfinished(parts.file.parent / name)
    if not missing and parts.is_merged():
        print(f"{parts.file} holds these images already; delete it to draw them again")
    elif len(missing) < len(parts.batches):
        there = len(parts.batches) - len(missing)
        print(f"{there} of {len(parts.batches)} batches were already there")
    return missing


def _settings(args: argparse.Namespace, task: _Task) -> dict[str, Any]:
    """What must be the same for parts to belong to this run."""
    stages = task.cascade.stages
    settings = {
        "checkpoint": "; ".join(map(fingerprint, task.checkpoints)),
        "classifier": task.classifier and fingerprint(task.classifier),
        "guide": task.guide and fingerprint(task.guide),
        "steps": upsampling.BETWEEN.join(str(stage.sampler.settings.steps) for stage in stages),
        "timesteps": [stage.sampler.settings.timesteps for stage in stages],
        "low_res": None if task.low_res is None else task.low_res.fingerprint(),
        "classes": task.classes,
        "shape": task.parts.shape,
    }
    return settings | {name: getattr(args, name) for name in DECISIVE}


def _draw(args: argparse.Namespace, task: _Task, batches: list[Batch], shown: bool) -> None:
    """Draw these batches, each written at once: an interrupted run keeps what it has."""
    steps = task.cascade.steps
    moments = spaced_numbers(steps[-1], MAX_TRAJECTORY_COLUMNS).tolist()
    total, hidden = len(batches) * sum(steps), not (shown and batches)
    tqdm = require("tqdm", "train").tqdm
    with tqdm(total=total, desc="sampling", unit="step", disable=hidden) as bar:
        for batch in batches:
            numbers = np.arange(batch.number, batch.number + batch.size)
            labels = _labels(args, task, numbers)
            trajectory = Trajectory(batch.followed, moments, args.trajectory_of)
            kwargs = [networks.labelled(c, labels) for c in task.checkpoints]
            x = task.cascade.sample(
                batch.size,
                seed=args.seed,
                first_sample=batch.number,
                low_res=None if task.low_res is None else task.low_res.batch(numbers),
                model_kwargs=kwargs,
                uncond_kwargs=_unconditional(args, task, kwargs, labels),
                cond_kwargs=[_of_classifier(task, labels), *[None] * (len(kwargs) - 1)],
                progress=bar.update,
                callback=trajectory.add if batch.followed else None,
            )
            images = to_bytes(x, upsampling.rounding(args))
            task.parts.write(batch, images, labels, trajectory.frames())
            _save_pngs(args, task.parts, images, batch)


def _labels(args: argparse.Namespace, task: _Task, numbers: np.ndarray) -> Tensor | None:
    """int64 (n,): the image's number chooses its class, in whatever batch it is drawn; what a small
    image shows, the image made of it shows too, unless --classes says something else."""
    if not task.classes:
        return None
    if task.low_res is not None and args.classes is None:
        return task.low_res.labels_of(numbers)
    return torch.tensor(task.classes)[torch.from_numpy(numbers) % len(task.classes)]


def _unconditional(
    args: argparse.Namespace,
    task: _Task,
    kwargs: list[dict[str, Tensor]],
    labels: Tensor | None,
) -> list[dict[str, Tensor] | None]:
    """For guidance of the first network: the label, whatever it calls it, that means none; or what
    its guide calls the same labels."""
    others: list[dict[str, Tensor] | None] = [None] * len(kwargs)
    if task.guide is not None:
        others[0] = networks.labelled(task.guide, labels)
        return others
    null = networks.null_label(task.checkpoints[0])
    if args.guidance_scale is not None and null is not None:
        others[0] = networks.unlabelled(kwargs[0], null)
    return others


def _of_classifier(task: _Task, labels: Tensor | None) -> dict[str, Tensor] | None:
    """The classes (n,) to which a classifier guides, on its device."""
    if task.classifier is None or labels is None:
        return None
    return {"y": labels.to(next(task.classifier.model.parameters()).device)}


def _report(task: _Task, drawn: list[Batch], seconds: float) -> None:
    count = sum(batch.size for batch in drawn)
    rate = f"{count / seconds:.1f} images/s"
    steps = " + ".join(map(str, task.cascade.steps))
    print(f"{count} images, {steps} steps each, in {seconds:.1f} s ({rate})")


def _finish(args: argparse.Namespace, task: _Task, drawn: list[Batch]) -> None:
    """Merge the parts, make the pictures, print where all is, and clear the parts away."""
    parts = task.parts
    merged = parts.merge()
    paths = [merged.file]
    if parts.shape[-1] in MODES:
        paths += _save_pictures(args, parts, merged, set(drawn))
    else:
        print(f"no pictures: a PNG cannot hold {parts.shape[-1]} channels")
    parts.remove()
    for path in paths:
        print(path)


def _save_pictures(
    args: argparse.Namespace, parts: Parts, merged: Merged, drawn: set[Batch]
) -> list[Path]:
    """The PNGs this run has not written yet, the grid and the trajectory."""
    out = merged.file.parent
    paths = []
    if not args.no_pngs:
        paths.append(out / "png")
        start = 0
        for batch in parts.batches:
            if batch not in drawn:
                _save_pngs(args, parts, merged.images[start : start + batch.size], batch)
            start += batch.size
    with parts.keeping():
        shown = channels_first(merged.images[:GRID_IMAGES])
        paths.append(save_grid(shown, out / "grid.png", columns=args.columns, scale=args.scale))
        if merged.frames is not None:
            frames, name = channels_first(merged.frames), KINDS[args.trajectory_of].picture
            paths.append(save_trajectory(frames, out / name, scale=args.scale))
        elif args.trajectory:
            print("no new trajectory: it is recorded while images are drawn, and none were")
    return paths


def _save_pngs(args: argparse.Namespace, parts: Parts, images: np.ndarray, batch: Batch) -> None:
    if not args.no_pngs and images.shape[-1] in MODES:
        with parts.keeping():
            save_pngs(channels_first(images), parts.file.parent / "png", start=batch.number)


def _sampler(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    steps: str,
    guidance: dict[str, Any] | None = None,
    classifier: Checkpoint | None = None,
) -> Sampler:
    """guidance: Sampler's arguments of it; classifier: by which it is guided."""
    cond_fn = None
    if classifier is not None:
        cond_fn = classifier_gradient(classifier.model, args.classifier_scale)
    return Sampler(
        checkpoint.model,
        checkpoint.diffusion,
        **step_arguments(args, steps, checkpoint, args.method),
        **method_arguments(args),
        **(guidance or {}),
        cond_fn=cond_fn,
        dtype=torch.bfloat16 if args.dtype == "bfloat16" else None,
        self_condition=networks.self_condition(checkpoint),
    )


def _check_numbers(args: argparse.Namespace) -> None:
    check_least(args, 1, "num", "batch_size", "columns", "scale")
    check_least(args, 0, "seed", "first_sample", "trajectory")
