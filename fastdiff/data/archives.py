"""Pictures inside other files, each opened by where it begins: nothing is unpacked or shared.

Every picture opens the archive anew (some 20 us), so that threads, forked and spawned processes
read without a thought for each other, and a thousand shards hold no open files.
"""

import io
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, cast

from fastdiff.data.paths import Lazy


class Archive(Protocol):
    """Pictures by their rows, in [0, N)."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """What a message calls the picture: the archive's path and its own inside."""

    def open(self, row: int) -> BinaryIO: ...


class Member(NamedTuple):
    """One picture: it opens, and ``str`` of it is its name, as with a Path."""

    archive: Archive
    row: int

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        return self.archive.open(self.row)

    def __str__(self) -> str:
        return self.archive.name(self.row)


class Members(Lazy[Member]):
    """All pictures of an archive."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def __len__(self) -> int:
        return len(self._archive)

    def at(self, index: int) -> Member:
        return Member(self._archive, index)


def open_range(file: Path, offset: int, size: int) -> BinaryIO:
    """``size`` bytes of a file from ``offset`` as a stream of their own."""
    return cast(BinaryIO, io.BufferedReader(_Range(file, offset, size)))


class _Range(io.RawIOBase):
    def __init__(self, file: Path, offset: int, size: int) -> None:
        self._stream = open(file, "rb", buffering=0)
        self._stream.seek(offset)
        self._offset, self._size = offset, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        view = memoryview(buffer)
        return self._stream.readinto(view[: max(0, self._size - self.tell())])

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        return self._stream.seek(self._offset + start + offset) - self._offset

    def tell(self) -> int:
        return self._stream.tell() - self._offset

    def close(self) -> None:
        self._stream.close()
        super().close()
