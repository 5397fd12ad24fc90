"""What commands that run a checkpoint share: the one that a user means."""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import torch

from fastdiff.checkpoints.averages import passed_over, young_average
from fastdiff.checkpoints.checkpoint import Checkpoint, load
from fastdiff.checks import choose_device
from fastdiff.commands.networks import check_network
from fastdiff.errors import InputError
from fastdiff.models.ema import POWER


def add_checkpoint_arguments(parser: argparse.ArgumentParser, *, cascade: bool = False) -> None:
    """cascade: several networks may be given in place of one."""
    place = parser.add_mutually_exclusive_group(required=True)
    if cascade:
        place.add_argument(
            "--cascade",
            default=argparse.SUPPRESS,
            metavar="DIR,DIR",
            help="checkpoints of a base network and of super-resolution networks in their order, "
            "each of which enlarges what the one before has drawn",
        )
    place.add_argument(
        "--checkpoint",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="a checkpoint directory, or a training run's (its newest checkpoint is taken)",
    )
    parser.add_argument(
        "--weights",
        default="ema",
        help="'ema' (the slowest average that has forgotten the untrained weights, else the "
        "model), 'model', or an average: 0.999, power-0.05",
    )
    parser.add_argument(
        "--device",
        default=argparse.SUPPRESS,
        help="cpu, cuda, cuda:1, ... (default: cuda if there is one)",
    )


def load_checkpoint(
    path: str, weights: str, device: str | None, *, upsamplers: bool = False
) -> Checkpoint:
    """The image network at ``path``, with those of its weights, and its process, on ``device``.

    upsamplers: super-resolution networks are taken too. InputError for what cannot be sampled or
    scored.
    """
    checkpoint = load(path, weights=weights, device=choose_device(device))
    if checkpoint.diffusion is None:
        raise InputError(f"{checkpoint.path} holds a network without its diffusion process")
    check_network(checkpoint, upsamplers=upsamplers)
    return checkpoint


def describe(checkpoint: Checkpoint, asked: str) -> str:
    """A line: which weights of which step, on what device; another on young averages.

    asked: --weights, as given.
    """
    device = next(checkpoint.model.parameters()).device
    line = f"{checkpoint.path}: {_weights(checkpoint)}, on {device}"
    if asked == "ema":
        others = passed_over(checkpoint)
        return line if others is None else f"{line}\n{others}"
    warning = young_average(checkpoint, "--weights model")
    return line if warning is None else f"{line}\nwarning: {warning}"


def fingerprint(checkpoint: Checkpoint) -> str:
    """What tells this network and process from every other, wherever they lie: a line."""
    digest = hashlib.sha256()
    parts = {name: checkpoint.config[name] for name in ("model", "diffusion")}
    digest.update(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in checkpoint.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{_weights(checkpoint)}, sha256 {digest.hexdigest()[:16]}"


def _weights(checkpoint: Checkpoint) -> str:
    weights = "weights" if checkpoint.weights == "model" else f"EMA {checkpoint.weights}"
    made = checkpoint.info.get("average")  # by fastdiff average
    if isinstance(made, dict) and checkpoint.weights == "model":
        weights = f"EMA {POWER}{made.get('sigma_rel')}"
    return weights if checkpoint.step is None else f"{weights} of step {checkpoint.step}"


def new_directory(out: str) -> Path:
    """Where a command's --out is to be. InputError for a file, and for a folder that holds any."""
    path = Path(out)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"--out {path} is not empty: choose another directory")
    return path


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
