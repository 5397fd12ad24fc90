"""Writing the TOML that settings are: what ``tomllib`` reads back the same."""

import json
from collections.abc import Mapping
from typing import Any


def to_toml(document: Mapping[str, Any]) -> str:
    """``document``, whose values are numbers, text, lists of these, or tables of such; a None is
    left out."""
    tables = {name: value for name, value in document.items() if isinstance(value, Mapping)}
    blocks = [_lines({name: v for name, v in document.items() if name not in tables})]
    blocks += [f"[{name}]\n{_lines(table)}" for name, table in tables.items()]
    return "\n".join(block for block in blocks if block)


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {_value(v)}\n" for name, v in table.items() if v is not None)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    # JSON's escapes are TOML's, but for this one; what no UTF-8 holds stays readable.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return text.encode(errors="backslashreplace").decode()
