"""What griffe finds in the sources made fit for this site.

Sphinx's roles become its links, and a method that is called with a record's fields
(fastdiff/records.py) has them as its parameters, which only Python itself can say.
"""

import inspect
import re
from pkgutil import resolve_name
from typing import Any

from griffe import (
    Extension,
    Function,
    NameResolutionError,
    Object,
    Parameter,
    ParameterKind,
    Parameters,
)

ROLE = re.compile(r":(?:class|meth|func|mod|data|attr):`([\w.]+)`")
FULL_NAMES = re.compile(r"\b(?:collections\.abc|torch|typing)\.")
KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: ParameterKind.positional_or_keyword,
    inspect.Parameter.VAR_POSITIONAL: ParameterKind.var_positional,
    inspect.Parameter.KEYWORD_ONLY: ParameterKind.keyword_only,
    inspect.Parameter.VAR_KEYWORD: ParameterKind.var_keyword,
}


class Documented(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)

    def on_function(self, *, func: Function, **_: Any) -> None:
        if any("called_with" in str(decorator.value) for decorator in func.decorators):
            method = resolve_name(f"{func.module.path}:{func.path[len(func.module.path) + 1 :]}")
            made = inspect.signature(method).parameters.values()
            func.parameters = Parameters(*map(_parameter, made))


def _parameter(made: inspect.Parameter) -> Parameter:
    annotation, default = made.annotation, made.default
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return Parameter(
        made.name,
        kind=KINDS[made.kind],
        annotation=None if annotation is made.empty else FULL_NAMES.sub("", text),
        default=None if default is made.empty else repr(default),
    )


def _link(obj: Object, name: str) -> str:
    """The name as code, leading to where the site explains it, if it does."""
    first, dot, rest = name.partition(".")
    try:
        path = name if first == "fastdiff" else f"{obj.resolve(first)}{dot}{rest}"
    except NameResolutionError:
        return f"`{name}`"
    return f'<autoref identifier="{path}" optional>`{name}`</autoref>'
