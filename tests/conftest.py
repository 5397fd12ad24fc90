"""A test file that imports a package which is not installed is skipped, with a line that says so.

On a GPU machine without a network the packages of the extra "test" are what they are; an import
error there would stop the whole run.
"""

import ast
import fcntl
import importlib.util
import os
from pathlib import Path
from runpy import run_path

# Before torch is imported, for this process and those that tests start: as the command does.
run_path(str(Path(__file__).parents[1] / "fastdiff" / "wait_policy.py"))["choose"]()

import pytest

from kernel_tools import ISAS, forced_isa

OPTIONAL = {"build", "diffusers", "hypothesis", "matplotlib", "PIL", "scipy", "sklearn"}
OPTIONAL |= {"tensorboard", "tqdm", "triton"}


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="run the tests marked exhaustive")


def pytest_collection_modifyitems(config, items):
    # Long files first: of two processes none then waits for the other's at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not config.getoption("--exhaustive"):
        skip = pytest.mark.skip(reason="takes minutes; run with --exhaustive")
        for item in items:
            if item.get_closest_marker("exhaustive"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """The native library with AddressSanitizer and UBSan, and CUDA on emulated threads."""
    import sanitized

    # Of pytest-xdist's processes the first builds, in the folder that they share.
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(shared / "sanitized.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sanitized.make(shared / "sanitized")


@pytest.fixture(params=ISAS)
def isa(request):
    """An instruction set of this CPU, in use during the test."""
    with forced_isa(request.param):
        yield request.param


@pytest.fixture
def seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def made():
    """Samplers capture on the CPU; calling it says how many graphs, since the test began."""
    from capture_tools import taped

    with taped() as count:
        yield count


@pytest.fixture
def few_blocks(request):
    """Emulated grids cut to few blocks: a kernel that strides does all the work all the same."""
    from fastdiff.ops import native

    if not native.emulates_cuda():
        yield
        return
    native.library().limit_emulated_grid(request.param)
    yield
    native.library().limit_emulated_grid(0)


class Unavailable(pytest.Module):
    missing: list[str]

    def collect(self):
        names = ", ".join(self.missing)
        pytest.skip(f"{self.path.name} needs {names}, not installed here", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent):
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
