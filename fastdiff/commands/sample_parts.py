"""What ``fastdiff sample`` has finished: one file per batch, so that a restart goes on from there.

    parts/run.json              which run the parts belong to
    parts/part_00000128.npz     the batch whose first image is number 128, in the samples' format
    parts/frames_00000128.npz   the trajectory of its first images, where one was asked for
                                (frames_x0_… where it is that of the predicted x_0)

Every file is renamed into place when it is whole. One that was cut or garbled afterwards does not
read (a .npz has a checksum) and is drawn again.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from fastdiff.commands.trajectory import KINDS
from fastdiff.errors import InputError
from fastdiff.files import remove_unfinished, replace_text
from fastdiff.images import (
    is_our_png,
    read_samples,
    samples_file_name,
    write_samples,
)
from fastdiff.locks import NAME as LOCK
from fastdiff.locks import release, take

if TYPE_CHECKING:
    from filelock import FileLock

FOLDER = "parts"
REMOVED = ".parts.removed"  # the folder's name while its files are deleted
MANIFEST = "run.json"
MARK = b"fastdiff sample "  # how the comment in the final file begins


class Batch(NamedTuple):
    """Images that are drawn together; image i of a seed is the same in any batch."""

    number: int  # of the first image
    size: int
    followed: int  # so many of its first images are in the trajectory


def split(first: int, num: int, batch_size: int, followed: int) -> list[Batch]:
    """``num`` images from number ``first`` on in batches; the first ``followed`` are followed."""
    batches = []
    for start in range(0, num, batch_size):
        size = min(batch_size, num - start)
        batches.append(Batch(first + start, size, min(max(followed - start, 0), size)))
    return batches


class Merged(NamedTuple):
    file: Path
    images: np.ndarray  # uint8 (N, H, W, C)
    frames: np.ndarray | None  # uint8 (K, n, H, W, C): K moments of the first n images


class Parts:
    """The parts of one run in ``out``/parts.

    Every process writes its own; one of them opens the folder, merges and removes it.

    Args:
        out: the folder of --out, which exists.
        batches: all of the run's.
        shape: (H, W, C) of an image.
        class_names: of the labels' numbers, which the final file records.
        frames: how the names of the trajectories' files begin: one for each kind.
    """

    def __init__(
        self,
        out: Path,
        batches: list[Batch],
        shape: tuple[int, int, int],
        class_names: Sequence[str] | None = None,
        *,
        frames: str = KINDS["xt"].part,
    ):
        self.folder = out / FOLDER
        self.frames = frames
        self.batches = batches
        self.shape = shape
        self.class_names = class_names
        count = sum(batch.size for batch in batches)
        self.file = out / samples_file_name((count, *shape))
        self.settings: dict[str, Any] = {}
        self.lock: FileLock | None = None

    def check_targets(self) -> None:
        """InputError when --out holds a file that this run would replace and no run has written.

        PNGs of older versions do not say where they come from; the samples beside them do.
        """
        out = self.file.parent
        npz = [self.file] if self.file.exists() else []
        pictures = [out / "grid.png", *(out / kind.picture for kind in KINDS.values())]
        pictures += (out / "png").glob("sample_*.png")
        pictures = [path for path in pictures if path.exists()]
        sampled = (self.folder / MANIFEST).exists() or any(
            map(_is_merged_file, out.glob("samples_*.npz"))
        )
        foreign = [path for path in npz if not _is_merged_file(path)]
        foreign += [path for path in pictures if not (sampled or is_our_png(path))]
        if foreign:
            raise InputError(
                f"--out {out} holds {foreign[0].relative_to(out)}, which fastdiff sample did not "
                "write and would replace: give another --out, or move that file away"
            )

    def open(self, settings: Mapping[str, Any]) -> list[Batch]:
        """Make the folder, or take up what an earlier run left there: the batches still to draw.

        Args:
            settings: all that decides what the images are, with a JSON form.

        Raises:
            InputError: the folder belongs to another run, or another process is at work in it.
        """
        self.settings = json.loads(json.dumps(settings))
        shutil.rmtree(self.folder.with_name(REMOVED), ignore_errors=True)
        if not self.folder.exists() and self.is_merged():
            return []
        self.folder.mkdir(exist_ok=True)
        self._check_manifest()  # a folder of something else gets no lock, which is a file
        self._lock()
        self._check_manifest()  # another process may have been there first
        self._write_manifest()
        remove_unfinished(self.folder / "*")
        return [batch for batch in self.batches if not self._is_whole(batch)]

    def close(self) -> None:
        """Let other processes have the folder."""
        if self.lock is not None:
            release(self.lock)
            self.lock = None

    def write(
        self,
        batch: Batch,
        images: np.ndarray,
        labels: Tensor | None = None,
        frames: np.ndarray | None = None,
    ) -> None:
        """Keep a finished batch: uint8 images (n, H, W, C), integer labels (n,), frames (K, m, H,
        W, C). OSError when the disk is full; the parts that are there stay."""
        with self.keeping():
            if frames is not None:
                columns = frames.reshape(len(frames), -1, *self.shape[1:])
                write_samples(self._frames_path(batch), columns)
            write_samples(self._path(batch), images, labels)

    def is_merged(self) -> bool:
        """Whether the final file holds this very run's samples already."""
        return _comment(self.file) == self._mark()

    def merge(self) -> Merged:
        """Make the final .npz of all parts, and read the trajectory.

        The images are in memory once. Where the parts are gone because the final file is there,
        that is read, and there are no frames.

        Raises:
            InputError: a part is missing or damaged; the same run again would draw it.
            OSError: the disk is full; the parts stay.
        """
        if not self.folder.exists():
            return Merged(self.file, read_samples(self.file).images, None)
        images = np.empty((sum(batch.size for batch in self.batches), *self.shape), np.uint8)
        labels: list[np.ndarray] = []
        frames: list[np.ndarray] = []
        start = 0
        for batch in self.batches:
            try:
                part, part_labels = self._read(batch)
                frames += [self._read_frames(batch)] if batch.followed else []
            except InputError as error:
                raise InputError(
                    f"{error}; the same command draws it again (if it ran on several machines, "
                    "they must share the disk of --out)"
                ) from None
            images[start : start + batch.size] = part
            start += batch.size
            labels += [] if part_labels is None else [part_labels]
        merged = self.folder / "merged.npz"
        with self.keeping():
            together = np.concatenate(labels) if labels else None
            write_samples(merged, images, together, self.class_names)
            with zipfile.ZipFile(merged, "a") as archive:
                archive.comment = self._mark()
            with merged.open("rb") as stream:
                os.fsync(stream.fileno())  # before the parts go
            os.replace(merged, self.file)
        return Merged(self.file, images, np.concatenate(frames, axis=1) if frames else None)

    def remove(self) -> None:
        """Delete the folder. A kill in between leaves a folder of another name to the next run."""
        if self.folder.exists():
            removed = self.folder.with_name(REMOVED)
            self.folder.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _path(self, batch: Batch) -> Path:
        return self.folder / f"part_{batch.number:08d}.npz"

    def _frames_path(self, batch: Batch) -> Path:
        return self.folder / f"{self.frames}_{batch.number:08d}.npz"

    def _is_whole(self, batch: Batch) -> bool:
        try:
            self._read(batch)
            if batch.followed:
                self._read_frames(batch)
        except InputError:
            return False
        return True

    def _read(self, batch: Batch) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 (n, H, W, C) and labels (n,). InputError when they are not there, or not whole."""
        path = self._path(batch)
        images, labels, _ = read_samples(path)
        if images.shape != (batch.size, *self.shape):
            raise InputError(f"'{path}' holds {images.shape}, expected {batch.size} images")
        return images, labels

    def _read_frames(self, batch: Batch) -> np.ndarray:
        """uint8 (K, followed, H, W, C)."""
        path = self._frames_path(batch)
        columns = read_samples(path).images  # (K, n·H, W, C): a moment's images below each other
        height, *rest = self.shape
        if list(columns.shape[2:]) != rest or columns.shape[1] % height:
            raise InputError(f"'{path}' holds {columns.shape}, expected images {self.shape}")
        frames = columns.reshape(len(columns), -1, *self.shape)[:, : batch.followed]
        if frames.shape[1] < batch.followed:
            raise InputError(f"'{path}' follows {frames.shape[1]} images of {batch.followed}")
        return frames

    def _lock(self) -> None:
        """Keep other processes that sample into this folder out until this one ends."""
        self.lock = take(
            self.folder,
            f"another process draws into {self.folder} now; wait for it, or give another --out",
        )

    def _write_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not path.exists():
            # A part lost with the power is drawn again; without this one file all would be lost.
            with self.keeping():
                replace_text(path, json.dumps(self.settings, indent=2) + "\n", durable=True)

    def _check_manifest(self) -> None:
        """InputError when the folder is another run's, or no run's; nothing is changed."""
        path = self.folder / MANIFEST
        remedy = f"give another --out, or delete {self.folder} to start over"
        if not path.exists():
            others = {entry.name for entry in self.folder.iterdir()} - {LOCK}
            if any(not name.endswith(".tmp") for name in others):
                raise InputError(f"{self.folder} holds files of something else; {remedy}")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{path} is damaged; {remedy}")
        differences = [
            f"{name} is {found.get(name)!r:.60} there and {self.settings.get(name)!r:.60} here"
            for name in {**self.settings, **found}
            if found.get(name) != self.settings.get(name)
        ]
        if differences:
            raise InputError(
                f"{self.folder} holds the unfinished samples of another run: "
                f"{', '.join(differences)}; {remedy}"
            )

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """A full disk says what it costs."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write into {self.folder.parent}: {error.strerror or error}; the finished "
                f"batches are kept in {self.folder}, and the same command goes on from there"
            ) from error

    def _mark(self) -> bytes:
        """What says in the final file which run's it is."""
        text = json.dumps(self.settings, sort_keys=True)
        return MARK + hashlib.sha256(text.encode()).hexdigest().encode()


def _comment(file: Path) -> bytes:
    """Of a .npz; empty for what is none."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.comment
    except (OSError, zipfile.BadZipFile):
        return b""


def _is_merged_file(file: Path) -> bool:
    return _comment(file).startswith(MARK)
