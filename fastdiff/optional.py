"""Packages that only some installs have."""

import importlib
import importlib.metadata
from types import ModuleType

from fastdiff.errors import InputError, first_line


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or raise InputError: naming the extra that brings it, or why it fails."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"this needs the package '{error.name}', which is not installed: "
            f"pip install 'fastdiff[{extra}]'"
        ) from error
    except Exception as error:  # whatever such a package, or one that it needs, runs as it loads
        raise InputError(
            f"'{module}' is installed and does not import: {first_line(error)}"
        ) from error


def version_of(package: str) -> str | None:
    """The version that is installed; None where the package is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
