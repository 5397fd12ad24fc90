"""What ``sample`` and ``nll`` share: the checkpoint a user means, ready to run."""

import argparse
import tempfile
from pathlib import Path

from fastdiff.errors import InputError
from fastdiff.models.checkpoint import Checkpoint, load
from fastdiff.training.checks import choose_device
from fastdiff.training.state import list_checkpoints


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="a checkpoint directory, or a training run's (its newest checkpoint is taken)",
    )
    parser.add_argument(
        "--weights",
        default="ema",
        help="'ema' (the slowest average there is, else the model), 'model', or a rate: 0.999",
    )
    parser.add_argument(
        "--device",
        default=argparse.SUPPRESS,
        help="cpu, cuda, cuda:1, ... (default: cuda if there is one)",
    )


def load_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """The image network and its process. InputError for what cannot be sampled or scored."""
    path = Path(args.checkpoint)
    path = next(reversed(list_checkpoints(path)), path)
    checkpoint = load(
        path, weights=args.weights, device=choose_device(getattr(args, "device", None))
    )
    if checkpoint.diffusion is None:
        raise InputError(f"{path} holds a network without its diffusion process")
    if checkpoint.model.dims != 2 or checkpoint.model.super_res:
        kind = "a super-resolution" if checkpoint.model.super_res else "no image"
        raise InputError(
            f"{path} is {kind} network; the command line handles plain image networks "
            "(fastdiff.Sampler and GaussianDiffusion handle every kind)"
        )
    return checkpoint


def image_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """(H, W) the network was trained with."""
    size = checkpoint.info.get("image_size") or checkpoint.model.image_size
    if size is None:
        raise InputError(f"{checkpoint.path} does not say its image size (info.image_size)")
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def describe(checkpoint: Checkpoint) -> str:
    """One line: which weights of which step, on what device."""
    weights = "weights" if checkpoint.weights == "model" else f"EMA {checkpoint.weights}"
    step = "" if checkpoint.step is None else f" of step {checkpoint.step}"
    device = next(checkpoint.model.parameters()).device
    return f"{checkpoint.path}: {weights}{step}, on {device}"


def writable_folder(path: str | Path) -> Path:
    """The folder of --out, made if missing and tried out now rather than after the work."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write into --out {folder}: {error.strerror or error}") from error
    return folder
