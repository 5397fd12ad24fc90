"""``--config run.toml``: a run's settings, named as the flags are, in tables."""

import argparse
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from fastdiff.errors import InputError

# What adds the flags whose names a table may have; "" is what stands before the first table.
Parts = Mapping[str, Callable[[argparse.ArgumentParser], None]]


class Reader(argparse.ArgumentParser):
    """A parser that raises InputError in the place of leaving."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def read_config(path: Path, parts: Parts) -> dict[str, Any]:
    """The settings in a TOML file, as the command line's flags would have them.

    InputError: no TOML, or a table, a name or a value that there is no flag for.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no TOML: {error}") from None
    tables = {name: value for name, value in document.items() if isinstance(value, dict)}
    tables[""] = {name: value for name, value in document.items() if name not in tables}
    given: dict[str, Any] = {}
    for table, settings in tables.items():
        if table not in parts:
            known = ", ".join(f"[{name}]" for name in parts if name)
            raise InputError(f"{path}: unknown table [{table}]; expected {known}")
        reader = Reader(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        parts[table](reader)
        for name, value in settings.items():
            place = f"{path}: [{table}] {name}" if table else f"{path}: {name}"
            try:
                found, rest = reader.parse_known_args([_flag(name, value)])
            except InputError as error:
                raise InputError(f"{place} is {value!r}: {error}") from None
            if rest:
                raise InputError(
                    f"{place} is no setting: expected a flag of `fastdiff train --help` that "
                    "belongs there, with _ for -"
                )
            given |= vars(found)
    return given


def _flag(name: str, value: Any) -> str:
    """The setting as it stands on a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, list):
        return f"--{flag}={','.join(map(str, value)) or 'none'}"
    if isinstance(value, int | float | str):
        return f"--{flag}={value}"
    raise InputError("expected a number, text, true, false or a list")
