"""NAME=VALUE among the options: what belongs to one method or spacing alone."""

import ast
from collections.abc import Sequence
from typing import Any

from fastdiff.errors import InputError


def named_values(
    option: str, given: Sequence[str], owner: str, known: Sequence[str]
) -> dict[str, Any] | None:
    """The values by their names; None where there are none.

    option: on the command line, ``given`` several times; ``owner`` has those that are ``known``.
    InputError for a name that is not, and for text without one.
    """
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            options = ", ".join(f"{known_name}=…" for known_name in known) or "none that there is"
            raise InputError(f"{option} is {text!r}; of {owner} is {options}")
        found[name] = _value(value)
    return found or None


def _value(text: str) -> Any:
    """A number, a list or True, as Python writes them; else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
