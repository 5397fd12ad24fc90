"""The checkpoints of a training run: RUN/checkpoints/step_XXXXXXXX, the newest of them last."""

import os
import re
from pathlib import Path

from fastdiff.errors import InputError

# A directory gets this name only once it is complete (see fastdiff.models.checkpoint.save).
_COMPLETE = re.compile(r"step_(\d{8,})")


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
