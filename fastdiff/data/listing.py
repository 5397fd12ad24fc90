"""The image files of a folder and its sub-folders, and what is passed over on the way."""

import os
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from fastdiff.data.paths import PathTable
from fastdiff.data.text import counted, listed, plain, shown
from fastdiff.errors import InputError

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp"}
SUFFIXES |= {".ppm", ".pgm", ".tif", ".tiff"}

# Pictures that are not read: Pillow opens them nowhere, or only where it was built so.
OTHER_PICTURES = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".svg"}
OTHER_PICTURES |= {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".exr", ".hdr", ".tga", ".ico"}

# What systems leave in folders: previews, bins, the other half of a Macintosh's files.
SYSTEM_FOLDERS = {"@eadir", "__macosx", "$recycle.bin", "recycler", "system volume information"}
SYSTEM_FOLDERS |= {
    "lost+found",
    "#recycle",
    "#snapshot",
    "@recycle",
    "@recently-snapshot",
    "@__thumb",
}
SYSTEM_FOLDERS |= {"@tmp", "__pycache__"}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}


@dataclass
class Listing:
    """Paths in the order of their names, folder by folder, and counts of everything else."""

    files: PathTable = field(default_factory=PathTable)
    pictures: Counter[str] = field(default_factory=Counter)  # not read, by suffix
    others: Counter[str] = field(default_factory=Counter)  # no pictures, by suffix
    hidden: int = 0
    system: Counter[str] = field(default_factory=Counter)  # by name
    links: int = 0  # to a folder that was visited already
    special: int = 0  # pipes, sockets, devices
    empty: list[str] = field(default_factory=list)  # first-level folders without an image

    def skipped(self) -> str:
        """What was passed over and why, in one line; "" if nothing was."""
        reasons = []
        if self.pictures:
            reasons.append(f"{counted(self.pictures, 6)} (pictures in formats that are not read)")
        if self.others:
            reasons.append(f"{counted(self.others, 6)} (no pictures)")
        if self.system:
            reasons.append(f"{counted(self.system, 6)} (of the system)")
        if self.hidden:
            reasons.append(f"hidden {self.hidden:,}")
        if self.links:
            reasons.append(f"links to folders that were read already {self.links:,}")
        if self.special:
            reasons.append(f"pipes and devices {self.special:,}")
        if self.empty:
            reasons.append(f"folders without images: {listed(list(map(shown, self.empty)), 6)}")
        return "; ".join(reasons)


def list_folder(root: Path) -> Listing:
    """Everything below ``root``. Raises InputError for a folder that cannot be listed."""
    found = Listing()
    visited: set[str] = set()

    def visit(folder: Path, below_root: str) -> None:
        real = os.path.realpath(folder)
        if real in visited:
            found.links += 1
            return
        visited.add(real)
        names, folders = _entries(folder, found)
        for is_folder, group in groupby(names, folders.__contains__):
            if not is_folder:
                found.files.add(below_root, group)
                continue
            for name in group:
                before = len(found.files)
                visit(folder / name, f"{below_root}/{name}" if below_root else name)
                if not below_root and len(found.files) == before:
                    found.empty.append(name)

    visit(root, "")
    return found


def list_members(paths: Iterable[str], found: Listing) -> np.ndarray:
    """What a folder of these paths would hold, into ``found``; which are pictures, in order."""
    rows, system = array("q"), set()
    for row, path in enumerate(paths):
        *folders, name = path.split("/")
        inside = next((i for i, part in enumerate(folders) if part.lower() in SYSTEM_FOLDERS), None)
        if name.startswith(".") or any(part.startswith(".") for part in folders):
            found.hidden += 1
        elif inside is not None:
            system.add("/".join(folders[: inside + 1]))
        elif _is_picture(name, found):
            found.files.add("/".join(folders), [name])
            rows.append(row)
    found.system.update(path.rpartition("/")[2] for path in system)
    return np.frombuffer(rows, np.int64) if rows else np.empty(0, np.int64)


def _entries(folder: Path, found: Listing) -> tuple[list[str], set[str]]:
    """Names of pictures and of folders to visit, sorted, and which of them are folders."""
    names, folders = [], set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    found.hidden += 1
                elif _is_folder(entry):
                    if entry.name.lower() in SYSTEM_FOLDERS:
                        found.system[entry.name] += 1
                    else:
                        folders.add(entry.name)
                        names.append(entry.name)
                elif _is_picture(entry.name, found):
                    if not _is_file(entry) and os.path.exists(entry.path):
                        found.special += 1  # opening a pipe would wait for its writer
                    else:
                        names.append(entry.name)
    except OSError as error:
        raise InputError(
            f"the folder '{plain(folder)}' cannot be listed ({error.strerror or error}): "
            "make it readable, or move it out of the data"
        ) from error
    return sorted(names), folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_picture(name: str, found: Listing) -> bool:
    """Whether a file of this name is one; any other is counted under what it is."""
    dot = name.rfind(".")
    suffix = name[dot:].lower() if 0 < dot < len(name) - 1 else ""  # as pathlib has it, but faster
    if suffix in SUFFIXES:
        return True
    if name.lower() in SYSTEM_FILES:
        found.system[name] += 1
    elif suffix in OTHER_PICTURES:
        found.pictures[suffix] += 1
    else:
        found.others[suffix or "without a suffix"] += 1
    return False
