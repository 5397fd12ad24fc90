"""The sdist, the wheel built from it in isolation, and what an install of that wheel holds.

One sdist and one wheel serve every test: each is built as a user's pip would, in an environment
of its own that has the build requirements and no torch. `make test` compiles nothing again: its
wheel is given the native library of this install.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastdiff
from fastdiff.ops import native
from optional_packages import OPTIONAL, imported
from paths import ROOT

OFFLINE = ("No matching distribution found", "Could not find a version", "Connection")

VERSION = fastdiff.__version__

pytestmark = pytest.mark.seconds


def declared(extras=()):
    """The distributions that fastdiff[extras] asks for, by its own list."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    names = set()
    for requirement in map(Requirement, lines):
        own = requirement.name == "fastdiff"
        names |= declared(requirement.extras) if own else {canonicalize_name(requirement.name)}
    return names


def test_what_the_tests_import_is_installed_with_them():
    """A package that only this machine has would stop the tests everywhere else."""
    tests = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    ours = {
        "fastdiff",
        "kernels",
        *(name for path in tests for name in (path.stem, path.parent.name)),
    }
    imports = set().union(*map(imported, tests)) - ours - sys.stdlib_module_names
    assert {"numpy", "pytest", "torchmetrics"} <= imports
    of_module = packages_distributions()
    for module in imports:
        found = {canonicalize_name(name) for name in of_module.get(module, [module])}
        assert found & declared(["test"]), f"{module}: pyproject.toml's extra test lacks it"
        # Those that every install has; a file that imports another is skipped where it has not.
        assert found & (declared() | {"pytest"}) or module in OPTIONAL, f"{module}: not in OPTIONAL"


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


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("ERROR: No matching distribution found for setuptools>=77", pytest.skip.Exception),
        (
            "ERROR: pip's dependency resolver found that fastdiff needs another",
            pytest.fail.Exception,
        ),
    ],
    ids=["offline", "at fault"],
)
def test_only_what_cannot_be_fetched_is_skipped(said, outcome, tmp_path):
    with pytest.raises(outcome):
        run_or_skip_offline([sys.executable, "-c", f"raise SystemExit({said!r})"], cwd=tmp_path)


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


# setup.py with a copy of the library (argv[1]) in place of the build.
COPYING = """
import runpy, shutil, sys
import setuptools
from setuptools.command.build_ext import build_ext

class Copy(build_ext):
    def build_extension(self, extension):
        shutil.copy(sys.argv[1], self.get_ext_fullpath(extension.name))

def setup(real=setuptools.setup, **options):
    real(**options | {"cmdclass": {"build_ext": Copy}, "script_args": ["-q", "bdist_wheel"]})

setuptools.setup = setup
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture(scope="session")
def wheel_of_copies(sdist, tmp_path_factory):
    """The folder of a wheel from the sdist and the library that is installed here."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(sdist, folder)
    (source,) = folder.iterdir()
    library = native.library().__file__
    done = run([sys.executable, "-c", COPYING, library], cwd=source)
    assert done.returncode == 0, done.stdout[-3000:]
    return source / "dist"


@pytest.fixture(
    scope="session", params=["copied library", pytest.param("built", marks=pytest.mark.long)]
)
def wheel(request):
    if request.param == "built":
        folder = request.getfixturevalue("wheel_build")[0]
    else:
        folder = request.getfixturevalue("wheel_of_copies")
    (path,) = folder.iterdir()  # exactly one
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
    for needed in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        assert needed in names
    sources = [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert sources and set(sources) <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_pip_wheel_gives_one_wheel_for_this_python(wheel):
    assert wheel.name.startswith(
        f"fastdiff-{VERSION}-cp{sys.version_info[0]}{sys.version_info[1]}-"
    )


@pytest.mark.long
def test_the_build_prints_what_it_decided(wheel_build):
    assert "fastdiff: CUDA kernels are left out: FASTDIFF_CUDA=0" in wheel_build[1]
    assert "fastdiff: OpenMP is on" in wheel_build[1]


def test_the_wheel_holds_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastdiff", f"fastdiff-{VERSION}.dist-info"}
    assert sum(name.startswith("fastdiff/_native.") and name.endswith(".so") for name in names) == 1
    packaged = {name.removeprefix("fastdiff/") for name in names}
    assert "py.typed" in packaged
    for folder, prefix in (("fastdiff", ""), ("kernels", "kernels/")):
        for path in (ROOT / folder).rglob("*.py"):
            assert prefix + path.relative_to(ROOT / folder).as_posix() in packaged


def test_the_wheel_does_not_require_the_build_tools(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(f"fastdiff-{VERSION}.dist-info/METADATA").decode()
    core = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert sorted(core) == ["filelock>=3.12", "numpy", "safetensors", "torch>=2.11"]
    assert (
        f"\nVersion: {VERSION}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    )
    licence = archive.read(f"fastdiff-{VERSION}.dist-info/licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert (
        "fastdiff = fastdiff.cli:main"
        in archive.read(f"fastdiff-{VERSION}.dist-info/entry_points.txt").decode()
    )


def test_the_installed_wheel_works(installed, request):
    code = """
import importlib.util, json, sys
import fastdiff.kernels
from fastdiff.ops import native
from fastdiff.ops.normal import normal
normal((2, 3, 8, 8), seed=1)
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
    built = request.node.callspec.params["wheel"] == "built"
    assert found["cuda"] == (None if built else native.build_info()["cuda"])
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
    discard(build, {"A": "1"})
    kept = build / "CMakeCache.txt"
    kept.touch()
    discard(build, {"A": "1"})
    assert kept.exists()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    discard(build, {"A": "1"})
    assert build.exists() and not kept.exists()


def test_cuda_is_compiled_where_there_is_a_driver_or_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    choice = runpy.run_path(str(ROOT / "setup.py"))["cuda_choice"]
    driver = tmp_path / "version"
    monkeypatch.setitem(choice.__globals__, "DRIVERS", (str(driver),))
    monkeypatch.delenv("FASTDIFF_CUDA", raising=False)
    assert choice()[0] == "OFF" and choice()[1].startswith("no NVIDIA driver here")
    monkeypatch.setenv("FASTDIFF_CUDA", "1")
    assert choice()[0] == "ON"
    driver.touch()
    monkeypatch.delenv("FASTDIFF_CUDA")
    assert choice()[0] == "AUTO"
    monkeypatch.setenv("FASTDIFF_CUDA", "0")
    assert choice() == ("OFF", "FASTDIFF_CUDA=0")


def test_the_cuda_architectures_are_those_asked_for(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    monkeypatch.setenv("FASTDIFF_CUDA_ARCHS", "80-real  90a-real;100")
    script = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setitem(script["program"].__globals__, "program", lambda name: name)
    assert script["cmake_options"](".so")["FASTDIFF_CUDA_ARCHS"] == "80-real;90a-real;100"
    for name in ("native", "sm_90", "9.0", "90-fast"):
        monkeypatch.setenv("FASTDIFF_CUDA_ARCHS", name)
        with pytest.raises(script["SetupError"], match=f"FASTDIFF_CUDA_ARCHS has '{name}'"):
            script["cuda_architectures"]()
    monkeypatch.delenv("FASTDIFF_CUDA_ARCHS")
    assert script["cuda_architectures"]() == []


def test_every_kind_of_build_finds_what_another_compiled(monkeypatch):
    """`setup.py build_ext`, `pip install -e` and `pip wheel` of a clone: one folder."""
    from setuptools.dist import Distribution

    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    monkeypatch.chdir(ROOT)
    build = runpy.run_path(str(ROOT / "setup.py"))["CMakeBuild"]
    plain, editable = build(Distribution()), build(Distribution())
    plain.ensure_finalized()
    editable.ensure_finalized()
    editable.editable_mode, editable.build_temp = True, "/tmp/new"
    assert plain.build_folder() == editable.build_folder()


def test_every_name_of_this_python_builds_the_same(monkeypatch, tmp_path):
    """pip may run as python3.11 where make ran python: what one compiled the other keeps."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    script = runpy.run_path(str(ROOT / "setup.py"))
    script["discard_stale_build"](tmp_path / "build", script["cmake_options"](".so"))
    (tmp_path / "build" / "compiled.o").touch()
    other = tmp_path / "python3.11"
    other.symlink_to(Path(sys.executable).resolve())
    monkeypatch.setattr(sys, "executable", str(other))
    script["discard_stale_build"](tmp_path / "build", script["cmake_options"](".so"))
    assert (tmp_path / "build" / "compiled.o").exists()


def test_a_module_in_use_is_replaced_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    replace = runpy.run_path(str(ROOT / "setup.py"))["replace"]
    built, module = tmp_path / "built.so", tmp_path / "fastdiff" / "_native.so"
    built.write_text("one")
    replace(built, module)
    with module.open() as loaded:
        built.write_text("other")
        replace(built, module)
        assert (loaded.read(), module.read_text()) == ("one", "other")
    assert os.listdir(module.parent) == [module.name]


@pytest.mark.long
def test_a_build_with_cuda_imports_without_a_driver(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "build"]
    done = run(command, cwd=ROOT, FASTDIFF_CUDA="1", CMAKE_BUILD_TYPE="Debug")
    assert done.returncode == 0, done.stdout[-3000:]
    (library,) = (tmp_path / "lib").rglob("_native*")
    code = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("fastdiff._native", {str(library)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.build_info()["cuda"]
assert torch.version.cuda or "libcudart" not in open("/proc/self/maps").read()
"""
    done = run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def with_each_torch(*wheels):
    """The command that tries the wheels with the oldest torch that they allow, and a newer one."""
    return [ROOT / ".ci" / "check_wheel.py", "--torch", "2.11.0", "--torch", "2.13.0", *wheels]


@pytest.mark.parametrize("broken", [None, "2.11.0", "2.13.0"])
def test_a_wheel_is_tried_with_every_torch_that_is_named(tmp_path, monkeypatch, capsys, broken):
    wheels = [tmp_path / "a.whl", tmp_path / "b.whl"]
    script, *arguments = map(str, with_each_torch(*wheels))
    main, tried = runpy.run_path(script)["main"], []

    def serve(wheels, version):
        tried.append((wheels, version))
        return version != broken

    monkeypatch.setitem(main.__globals__, "serve", serve)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    assert main() == (0 if broken is None else 1)
    assert tried == [(wheels, version) for version in ("2.11.0", "2.13.0")]
    said = "one wheel serves them all" if broken is None else f"failed with torch {broken}"
    assert capsys.readouterr().out.splitlines() == [said]


@pytest.mark.long
def test_one_wheel_serves_several_versions_of_torch(wheel_build, wheel_of_copies, tmp_path):
    wheels = [wheel for folder in (wheel_build[0], wheel_of_copies) for wheel in folder.iterdir()]
    command = [sys.executable, *with_each_torch(*wheels)]
    assert "one wheel serves them all" in run_or_skip_offline(command, cwd=tmp_path)
