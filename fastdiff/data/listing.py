"""The image files of a folder and its sub-folders, and what is passed over on the way."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

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

    files: list[Path] = field(default_factory=list)
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

    def visit(folder: Path) -> None:
        real = os.path.realpath(folder)
        if real in visited:
            found.links += 1
            return
        visited.add(real)
        for entry in _entries(folder):
            path = folder / entry.name
            if entry.name.startswith("."):
                found.hidden += 1
            elif _is_folder(entry):
                if entry.name.lower() in SYSTEM_FOLDERS:
                    found.system[entry.name] += 1
                else:
                    before = len(found.files)
                    visit(path)
                    if folder == root and len(found.files) == before:
                        found.empty.append(entry.name)
            elif entry.name.lower() in SYSTEM_FILES:
                found.system[entry.name] += 1
            else:
                _sort_in(entry, path, found)

    visit(root)
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"the folder '{plain(folder)}' cannot be listed ({error.strerror or error}): "
            "make it readable, or move it out of the data"
        ) from error


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


def _sort_in(entry: os.DirEntry[str], path: Path, found: Listing) -> None:
    """Count one file under what it is."""
    suffix = path.suffix.lower()
    if suffix in OTHER_PICTURES:
        found.pictures[suffix] += 1
    elif suffix not in SUFFIXES:
        found.others[suffix or "without a suffix"] += 1
    elif not _is_file(entry) and path.exists():
        found.special += 1  # opening a pipe would wait for its writer
    else:
        found.files.append(path)
