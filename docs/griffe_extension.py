"""What griffe finds in the sources made fit for this site: Sphinx's roles become its links."""

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object

ROLE = re.compile(r":(?:class|meth|func|mod|data|attr):`([\w.]+)`")


class Roles(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)


def _link(obj: Object, name: str) -> str:
    """The name as code, leading to where the site explains it, if it does."""
    first, dot, rest = name.partition(".")
    try:
        path = name if first == "fastdiff" else f"{obj.resolve(first)}{dot}{rest}"
    except NameResolutionError:
        return f"`{name}`"
    return f'<autoref identifier="{path}" optional>`{name}`</autoref>'
