"""Files and folders that are written whole or not at all, whatever kills the process or the power.

What is new goes under a hidden name beside its place and is renamed into it when it is complete.
"""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_in_progress: set[Path] = set()  # temporary folders that threads of this process write


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A stream whose bytes become ``path`` when the block ends without an exception.

    durable: they are on the disk before ``path`` is theirs; else a loss of power, though no kill,
    may take them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Make ``text`` the file's, in UTF-8."""
    with replacing(path, durable=durable) as stream:
        stream.write(text.encode())


def remove_unfinished(path: Path) -> None:
    """Delete what killed processes left of ``path``, whose name may hold wildcards.

    For a caller who knows that no process writes it now.
    """
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(target: Path) -> Iterator[Path]:
    """An empty folder that becomes ``target``, on the disk, when the block ends without an
    exception.

    An older folder of that name stays until the new one is complete; what a killed process left
    behind is removed by the next call. ``target``'s parent is made if missing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    _remove_stale(target.parent)
    temporary = target.parent / f".{target.name}.saving-{socket.gethostname()}-{os.getpid()}"
    _in_progress.add(temporary)
    try:
        temporary.mkdir()
        try:
            yield temporary
            for path in temporary.rglob("*"):
                _sync(path)
            _sync(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        previous = previous_directory(target)
        if target.exists():
            # Between the two renames nothing has this name; ``_recover`` undoes the first.
            target.rename(previous)
        temporary.rename(target)
    finally:
        _in_progress.discard(temporary)
    _sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def previous_directory(target: Path) -> Path:
    """Where ``target`` is while its successor takes its place."""
    return target.parent / f".{target.name}.previous"


def _recover(target: Path) -> None:
    """Undo or finish the renames of a call that was killed between them."""
    previous = previous_directory(target)
    if not previous.is_dir():
        return
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
    else:
        previous.rename(target)


def _remove_stale(parent: Path) -> None:
    """Remove temporary folders of processes of this machine that are gone."""
    pattern = re.compile(rf"\..+\.saving-{re.escape(socket.gethostname())}-(\d+)")
    for entry in parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and entry not in _in_progress and not _is_running(int(match.group(1))):
            shutil.rmtree(entry, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a dead process had this number; ours are in _in_progress
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Put a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
