"""Worker processes that read data: when they end, and what they say when something fails."""

import gc
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    gc.freeze()  # what is garbage of the parent's is not collected here: other loaders' workers
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


@contextmanager
def unwatched() -> Iterator[None]:
    """Within, the death of a worker is not noticed, but at the end: torch raises it wherever the
    main thread is, in the middle of an update too."""
    handler = getattr(signal, "SIGCHLD", None) and signal.getsignal(signal.SIGCHLD)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGCHLD, lambda *given: came.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
    if came:
        handler(*came[-1])


def is_gone(error: BaseException) -> bool:
    """Whether torch says that a worker is gone, which it may say at any place in the program."""
    return isinstance(error, RuntimeError) and str(error).startswith(WORKER_GONE)


class UnreadableFile(OSError):
    """An OSError that a data set raised, in one line."""


def unreadable(what: str, error: Exception) -> Exception:
    """What a data set raised while ``what`` was read, in one line, as an InputError, an OSError or
    a MemoryError that can be sent to another process; where it came from is a note."""
    text = str(error).strip()
    found: Exception
    if isinstance(error, InputError | UnreadableFile | MemoryError):
        found = type(error)(text)
    elif is_gone(error):
        found = UnreadableFile(
            f"{first_line(error).rstrip('. ')}: of memory, or of /dev/shm, there may be too little "
            "for so many worker processes"
        )
    elif text.startswith(IN_WORKER):
        found = InputError(f"{what} cannot be read: {text.splitlines()[-1]}")
    elif isinstance(error, OSError):
        found = UnreadableFile(f"{what} cannot be read: {first_line(error)}")
    else:
        kind, line = type(error).__name__, first_line(error)
        found = InputError(f"{what} cannot be read: {kind if line == kind else f'{kind}: {line}'}")
    for note in getattr(error, "__notes__", ["".join(traceback.format_exception(error))]):
        found.add_note(note)
    return found
