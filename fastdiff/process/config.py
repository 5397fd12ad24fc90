"""What the processes that name themselves in their config share: reading it back."""

from collections.abc import Callable
from typing import Any, TypeVar

from fastdiff.errors import InputError

P = TypeVar("P")


def built(kind: Callable[..., P], name: str, config: Any) -> P:
    """``kind`` of the arguments that stand in ``config`` beside {"process": name}.

    Raises InputError for a config of another process, and for arguments that are none.
    """
    came = config.get("process") if isinstance(config, dict) else config
    if came != name:
        raise InputError(f"config has process {came!r}, expected {name!r}")
    arguments = {key: value for key, value in config.items() if key != "process"}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise InputError(f"the config of process {name!r} does not fit: {error}") from None
