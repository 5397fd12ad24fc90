"""What a command writes of its figures: a .json with --out, never over someone else's; a .csv."""

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiff.commands.checkpoint_options import writable_folder
from fastdiff.errors import InputError
from fastdiff.files import replace_text


def check_report(out: str | Path, parts: Collection[str]) -> None:
    """Before the work: that --out can be written, and that nothing but an older report is lost.

    ``parts`` are keys by which such a report is known. InputError otherwise.
    """
    path = Path(out)
    if path.is_dir():
        raise InputError(f"--out {path} is a directory; expected a file to write")
    writable_folder(path.parent)
    if path.is_file() and path.stat().st_size and not _is_report(path, parts):
        raise InputError(
            f"--out {path} is there already and no report of this command: it is left alone; "
            "give another name, or delete it first"
        )


def write_report(out: str | Path, document: Mapping[str, Any]) -> None:
    """Write it, whole or not at all (into a pipe or a device, as it comes)."""
    path = Path(out)
    text = json.dumps(document, indent=2) + "\n"
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    replace_text(path.resolve(), text)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_text(path, text.getvalue())


def _is_report(path: Path, parts: Collection[str]) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and set(parts) <= set(found)
