"""Worker processes that read data: when they end, and what they say when something fails."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from fastdiff.errors import InputError, first_line

IN_WORKER = "Caught "  # how torch begins what a DataLoader's worker raised
WORKER_GONE = "DataLoader worker (pid"  # and what it says of a worker that is gone


def begun(loader: DataLoader) -> Iterator[Any]:
    """``iter(loader)``, whose workers end with the loader, not by a signal to all processes of a
    run: the trainer still wants to finish its step and to save."""
    own = loader.worker_init_fn
    loader.worker_init_fn = partial(_stay, own)
    # A worker begins with the mask of its parent: no signal comes before it knows what to do.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        loader.worker_init_fn = own


def _stay(own: Callable[[int], None] | None, worker: int) -> None:
    """Begin a worker: deaf to SIGINT, and to SIGTERM but from its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_obey_parent, daemon=True).start()
    else:  # macOS does not say who sends
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if own is not None:
        own(worker)


def _obey_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def unreadable(what: str, error: Exception) -> InputError | OSError | MemoryError:
    """What a data set raised while ``what`` was read, in one line, as an error that can be sent to
    another process; where it came from is a note."""
    text = str(error).strip()
    found: InputError | OSError | MemoryError
    if isinstance(error, InputError | MemoryError):
        found = InputError(text) if isinstance(error, InputError) else MemoryError(text)
    elif text.startswith(WORKER_GONE):
        found = OSError(
            f"{first_line(error).rstrip('. ')}: of memory, or of /dev/shm, there may be too little "
            "for so many worker processes"
        )
    elif text.startswith(IN_WORKER):
        found = InputError(f"{what} cannot be read: {text.splitlines()[-1]}")
    elif isinstance(error, OSError):
        found = OSError(f"{what} cannot be read: {first_line(error)}")
        found.errno = error.errno
    else:
        kind, line = type(error).__name__, first_line(error)
        found = InputError(f"{what} cannot be read: {kind if line == kind else f'{kind}: {line}'}")
    for note in getattr(error, "__notes__", ["".join(traceback.format_exception(error))]):
        found.add_note(note)
    return found
