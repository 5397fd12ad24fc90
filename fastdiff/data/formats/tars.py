"""Pictures in .tar files: webdataset's shards, or any other tar, which is as a folder.

Nothing is unpacked: of every picture its name, shard, place and size are kept (some 50 bytes), from
one pass over the headers when the set is opened.
"""

import glob
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastdiff.data.archives import Members, open_range
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.labels import Refusal
from fastdiff.data.listing import SUFFIXES, Listing, list_members
from fastdiff.data.picture_set import PictureDataset, Pictures, open_pictures
from fastdiff.data.text import plain
from fastdiff.errors import InputError, first_line

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as the shell and webdataset have it
PACKED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
LABEL_FILES = ("cls", "json")
JSON_LABELS = ("label", "cls")


class Shard:
    """What one tar holds. names: of its files but those of labels. places: where each begins and
    its bytes, in turn. labels: by webdataset's keys, a class number or why there is none."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.places = array("q")
        self.labels: dict[str, int | Refusal] = {}

    def read(self, file: Path, with_labels: bool) -> None:
        """Raises what tarfile raises; what precedes the damage is there then."""
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                name = member.name.removeprefix("./")
                key, kind = split_key(name)
                if not member.isreg():
                    continue
                if kind not in LABEL_FILES:
                    self.names.append(name)
                    self.places.extend((member.offset_data, member.size))
                elif with_labels and (content := tar.extractfile(member)) is not None:
                    label = _label(content.read(), kind, f"{file}/{name}")
                    if label is not None:
                        self.labels[key] = label


class TarArchive:
    """The pictures of several tars, in their order.

    numbers: the label of each, -1 without one. refusal: of the first label that is none.
    """

    def __init__(self, files: list[Path]) -> None:
        self.listing = Listing()
        self.numbers = array("q")
        self.refusal: Refusal | None = None
        self._files = files
        self._file_of, self._places = array("i"), array("q")

    def add(self, number: int, shard: Shard) -> None:
        """The pictures of the tar ``files[number]``."""
        for row in list_members(shard.names, self.listing):
            self._file_of.append(number)
            self._places.extend(shard.places[2 * row : 2 * row + 2])
            label = shard.labels.get(split_key(shard.names[row])[0], -1)
            if isinstance(label, Refusal):
                self.refusal, label = self.refusal or label, -1
            self.numbers.append(label)

    def __len__(self) -> int:
        return len(self._file_of)

    def name(self, row: int) -> str:
        return f"{self._files[self._file_of[row]]}/{self.listing.files.at(row)}"

    def open(self, row: int) -> BinaryIO:
        return open_range(self._files[self._file_of[row]], *self._places[2 * row : 2 * row + 2])

    def labels(self) -> np.ndarray | Refusal | None:
        """int64 (N,), or why not; None where no picture has a label."""
        numbers = np.array(self.numbers, np.int64)
        if self.refusal is not None or (numbers < 0).all():
            return self.refusal
        for row in np.flatnonzero(numbers < 0)[:1]:
            key, _ = split_key(self.name(row))
            return Refusal(f"no '{plain(key)}.cls', or .json with a label, as other pictures have")
        return numbers


def is_tar(path: Path) -> bool:
    """A .tar, a folder that holds such files and no pictures or folders, or a pattern of names."""
    if path.is_dir():
        return _holds_tars(path)
    is_there = path.exists() or RANGE.search(str(path)) or glob.has_magic(str(path))
    return bool(is_there) and path.name.lower().endswith((".tar", *PACKED))


@image_format("a .tar file, a folder or a pattern of them", is_tar, patterns=True)
def load_tar(path: Path, options: Options) -> PictureDataset:
    """The image files of tars, in their order, with the labels that webdataset puts beside them
    (``key.cls`` holds a number, ``key.json`` has a ``label``), or those of a folder's rules."""
    files = _files(path)
    archive, broken = TarArchive(files), []
    for number, file in enumerate(files):
        shard = Shard()
        try:
            shard.read(file, with_labels=options.class_cond is not False)
        except (tarfile.TarError, OSError, ValueError) as error:
            broken.append(f"'{plain(file)}' is no whole tar file: {first_line(error)}")
            if not options.skip_broken:
                raise InputError(f"{broken[0]}; --skip-broken takes what precedes that") from error
        archive.add(number, shard)
    paths, skipped = archive.listing.files, archive.listing.skipped()
    pictures = Pictures(path, Members(archive), paths, skipped, archive.labels, broken)
    return open_pictures(pictures, options)


def split_key(name: str) -> tuple[str, str]:
    """webdataset's key of a file, up to the first dot of its name, and the rest, lowered."""
    folder, slash, name = name.rpartition("/")
    stem, _, kind = name.partition(".")
    return folder + slash + stem, kind.lower()


def _label(content: bytes, kind: str, name: str) -> int | Refusal | None:
    """The class number that a file of labels holds; None for a .json about something else."""
    try:
        label = int(content) if kind == "cls" else json.loads(content)
    except ValueError:
        return Refusal(f"'{plain(name)}' holds {content!r:.40}, expected a class number from 0")
    if kind == "json":
        found = [label[key] for key in JSON_LABELS if key in label] if type(label) is dict else []
        if not found:
            return None
        label = found[0]
    if type(label) is not int or label < 0:
        return Refusal(f"'{plain(name)}' has the label {label!r:.40}, expected a number from 0")
    return label


def _files(path: Path) -> list[Path]:
    """The tars that a path or a pattern means."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".tar")
    elif path.exists():
        files = [path]
    elif RANGE.search(str(path)):
        files = [Path(name) for name in _expanded(str(path))]
    else:
        files = sorted(map(Path, glob.glob(str(path))))
    if not files:
        raise InputError(f"no file is called like '{plain(path)}'")
    for file in files:
        if not file.is_file():
            raise InputError(f"no file '{plain(file)}', which '{plain(path)}' asks for")
        if file.name.lower().endswith(PACKED):
            raise InputError(
                f"'{plain(file)}' is packed as a whole, so that no picture can be reached alone: "
                "unpack it to a .tar"
            )
    return files


def _expanded(pattern: str) -> Iterator[str]:
    """``{008..010}`` as 008, 009, 010."""
    match = RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        digits = f"{number:0{len(match[1])}d}"
        yield from _expanded(f"{pattern[: match.start()]}{digits}{pattern[match.end() :]}")


def _holds_tars(folder: Path) -> bool:
    found = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()
                if suffix in SUFFIXES or entry.is_dir():
                    return False
                found |= suffix == ".tar"
    except OSError:  # listing it as a folder of images will say so
        return False
    return found
