"""fastdiff: fast training and sampling of DDPM-family diffusion models.

The public names stand in fastdiff/public.py; each module's docstring says where it comes from.

On a CPU that other programs keep busy, set ``GOMP_SPINCOUNT=1000`` in the environment before torch
is imported (the ``fastdiff`` command does so by itself): OpenMP's threads, which otherwise spin
while they wait, take many times as long there. fastdiff/wait_policy.py has the figures.
"""

from fastdiff import wait_policy

wait_policy.choose_for_command()  # before torch is imported

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # the only place: pyproject.toml reads it here

if TYPE_CHECKING:
    from fastdiff.public import *
    from fastdiff.public import __all__ as __all__
else:  # where a type checker would take every name to exist

    def __getattr__(name: str) -> Any:
        """The public names on first use, so that ``fastdiff --help`` does not wait for torch."""
        if not name.startswith("__") or name == "__all__":
            public = importlib.import_module("fastdiff.public")
            if name == "__all__" or name in getattr(public, "__all__", ()):
                globals()[name] = getattr(public, name)
        if name not in globals():  # a submodule that the import above has loaded is there by now
            raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("fastdiff.public").__all__})
