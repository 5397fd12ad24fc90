"""A zip of image files: a folder in one file, or what StyleGAN's and EDM's dataset_tool.py writes.

The directory at the end of the file is read here and not by zipfile, whose object for every member
takes 600 bytes (0.8 GB for ImageNet-64).
"""

import io
import struct
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastdiff.data import dataset_json
from fastdiff.data.archives import Members, open_range
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.labels import Refusal
from fastdiff.data.listing import Listing, list_members
from fastdiff.data.paths import PathTable
from fastdiff.data.picture_set import PictureDataset, Pictures, open_pictures
from fastdiff.data.text import plain
from fastdiff.errors import InputError

STORED, DEFLATED = 0, 8
ENCRYPTED, UTF8 = 1, 0x800  # bits of a member's flags
# PKWARE's APPNOTE.TXT 6.3, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16
LOCAL = struct.Struct("<4s22x2H")
CENTRAL = struct.Struct("<4s4x2H8x2I3H8xI")
END = struct.Struct("<12xII2x")
END64 = struct.Struct("<40xQQ20x")  # with the locator, which says where it begins


class Entry(NamedTuple):
    """One line of a zip's directory. offset: of its local header. stored: bytes in the file."""

    name: str
    flags: int
    method: int
    offset: int
    stored: int


class ZipArchive:
    """The pictures of a zip, sorted as a folder's are.

    members: int64 (≥ 3, N): each one's local header's offset, bytes in the file and method.
    """

    def __init__(self, file: Path, paths: PathTable, members: np.ndarray) -> None:
        self.file, self.paths, self._members = file, paths, members

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return f"{self.file}/{self.paths.at(row)}"

    def open(self, row: int) -> BinaryIO:
        return open_entry(self.file, *map(int, self._members[:3, row]))


def open_entry(file: Path, offset: int, stored: int, method: int) -> BinaryIO:
    with file.open("rb") as stream:
        stream.seek(offset)
        signature, name, extra = LOCAL.unpack(stream.read(LOCAL.size))
    if signature != b"PK\3\4":
        raise ValueError(f"the zip has no file at byte {offset:,}, as its directory says")
    content = open_range(file, offset + LOCAL.size + name + extra, stored)
    if method == STORED:
        return content
    with content:
        return io.BytesIO(zlib.decompress(content.read(), wbits=-zlib.MAX_WBITS))


@image_format("a .zip file", lambda path: path.is_file() and path.suffix.lower() == ".zip")
def load_zip(file: Path, options: Options) -> PictureDataset:
    """The image files of a zip, with its dataset.json's labels or those of a folder's rules."""
    names: list[str] = []
    numbers = array("q")
    about = None
    for entry in read_directory(file):
        names.append(entry.name)
        numbers.extend((entry.offset, entry.stored, entry.method, entry.flags))
        about = entry if entry.name == dataset_json.NAME else about
    listing = Listing()
    order = np.array(sorted(range(len(names)), key=lambda i: names[i].replace("/", "\0")), np.int64)
    rows = order[list_members((names[i] for i in order), listing)]
    members = np.array(numbers, np.int64).reshape(-1, 4)[rows].T
    archive = ZipArchive(file, listing.files, members)
    _check_packing(archive, *members[2:])

    def own_labels() -> np.ndarray | Refusal | None:
        if about is None:
            return None

        def read() -> bytes:
            with open_entry(file, about.offset, about.stored, about.method) as stream:
                return stream.read()

        return dataset_json.read_labels_of(listing.files, read)

    pictures = Pictures(file, Members(archive), listing.files, listing.skipped(), own_labels)
    return open_pictures(pictures, options)


def _check_packing(archive: ZipArchive, methods: np.ndarray, flags: np.ndarray) -> None:
    unusable = (flags & ENCRYPTED > 0) | ~np.isin(methods, (STORED, DEFLATED))
    for row in np.flatnonzero(unusable)[:1]:
        why = "encrypted" if flags[row] & ENCRYPTED else f"packed by method {methods[row]}"
        raise InputError(
            f"'{plain(archive.name(row))}' is {why}, expected files stored or deflated: unpack the "
            "zip and give the folder"
        )


def read_directory(file: Path) -> Iterator[Entry]:
    """Every file of a zip, in the order of its directory."""
    try:
        directory, prefix = _central_directory(file)
        at = 0
        while at < len(directory):
            (signature, flags, method, stored, size, name, extra, comment, offset) = (
                CENTRAL.unpack_from(directory, at)
            )
            at += CENTRAL.size
            if signature != b"PK\1\2":
                raise ValueError(f"no entry at byte {at} of its directory")
            raw = directory[at : at + name]
            if 0xFFFFFFFF in (stored, size, offset):
                extras = directory[at + name : at + name + extra]
                stored, offset = _zip64(extras, stored, size, offset)
            at += name + extra + comment
            text = raw.decode("utf-8" if flags & UTF8 else "cp437").replace("\\", "/")
            if not text.endswith("/"):
                yield Entry(text, flags, method, prefix + offset, stored)
    except (ValueError, struct.error) as error:
        message = f"'{plain(file)}' is no whole zip file ({error}): is it cut short?"
        raise InputError(message) from error


def _central_directory(file: Path) -> tuple[bytes, int]:
    """The directory's bytes, and how many bytes precede the zip proper."""
    with file.open("rb") as stream:
        length = stream.seek(0, 2)
        start = max(0, length - END.size - 0xFFFF)  # a comment may follow
        stream.seek(start)
        tail = stream.read()
        at = tail.rfind(b"PK\5\6")
        if at < 0:
            raise ValueError("no directory at its end")
        size, offset = END.unpack_from(tail, at)
        end = start + at
        stream.seek(max(0, end - END64.size))
        before = stream.read(END64.size)
        if before.startswith(b"PK\6\6"):  # a large zip: the numbers have 64 bits
            size, offset = END64.unpack(before)
            end -= END64.size
        prefix = end - size - offset
        if prefix < 0:
            raise ValueError("its directory is not where its end says")
        stream.seek(end - size)
        return stream.read(size), prefix


def _zip64(extras: bytes, stored: int, size: int, offset: int) -> tuple[int, int]:
    """Numbers too large for 32 bits stand in an extra field, those alone and in this order."""
    at = 0
    while at + 4 <= len(extras):
        kind, length = struct.unpack_from("<HH", extras, at)
        if kind == 1:
            found = iter(struct.unpack_from(f"<{length // 8}Q", extras, at + 4))
            size, stored, offset = (
                next(found, value) if value == 0xFFFFFFFF else value
                for value in (size, stored, offset)
            )
        at += 4 + length
    return stored, offset
