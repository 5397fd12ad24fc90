"""Modules in eval mode for a while, for what cannot be run as a replica (replica.py)."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

_lock = threading.Lock()
# Of the modules that somebody holds in eval mode and that were in training before: by how many.
_holders: dict[nn.Module, int] = {}


@contextmanager
def eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules and all their parts in eval mode inside, which may be entered from any number of
    threads: the first turns the training mode off, the last restores it."""
    held: list[nn.Module] = []
    with _lock:
        for part in dict.fromkeys(part for module in modules for part in module.modules()):
            if part.training or part in _holders:
                _holders[part] = _holders.get(part, 0) + 1
                held.append(part)
                part.training = False
    try:
        yield
    finally:
        with _lock:
            for part in held:
                _holders[part] -= 1
                if not _holders[part]:
                    del _holders[part]
                    part.training = True
