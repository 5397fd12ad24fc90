"""The sdist, the wheel built from it in isolation, and what an install of that wheel holds.

One sdist and one wheel serve every test: each is built as a user's pip would, in an environment
of its own that has the build requirements and no torch.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from paths import ROOT

OFFLINE = ("No matching distribution found", "Could not find a version", "Connection", "resolve")

pytestmark = pytest.mark.slow


def run(command, *, cwd, **environment):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_or_skip_offline(command, *, cwd, **environment):
    done = run(command, cwd=cwd, **environment)
    if done.returncode != 0:
        if any(sign in done.stdout for sign in OFFLINE):
            pytest.skip(f"the build requirements cannot be had here: {done.stdout[-300:]}")
        pytest.fail(done.stdout[-3000:])
    return done.stdout


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("sdist")
    run_or_skip_offline(
        [sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT], cwd=folder
    )
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="session")
def wheel_build(sdist, tmp_path_factory):
    """(folder that pip wheel filled, what the build printed)"""
    folder = tmp_path_factory.mktemp("wheel")
    output = run_or_skip_offline(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, sdist],
        cwd=folder,
        FASTDIFF_CUDA="0",
        CMAKE_BUILD_TYPE="Debug",  # the tests before have the optimised one
    )
    return folder, output


@pytest.fixture(scope="session")
def wheel(wheel_build):
    (path,) = wheel_build[0].iterdir()  # exactly one
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed") / "site"
    run_or_skip_offline(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, wheel],
        cwd=folder.parent,
    )
    return folder


def test_the_sdist_has_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md"):
        assert needed in names
    sources = [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert sources and set(sources) <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_pip_wheel_gives_one_wheel_for_this_python(wheel):
    assert wheel.name.startswith(f"fastdiff-0.1.0-cp{sys.version_info[0]}{sys.version_info[1]}-")


def test_the_build_prints_what_it_decided(wheel_build):
    assert "fastdiff: CUDA kernels are left out: FASTDIFF_CUDA=0" in wheel_build[1]
    assert "fastdiff: OpenMP is on" in wheel_build[1]


def test_the_wheel_holds_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastdiff", "fastdiff-0.1.0.dist-info"}
    assert sum(name.startswith("fastdiff/_native.") and name.endswith(".so") for name in names) == 1
    packaged = {name.removeprefix("fastdiff/") for name in names}
    for folder, prefix in (("fastdiff", ""), ("kernels", "kernels/")):
        for path in (ROOT / folder).rglob("*.py"):
            assert prefix + path.relative_to(ROOT / folder).as_posix() in packaged


def test_the_wheel_does_not_require_the_build_tools(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read("fastdiff-0.1.0.dist-info/METADATA").decode()
    core = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert sorted(core) == ["numpy", "safetensors", "torch>=2.11"]
    assert (
        "fastdiff = fastdiff.cli:main"
        in archive.read("fastdiff-0.1.0.dist-info/entry_points.txt").decode()
    )


def test_the_installed_wheel_works(installed):
    code = """
import importlib.util, json, sys
import fastdiff.kernels
from fastdiff.ops import native
from fastdiff.ops.normal import op as rng
rng.normal((2, 3, 8, 8), seed=1)
print(json.dumps({
    "kernels": fastdiff.kernels.__file__,
    "native": native.library().__file__,
    "cuda": native.build_info()["cuda"],
    "top": importlib.util.find_spec("kernels") is not None,
}))
"""
    done = run([sys.executable, "-c", code], cwd=installed.parent, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kernels"] == str(installed / "fastdiff" / "kernels" / "__init__.py")
    assert Path(found["native"]).parent == installed / "fastdiff"
    assert found["cuda"] is None
    assert not found["top"]


def test_asking_for_cuda_without_nvcc_is_an_error(sdist, tmp_path):
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(f for f in folders if shutil.which("nvcc", path=f) is None)
    if shutil.which("c++", path=path) is None:
        pytest.skip("nvcc and the C++ compiler stand in one folder")
    environment = dict(PATH=path, FASTDIFF_CUDA="1", CUDACXX="", CUDA_HOME="", CUDA_PATH="")
    done = run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, sdist],
        cwd=tmp_path,
        **environment,
    )
    assert done.returncode != 0
    assert "FASTDIFF_CUDA=1 asks for the CUDA kernels, but no working nvcc" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_build_that_found_no_nvcc_is_not_kept_when_one_is_named(tmp_path, monkeypatch):
    # CMake remembers that it found no CUDA compiler, and would never look again.
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    discard = runpy.run_path(str(ROOT / "setup.py"))["discard_stale_build"]
    monkeypatch.setitem(discard.__globals__, "program", lambda name: name)
    build = tmp_path / "native"
    discard(build, ["-DA=1"])
    kept = build / "CMakeCache.txt"
    kept.touch()
    discard(build, ["-DA=1"])
    assert kept.exists()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    discard(build, ["-DA=1"])
    assert build.exists() and not kept.exists()
