"""``fastdiff sample``: images from a checkpoint, as a grid, PNGs and .npz."""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff._optional import require
from fastdiff.commands._checkpoint import (
    add_checkpoint_arguments,
    describe,
    image_size,
    load_checkpoint,
    writable_folder,
)
from fastdiff.errors import InputError
from fastdiff.images import (
    MAX_TRAJECTORY_COLUMNS,
    MODES,
    save_grid,
    save_pngs,
    save_samples_npz,
    save_trajectory,
    to_uint8,
)
from fastdiff.models.checkpoint import Checkpoint
from fastdiff.sampler import Sampler
from fastdiff.step_table import METHODS

HELP = "draw images from a checkpoint"

DEFAULT_STEPS = 50
GRID_IMAGES = 100  # more than these no longer make a picture one can look at

# Options without a default of their own; their help says what happens without them.
OPTIONAL = ("steps", "classes", "guidance_scale", "columns", "scale")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--out", required=True, default=argparse.SUPPRESS, metavar="DIR", help="where the images go"
    )
    parser.add_argument("--num", type=int, default=64, help="how many images")
    parser.add_argument("--batch-size", type=int, default=64, help="images sampled together")
    parser.add_argument(
        "--steps",
        default=argparse.SUPPRESS,
        help="sampling steps: a number, one per section (10,15,20) or ddimN "
        f"(default: {DEFAULT_STEPS}, or all of a shorter process)",
    )
    parser.add_argument("--method", choices=METHODS, default="ddpm", help="sampler")
    parser.add_argument(
        "--eta", type=float, default=0.0, help="of ddim: 0 deterministic, 1 as noisy as ddpm"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--first-sample",
        type=int,
        default=0,
        help="number of the first image; image i of a seed is the same in any run",
    )
    parser.add_argument(
        "--classes",
        default=argparse.SUPPRESS,
        help="classes in turn, numbers or names (3, or 0,1,2), or 'all' (default: all, if any)",
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=argparse.SUPPRESS,
        help="classifier-free guidance, for a network trained with label dropout (default: none)",
    )
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


def run(args: argparse.Namespace) -> int:
    for name in OPTIONAL:
        vars(args).setdefault(name, None)
    _check_numbers(args)
    checkpoint = load_checkpoint(args)
    classes = _classes(args.classes, checkpoint)
    sampler = _sampler(args, checkpoint)
    out = writable_folder(args.out)
    print(describe(checkpoint))

    started = time.perf_counter()
    images, labels, frames = _draw(args, sampler, checkpoint, classes, out)
    seconds = time.perf_counter() - started
    rate = f"{len(images) / seconds:.1f} images/s"
    print(f"{len(images)} images, {len(sampler.table)} steps each, in {seconds:.1f} s ({rate})")
    for path in _save(args, out, images, labels, frames):
        print(path)
    return 0


def _draw(
    args: argparse.Namespace,
    sampler: Sampler,
    checkpoint: Checkpoint,
    classes: list[int],
    out: Path,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """uint8 (N, C, H, W), labels (N,), and the trajectory's frames, each (n, C, H, W)."""
    device = next(checkpoint.model.parameters()).device
    numbers = torch.arange(args.first_sample, args.first_sample + args.num)
    labels = torch.tensor(classes)[numbers % len(classes)] if classes else None
    trajectory = _Trajectory(min(args.trajectory, args.num), len(sampler.table))
    batches = []
    starts = range(0, args.num, args.batch_size)
    with require("tqdm", "train").tqdm(
        total=len(starts) * len(sampler.table), desc="sampling", unit="step"
    ) as bar:
        for start in starts:
            count = min(args.batch_size, args.num - start)

            def callback(step: dict[str, Any], start: int = start) -> None:
                trajectory.add(step, start)
                bar.update()

            x = sampler.sample(
                (count, checkpoint.model.in_channels, *image_size(checkpoint)),
                seed=args.seed,
                first_sample=args.first_sample + start,
                model_kwargs=None
                if labels is None
                else {"y": labels[start : start + count].to(device)},
                callback=callback,
            )
            batches.append(to_uint8(x, "truncate" if args.truncate else "nearest").cpu())
            # Written at once: an interrupted run keeps what it has.
            if not args.no_pngs and x.shape[1] in MODES:
                save_pngs(batches[-1], out / "png", start=args.first_sample + start)
    return torch.cat(batches), labels, trajectory.frames()


class _Trajectory:
    """Collects what the first images looked like at evenly spaced steps."""

    def __init__(self, count: int, steps: int):
        self.count = count
        columns = min(steps, MAX_TRAJECTORY_COLUMNS)
        chosen = np.linspace(0, steps - 1, columns).round().astype(int)
        self.parts: dict[int, list[Tensor]] = {int(step): [] for step in chosen}

    def add(self, step: dict[str, Any], start: int) -> None:
        """``start`` is the number of the batch's first image, from 0."""
        wanted = step["sample"][: max(0, self.count - start)]
        if len(wanted) and step["step"] in self.parts:
            self.parts[step["step"]].append(to_uint8(wanted).cpu())

    def frames(self) -> list[Tensor]:
        return [torch.cat(parts) for parts in self.parts.values() if parts]


def _save(
    args: argparse.Namespace,
    out: Path,
    images: Tensor,
    labels: Tensor | None,
    frames: list[Tensor],
) -> list[Path]:
    """Write the .npz and the pictures; the paths of what there is now."""
    paths = [save_samples_npz(out, images.permute(0, 2, 3, 1), labels)]
    if images.shape[1] not in MODES:
        print(f"no pictures: a PNG cannot hold {images.shape[1]} channels")
        return paths
    if not args.no_pngs:
        paths.append(out / "png")
    shown = images[:GRID_IMAGES]
    paths.append(save_grid(shown, out / "grid.png", columns=args.columns, scale=args.scale))
    if frames:
        paths.append(save_trajectory(frames, out / "trajectory.png", scale=args.scale))
    return paths


def _sampler(args: argparse.Namespace, checkpoint: Checkpoint) -> Sampler:
    if args.guidance_scale is not None and checkpoint.model.null_label is None:
        raise InputError(
            "--guidance-scale needs a network that was trained with label dropout "
            "(it has a class of its own for 'no label'); this one was not"
        )
    steps = args.steps or min(DEFAULT_STEPS, checkpoint.diffusion.num_timesteps)
    return Sampler(
        checkpoint.model,
        checkpoint.diffusion,
        steps=steps,
        method=args.method,
        eta=args.eta,
        guidance_scale=args.guidance_scale,
        dtype=torch.bfloat16 if args.dtype == "bfloat16" else None,
    )


def _classes(text: str | None, checkpoint: Checkpoint) -> list[int]:
    """The class numbers to go through in turn; empty for a network without classes."""
    count = checkpoint.model.num_classes
    if count is None:
        if text is not None:
            raise InputError(f"--classes {text} for a network without classes")
        return []
    if text is None or text == "all":
        return list(range(count))
    names = checkpoint.info.get("class_names") or []
    return [_class_number(part.strip(), count, names) for part in text.split(",")]


def _class_number(text: str, count: int, names: list[str]) -> int:
    if text in names:
        return names.index(text)
    if not text.isdecimal() or int(text) >= count:
        known = f" ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})" if names else ""
        raise InputError(f"--classes: {text!r} is no class; there are 0 … {count - 1}{known}")
    return int(text)


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("num", "batch_size", "columns", "scale"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
    for name in ("seed", "first_sample", "trajectory"):
        if getattr(args, name) < 0:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is {getattr(args, name)}; expected 0 or more")
