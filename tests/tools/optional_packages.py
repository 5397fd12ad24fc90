"""A test file that imports a package which is not installed is skipped, with a line that says so.

On a GPU machine without a network the packages of the extra "test" are what they are; an import
error there would stop the whole run.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

# test_packaging.py sees that none is missing here.
OPTIONAL = {"PIL", "build", "diffusers", "hypothesis", "lmdb", "matplotlib", "packaging", "prdc"}
OPTIONAL |= {"scipy", "setuptools", "sklearn", "tensorboard", "torchmetrics", "tqdm"}
OPTIONAL |= {"transformers", "triton"}


class Unavailable(pytest.Module):
    missing: list[str]

    def collect(self):
        names = ", ".join(self.missing)
        pytest.skip(f"{self.path.name} needs {names}, not installed here", allow_module_level=True)


def skipped(module_path: Path, parent) -> Unavailable | None:
    """In place of the file's module, where it imports a package that is not installed."""
    missing = sorted(name for name in imported(module_path) & OPTIONAL if not installed(name))
    if not missing:
        return None
    module = Unavailable.from_parent(parent, path=module_path)
    module.missing = missing
    return module


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports when it is loaded."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
