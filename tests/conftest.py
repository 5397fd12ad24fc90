"""The choice of tests, and the fixtures of more than one folder."""

import functools
import os
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

# Before torch is imported, for this process and those that tests start: as the command does.
run_path(str(Path(__file__).parents[1] / "fastdiff" / "wait_policy.py"))["choose"]()

import pytest
import torch

import extent
import optional_packages
from kernel_tools import ISAS, forced_isa


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="of every test function the first case")
    parser.addoption("--all", action="store_true", help="the tests marked long too")


def pytest_configure(config):
    extent.everything = config.getoption("--all")
    if optional_packages.installed("hypothesis"):
        no_example_is_too_slow()


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    options = {"quick": config.getoption("--quick"), "everything": config.getoption("--all")}
    chosen = extent.chosen(extent.ordered(items), **options)
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def no_example_is_too_slow():
    """Hypothesis' own limits, 0.2 s an example and 1 s for drawing ten, fail on a busy machine."""
    from hypothesis import HealthCheck, settings

    unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("unhurried", **unhurried)
    settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def sanitized(request):
    """The native library with AddressSanitizer and UBSan, and CUDA on emulated threads."""
    import sanitized

    return sanitized.make(complete=request.config.getoption("--all"))


@pytest.fixture(params=ISAS)
def isa(request):
    """An instruction set of this CPU, in use during the test."""
    with forced_isa(request.param):
        yield request.param


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def made():
    """Samplers capture on the CPU; calling it says how many graphs, since the test began."""
    from capture_tools import taped

    with taped() as count:
        yield count


@pytest.fixture
def device(request, monkeypatch):
    """Where captured steps run, a GPU or the CPU with a fake of torch.cuda: ``name``, and ``cuda``:
    torch.cuda or the fake. cuDNN takes the same kernels in a graph and eagerly."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if request.param == "cuda":
        draw = functools.partial(torch.randn, device="cuda")
        yield SimpleNamespace(name="cuda", cuda=torch.cuda, draw=draw)
        return
    from fake_cuda import faked

    with faked() as cuda:
        yield SimpleNamespace(name="cpu", cuda=cuda, draw=cuda.draw)


@pytest.fixture
def start(tmp_path):
    """``start(count, argv, ...)``: processes (``parts_tools.Group``) that end with the test."""
    from parts_tools import Group, forkserver

    groups = []

    def start_group(*args, **options):
        folder = tmp_path / f"group{len(groups)}"
        folder.mkdir()
        groups.append(Group(forkserver(), folder, *args, **options))
        return groups[-1]

    yield start_group
    for group in groups:
        group.kill()


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than processors: tests of real processes leave a fifth of the time idle."""
    return (os.cpu_count() or 1) + 1


def pytest_pycollect_makemodule(module_path: Path, parent):
    return optional_packages.skipped(module_path, parent)
