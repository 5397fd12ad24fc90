"""What commands print: never worth an encoding's error, nor a result when the reader has gone."""

import codecs
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it loads torch
    from fastdiff.ranks import Ranks

# How a terminal that cannot show them reads what the reports are full of.
PLAIN = {"±": "+/-", "−": "-", "–": "-", "…": "...", "×": "x", "²": "^2", "µ": "u"}
HANDLER = "fastdiff-plain"
UNSAFE = ("strict", "surrogateescape")


@contextmanager
def safe_output() -> Iterator[None]:
    """Inside, printing fails for no character and for no reader that has gone (``| head``).

    Afterwards the streams are as they were. OSError at the end when standard output could not be
    written for another reason, a full disk: the work is done then, and only its report is lost.
    """
    before = sys.stdout, sys.stderr
    streams = [_Stream(stream) for stream in before]
    sys.stdout, sys.stderr = streams  # type: ignore[assignment]
    left = None
    try:
        yield
    except SystemExit as error:  # argparse's, after a help that may be lost
        left = error
    finally:
        for stream in streams:
            stream.close()
        sys.stdout, sys.stderr = before
    lost = streams[0].error
    if left is not None and (left.code or lost is None or isinstance(lost, BrokenPipeError)):
        raise left
    if lost is not None and not isinstance(lost, BrokenPipeError):
        raise OSError(f"standard output could not be written ({lost.strerror or lost})")


def said_once(ranks: "Ranks") -> AbstractContextManager[Any]:
    """Inside, rank 0 alone prints to standard output."""
    return redirect_stdout(None) if ranks.rank else nullcontext()


class _Stream:
    """A text stream that goes on after an error as if all were written."""

    def __init__(self, stream: Any) -> None:
        # Python has no stream at all where the shell closed it.
        self.stream: Any = io.StringIO() if stream is None else stream
        self.error: OSError | None = None
        self.errors = getattr(stream, "errors", None)
        # Where the user has chosen what becomes of such characters, that stays.
        self.changed = isinstance(stream, io.TextIOWrapper) and self.errors in UNSAFE
        if self.changed:
            stream.reconfigure(errors=HANDLER)

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                self.stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        self.flush()
        if self.changed:
            self.stream.reconfigure(errors=self.errors)

    def _give_up(self, error: OSError) -> None:
        """What is still buffered, and what the interpreter flushes at its end, goes nowhere."""
        self.error = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self.stream.fileno())
        except (OSError, ValueError):
            pass  # no file behind it
        finally:
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding lacks: plain ones, or their number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(map(_plain_character, text)), error.end


def _plain_character(character: str) -> str:
    if character in PLAIN:
        return PLAIN[character]
    bare = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return bare or character.encode("ascii", "backslashreplace").decode()


codecs.register_error(HANDLER, _plain)
