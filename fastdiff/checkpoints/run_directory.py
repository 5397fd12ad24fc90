"""What a folder is (a training run's, a checkpoint, something else), and a run's checkpoints.

A run leaves config.json, run.toml, checkpoints/step_XXXXXXXX (the newest of them last), averages/
(snapshots of them), metrics.jsonl, tensorboard/, samples/, loss_curve.png and .lock. Only a folder
that shows it is a run is written into.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.errors import InputError
from fastdiff.locks import NAME as LOCK
from fastdiff.locks import release, take

if TYPE_CHECKING:  # it loads torch
    from fastdiff.ranks import Ranks

RUN_KIND = "fastdiff run"  # what config.json says of itself; those of older versions do not

# A directory gets this name only once it is complete (see fastdiff.checkpoints.checkpoint.save).
_COMPLETE = re.compile(r"step_(\d{8,})")
# The same, or what a process that was killed while saving or deleting one leaves.
_OURS = re.compile(r"step_\d{8,}|\.step_\d{8,}\.(saving-.+|previous|deleting)")
_OUR_LINE = re.compile(r'\{"step": \d+, "(grad_norm|bits_per_dim)": ')  # of metrics.jsonl
_RUN_PARTS = {"train", "model", "diffusion", "info"}  # of a run's config.json
_RUN_ENTRIES = {
    "checkpoints",
    "averages",
    "best",
    "features",
    "metrics.jsonl",
    "tensorboard",
    "samples",
    "loss_curve.png",
}
# What a run that was killed in its first moments leaves, and what a file system puts everywhere.
_NOTHING = {LOCK, "config.json.new", "metrics.jsonl.new", ".DS_Store", ".gitkeep", "lost+found"}


@dataclass(frozen=True)
class Folder:
    """What ``identify`` found.

    kind: "empty" (or not there yet), "run", "checkpoint", "diffusers" or "other".
    words: what it is, to be read after "is" or "holds".
    """

    kind: str
    words: str = ""


def identify(path: str | os.PathLike[str]) -> Folder:
    """What this folder is, from the names and the JSON files in it. OSError if it is unreadable."""
    folder = Path(path)
    if not folder.exists():
        return Folder("empty", "does not exist")
    if not folder.is_dir():
        return Folder("other", "is a file")
    names = {entry.name for entry in folder.iterdir()} - _NOTHING
    if not names:
        return Folder("empty", "is empty")
    config = _read_object(folder / "config.json")
    if config is not None and "format" in config and "model" in config:
        return Folder("checkpoint", "is a checkpoint")
    if _is_diffusers(folder, config):
        return Folder("diffusers", "is a diffusers folder")
    if _is_run(folder, names, config):
        return Folder("run", "is a training run")
    if "config.json" in names:
        return Folder("other", "has a config.json of something else")
    return Folder("other", f"holds {min(names)!r}")


def require_run(path: str | os.PathLike[str], *, or_empty: bool = False) -> None:
    """InputError when this folder does not show that it is a training run (or empty).

    Nothing else is written into: what a run overwrites could be anyone's.
    """
    found = identify(path)
    if found.kind == "run" or (or_empty and found.kind == "empty"):
        return
    if found.kind == "empty":
        raise InputError(f"'{path}' {found.words}: it holds no checkpoint to resume from")
    if found.kind in ("checkpoint", "diffusers"):
        run = Path(path).absolute().parent.parent
        if found.kind == "checkpoint" and identify(run).kind == "run":
            remedy = f"to resume its run, name the run's folder, '{run}'"
        else:
            remedy = (
                "to train on from its weights give it to --init (in Python to "
                "Trainer.from_checkpoint), and a new folder for the run"
            )
        raise InputError(f"'{path}' {found.words}, not a training run, and is left alone; {remedy}")
    run = Path(path).absolute().parent
    if Path(path).name == "checkpoints" and identify(run).kind == "run":
        raise InputError(f"'{path}' is a part of the run '{run}': name the run's folder")
    raise InputError(
        f"'{path}' {found.words} and nothing that shows it is a training run: it is left alone; "
        "choose a new or an empty folder"
    )


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Inside, no other process trains into this folder, which exists.

    InputError when another one does. The lock dies with its process, however that ends.
    """
    lock = take(
        run_dir,
        f"another process trains into '{run_dir}' now, here or on a machine that shares the disk; "
        "wait for it, or choose another folder",
    )
    try:
        yield
    finally:
        release(lock)


@contextmanager
def held_for_all(run_dir: Path, ranks: "Ranks") -> Iterator[None]:
    """``held`` while all ``ranks``, who call it together, are inside: rank 0 has the lock."""
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(held(run_dir)))
        yield
        ranks.gather(None)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` finished steps stands."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    root = Path(run_dir) / "checkpoints"
    if not root.is_dir():
        return []
    found = [(match, entry) for entry in root.iterdir() if (match := _match(entry))]
    return [entry for match, entry in sorted(found, key=lambda pair: int(pair[0].group(1)))]


def newest_checkpoint(run_dir: str | os.PathLike[str]) -> Path:
    """The complete checkpoint with the most steps; InputError when there is none."""
    found = list_checkpoints(run_dir)
    if not found:
        raise InputError(f"'{run_dir}' holds no checkpoint to resume from")
    return found[-1]


def _match(entry: Path) -> re.Match[str] | None:
    return _COMPLETE.fullmatch(entry.name) if entry.is_dir() else None


def _is_run(folder: Path, names: set[str], config: dict[str, Any] | None) -> bool:
    if config is not None:
        return config.get("kind") == RUN_KIND or _has_run_parts(config)
    # No config.json, or half of one after a power cut: the rest must speak for itself.
    steps = list_checkpoints(folder)
    if steps and all((step / "trainer.json").is_file() for step in steps):
        return True
    if names - {"config.json"} - _RUN_ENTRIES:
        return False
    root = folder / "checkpoints"
    if root.is_dir() and any(root.iterdir()):
        return _only_our_checkpoints(root)
    return _has_our_metrics(folder / "metrics.jsonl")


def _has_run_parts(config: dict[str, Any]) -> bool:
    train = config.get("train")
    known = {"batch_size", "ema", "timestep_sampler"}
    return set(config) >= _RUN_PARTS and isinstance(train, dict) and set(train) >= known


def _only_our_checkpoints(root: Path) -> bool:
    """By their names, which others use too, and by what a complete one holds."""
    entries = list(root.iterdir())
    parts = ("trainer.json", "model.safetensors")
    return all(
        _OURS.fullmatch(entry.name)
        and (entry.name.startswith(".") or any((entry / part).is_file() for part in parts))
        for entry in entries
    )


def _has_our_metrics(path: Path) -> bool:
    """Whether the first line is a record of a step, as we write it."""
    try:
        with open(path, encoding="utf-8") as file:
            return _OUR_LINE.match(file.readline(100)) is not None
    except (OSError, ValueError):
        return False


def _is_diffusers(folder: Path, config: dict[str, Any] | None) -> bool:
    if config is not None and ("_class_name" in config or "_diffusers_version" in config):
        return True
    index = _read_object(folder / "model_index.json")
    return index is not None and "_class_name" in index


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
