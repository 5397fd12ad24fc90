"""What each phase is called with, and the lines that it leaves.

    python -m gpu.NAME --out FOLDER [--dry] [--budget SECONDS]

A phase appends each result to FOLDER/rows.jsonl when it has it, so that a phase that is cut, hangs
or crashes loses none that it had.
"""

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

FILE = "rows.jsonl"
PACKAGES = ("torch", "triton", "diffusers")


def arguments(doc: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """``out`` (a folder that exists), ``dry`` (on the CPU, tiny sizes) and ``budget`` (seconds)."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def write(out: Path, phase: str, **fields: Any) -> None:
    """Append one result to ``out``/rows.jsonl, on the disk when this returns.

    A value that JSON has no form for is written as its text (a torch.dtype, a path).
    """
    line = {"phase": phase, "time": round(time.time(), 3), **stamp(), **fields}
    text = json.dumps(line, default=str) + "\n"
    # One write to a file opened for appending: the lines of two processes do not mix.
    file = os.open(Path(out) / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, text.encode())
        os.fsync(file)
    finally:
        os.close(file)


def read(out: Path) -> list[dict[str, Any]]:
    """All lines so far; one that a crash cut short is left out."""
    rows = []
    path = Path(out) / FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


@functools.cache
def stamp() -> dict[str, Any]:
    """Where and with what a line was measured."""
    return {"device": device_name(), "versions": versions()}


def device_name() -> str:
    """The GPU's name, or the CPU's where torch finds none (or cannot be imported)."""
    try:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(0)
    except (ImportError, RuntimeError):
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Python's and the packages', None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
