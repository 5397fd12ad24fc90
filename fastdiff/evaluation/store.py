"""Features of many images in a folder: computed once, by all ranks, whatever breaks in between."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.files import replace_text
from fastdiff.ranks import ALONE, Ranks

DONE = "done"  # the name of the marks: 1 where an image's features are there


class FeatureStore:
    """Features of N images, float32 (N, D) a kind, in ``.npy`` files that are read in place.

    Args:
        folder: made if missing. What an earlier call left there is gone on with where it is about
            the same, and begun anew where not.
        about: JSON values that tell these images and this network from others.
        count: N.
        widths: kind -> D.
        ranks: those that fill it; all of them make it, on a disk that they share.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        count: int,
        widths: Mapping[str, int],
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.count, self.ranks = folder, count, ranks
        shapes = {kind: (count, width) for kind, width in widths.items()}
        document = {"about": dict(about), "shapes": {k: list(s) for k, s in shapes.items()}}
        ranks.on_first(lambda: _prepare(folder, document, shapes))
        self._done = _opened(folder / f"{DONE}.npy")
        self._kinds = {kind: _opened(folder / f"{kind}.npy") for kind in widths}

    def missing(self) -> np.ndarray:
        """The images without features, int64."""
        return np.flatnonzero(self._done == 0)

    def fill(
        self,
        features: Callable[[np.ndarray], Mapping[str, Tensor]],
        batch: int,
        progress: Callable[[int], Callable[[int], Any]] = lambda images: lambda done: None,
    ) -> None:
        """Compute what is missing, each rank its share, ``batch`` images at a time: a call of all
        ranks. ``progress`` is given their number, and makes what is told of each batch's size."""
        missing = self.ranks.on_first(self.missing)
        mine = missing[self.ranks.rank :: self.ranks.count]
        told = progress(len(mine))
        for start in range(0, len(mine), batch):
            indices = mine[start : start + batch]
            for kind, values in features(indices).items():
                self._kinds[kind][indices] = values.float().cpu().numpy()
                self._kinds[kind].flush()
            self._done[indices] = 1
            self._done.flush()
            told(len(indices))
        self.ranks.gather(None)
        self.ranks.on_first(self._check)

    def _check(self) -> None:
        left = len(self.missing())
        if left:  # of a disk that shows each machine something else
            raise InputError(
                f"'{self.folder}' lacks the features of {left} images that other ranks have "
                "written: give a folder on a disk that they share"
            )

    def all(self, kind: str) -> Tensor:
        """float32 (N, D), read from the disk as it is needed."""
        return torch.from_numpy(self._kinds[kind])

    def chunks(self, kind: str, rows: int = 4096) -> Iterator[Tensor]:
        yield from self.all(kind).split(rows)


def _prepare(
    folder: Path, document: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "about.json"
    found = {entry.name for entry in folder.iterdir()}
    if found - {"about.json", f"{DONE}.npy", *(f"{kind}.npy" for kind in shapes)}:
        raise InputError(f"'{folder}' holds other files: give a new or an empty folder")
    text = json.dumps(document, indent=2) + "\n"
    if found and place.is_file() and place.read_text(encoding="utf-8") == text:
        return
    place.unlink(missing_ok=True)
    for kind, shape in shapes.items():
        _made(folder / f"{kind}.npy", np.float32, shape)
    count = next(iter(shapes.values()))[0]
    _made(folder / f"{DONE}.npy", np.uint8, (count,))
    replace_text(place, text)  # the last: what is there without it is begun anew


def _made(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    """A file of zeros that has its place on the disk: where a hole in one finds the disk full, the
    process that writes into its memory is killed. OSError where it has none."""
    np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _opened(path: Path) -> Any:
    return np.lib.format.open_memmap(path, "r+")
