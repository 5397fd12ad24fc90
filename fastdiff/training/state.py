"""What a resumed run needs beyond weights and averages."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fastdiff.checkpoints.run_directory import list_checkpoints

_DOOMED = ".deleting"


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints (0 keeps every one).

    Renamed first, so that a kill never leaves half a checkpoint under a name that counts.
    """
    doomed = list_checkpoints(run_dir)[:-keep] if keep else []
    for path in doomed:
        path.rename(path.with_name(f".{path.name}{_DOOMED}"))
    for leftover in (run_dir / "checkpoints").glob(f".step_*{_DOOMED}"):
        shutil.rmtree(leftover, ignore_errors=True)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``prefixed``, on a dict that holds several prefixes."""
    head = prefix + "."
    return {n.removeprefix(head): tensor for n, tensor in tensors.items() if n.startswith(head)}
