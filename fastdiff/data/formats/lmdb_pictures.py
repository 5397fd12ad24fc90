"""An LMDB whose values are image files, as LSUN is distributed.

The keys are listed once, when the set is opened, into a table that this set holds: some 50 bytes
each, 160 MB for the 3 million of LSUN's bedrooms. Values are read when they are asked for, through
one read-only mapping to each database and process; nothing is written beside it.
"""

import io
import os
import threading
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

from fastdiff.data.archives import Members
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.listing import Listing
from fastdiff.data.paths import PathTable
from fastdiff.data.picture_set import PictureDataset, Pictures, open_pictures
from fastdiff.data.text import plain
from fastdiff.errors import InputError, first_line
from fastdiff.optional import require

ABOUT = {
    b"length",
    b"num-samples",
    b"__len__",
    b"__keys__",
}  # what some tools write beside pictures


class Database:
    """One LMDB in this process, where it may be open only once, and not across a fork."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock, self._environment = file, threading.Lock(), None

    def open(self) -> Any:
        """lmdb's Environment. Raises InputError for one that cannot be read."""
        lmdb = require("lmdb", "data")
        with self._lock:
            if self._environment is None:
                try:
                    self._environment = lmdb.open(
                        str(self._file),
                        subdir=False,
                        readonly=True,
                        lock=False,  # the place may be read-only
                        readahead=False,  # pictures are drawn in random order
                    )
                except lmdb.Error as error:
                    message = f"'{plain(self._file)}' is not a readable LMDB: {first_line(error)}"
                    raise InputError(message) from error
            return self._environment

    def forget(self) -> None:
        """In a child: drop what the parent has opened, and a lock that one of its threads held."""
        if self._environment is not None:
            self._environment.close()
        self._lock, self._environment = threading.Lock(), None


_DATABASES: WeakValueDictionary[Path, Database] = WeakValueDictionary()


def _after_fork() -> None:
    for database in list(_DATABASES.values()):
        database.forget()


os.register_at_fork(after_in_child=_after_fork)


class LmdbArchive:
    """The values of an LMDB, by the rows of its keys."""

    def __init__(self, path: Path, keys: PathTable) -> None:
        self._path, self._keys = path, keys
        self._database: Database | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, row: int) -> str:
        return f"{self._path}/{self._keys.at(row)}"

    def open(self, row: int) -> BinaryIO:
        with self.environment().begin() as transaction:
            value = transaction.get(self._keys.at(row).encode("utf-8", "surrogateescape"))
        if value is None:
            raise ValueError("its key is gone")
        return io.BytesIO(value)

    def environment(self) -> Any:
        if self._database is None:
            file = Path(os.path.realpath(data_file(self._path)))
            self._database = _DATABASES.setdefault(file, Database(file))
        return self._database.open()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_database": None}  # another process opens its own


def data_file(path: Path) -> Path:
    return path / "data.mdb" if path.is_dir() else path


def is_lmdb(path: Path) -> bool:
    file = data_file(path)
    return file.is_file() and file.suffix.lower() in (".mdb", ".lmdb")


@image_format("an LMDB", is_lmdb)
def load_lmdb(path: Path, options: Options) -> PictureDataset:
    """Values that are image files, in the order of their keys, which are read as a folder's paths
    are. Nobody may write to the database meanwhile."""
    found = Listing()
    archive = LmdbArchive(path, found.files)
    environment = archive.environment()
    _check_whole(path, environment)
    with environment.begin() as transaction, transaction.cursor() as cursor:
        for key in cursor.iternext(keys=True, values=False):
            text = key.decode("utf-8", "surrogateescape")
            if key in ABOUT:
                found.others[text] += 1
                continue
            folder, _, name = text.rpartition("/")
            found.files.add(folder, [name if folder else text])
    return open_pictures(Pictures(path, Members(archive), found.files, found.skipped()), options)


def _check_whole(path: Path, environment: Any) -> None:
    """A page behind the end of the file would end the process: it is mapped into memory."""
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    file = data_file(path)
    if (size := file.stat().st_size) < expected:
        raise InputError(
            f"'{plain(file)}' has {size:,} bytes, expected {expected:,}: it is cut short"
        )
