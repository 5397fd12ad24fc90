"""The folder of a run while it is trained into: shown to be ours, locked, described."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdiff.checkpoints.run_directory import RUN_KIND, held, list_checkpoints, require_run
from fastdiff.errors import InputError
from fastdiff.files import replace_text
from fastdiff.training.toml import to_toml


@contextmanager
def opened(run_dir: Path, newest: Path | None, settings: Mapping[str, Any]) -> Iterator[None]:
    """Make or take up ``run_dir``, and keep other processes out of it inside the block.

    Args:
        newest: the checkpoint the trainer comes from; None for a new run.
        settings: what config.json says of the run.

    Raises:
        InputError: the folder is not a run's, another process trains into it, or it holds newer
            checkpoints than ``newest``. Nothing is touched then.
    """
    require_run(run_dir, or_empty=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    with held(run_dir):
        _check_newest(run_dir, newest)
        text = json.dumps({"kind": RUN_KIND, **settings}, indent=2) + "\n"
        replace_text(run_dir / "config.json", text)
        recipe = settings["info"].get("recipe")
        if recipe is not None:  # of the command line's, which can start the run again
            document = to_toml({**recipe, "train": settings["train"]})
            replace_text(run_dir / "run.toml", f"# fastdiff train --config run.toml\n\n{document}")
        yield


def started_by(run_dir: Path) -> set[str]:
    """The torchrun processes whose ranks trained into this folder last (``Ranks.agents``)."""
    try:
        settings = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    ours = isinstance(settings, dict) and settings.get("kind") == RUN_KIND
    return set(settings.get("started_by", ())) if ours else set()


def _check_newest(run_dir: Path, newest: Path | None) -> None:
    found = list_checkpoints(run_dir)
    if not found or (newest is not None and found[-1].name == newest.name):
        return
    if newest is None:
        raise InputError(
            f"'{run_dir}' holds checkpoints of an earlier run: resume it, or choose another "
            "directory"
        )
    raise InputError(
        f"'{run_dir}' was trained on to {found[-1].name} after {newest.name} was read: resume "
        f"again, or delete what is newer than {newest.name} to go on from there"
    )
