"""The progress bar: loss, steps/s, time left."""

import sys
from typing import Any

from fastdiff.optional import require


class NoBar:
    """Stands in for the bar where none is wanted."""

    def update(self) -> None: ...

    def set_postfix(self, **values: Any) -> None: ...

    def __enter__(self) -> "NoBar":
        return self

    def __exit__(self, *error: object) -> None: ...


def progress_bar(total: int, done: int, show: bool) -> Any:
    """A tqdm bar on standard error, or a stand-in; a context manager."""
    if not show:
        return NoBar()
    return require("tqdm", "train").tqdm(
        total=total,
        initial=done,
        unit="step",
        dynamic_ncols=True,
        # A log file is no screen: a line every ten seconds says enough.
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
