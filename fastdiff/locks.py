"""Keeping other processes out of a folder while this one writes there."""

import errno
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from fastdiff.errors import InputError

if TYPE_CHECKING:
    from filelock import FileLock

NAME = ".lock"  # an empty file that stays: deleted, two processes could hold two files of its name
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def take(folder: Path, refusal: str) -> "FileLock":
    """Lock a folder that exists; what ``release`` takes. The lock dies with this process, however
    it ends. A file system without locks gets a warning and none.

    InputError with ``refusal`` when someone else holds it, and when nothing may be written there.
    """
    from filelock import FileLock, Timeout  # a third of a second

    lock = FileLock(folder / NAME, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(refusal) from None
    except (OSError, NotImplementedError) as error:
        number = error.errno if isinstance(error, OSError) else errno.ENOSYS
        reason = getattr(error, "strerror", None) or error
        if number in _FORBIDDEN:
            raise InputError(f"'{folder}' may not be written into: {reason}") from None
        if number not in _WITHOUT_LOCKS:
            raise
        warnings.warn(
            f"'{folder}' cannot be locked ({reason}): see to it that no other process writes there",
            RuntimeWarning,
            stacklevel=2,
        )
    return lock


def release(lock: "FileLock") -> None:
    lock.release()
