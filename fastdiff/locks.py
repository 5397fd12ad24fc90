"""Keeping other processes out of a folder while this one writes there."""

import fcntl
import os
from pathlib import Path

from fastdiff.errors import InputError


def take(folder: Path, refusal: str) -> int:
    """Lock a folder that exists; what ``release`` takes. No file is made, and the lock dies with
    this process, however it ends. InputError with ``refusal`` when someone else holds it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InputError(refusal) from None
    except OSError:
        pass  # a file system without locks
    return lock


def release(lock: int) -> None:
    os.close(lock)
