"""Builds fastdiff._native with CMake and ninja, and maps kernels/ to fastdiff.kernels.

Environment variables read at build time:
  FASTDIFF_CUDA      1 compiles the CUDA kernels (an error without nvcc), 0 leaves them out;
                     unset, they are compiled where there are an NVIDIA driver and nvcc, which
                     takes minutes; "emulate" compiles them for the CPU, where the backend
                     "cuda" then takes CPU tensors: slow, for tests. The build prints its decision.
  FASTDIFF_CUDA_ARCHS  what the CUDA kernels are compiled for, for example "80-real 90a-real";
                     unset, for every generation of GPU that is served.
  CMAKE_BUILD_TYPE   "Debug" compiles without optimisation, in a third of the time.
  FASTDIFF_SANITIZE  passed to -fsanitize=, for example "address,undefined"; a debugging build.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from sysconfig import get_platform

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
DRIVERS = ("/proc/driver/nvidia/version", "/dev/dxg")  # Linux, and Linux under Windows


class CMakeBuild(build_ext):
    """Configure, build and place the one native module; CMakeLists.txt owns the sources."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = self.build_folder() / "native"
        options = cmake_options(module.name.removeprefix("_native"))
        discard_stale_build(build_dir, options)

        cmake = program("cmake")
        defined = [f"-D{name}={value}" for name, value in options.items()]
        run([cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *defined])
        run([cmake, "--build", str(build_dir), "--parallel", str(os.cpu_count() or 1)])
        replace(build_dir / module.name, module)

    def build_folder(self) -> Path:
        """One that stays, so that the next build compiles only what changed."""
        if not self.editable_mode:
            return Path(self.build_temp).resolve()
        # An editable install has a new build_temp every time: take where the others build.
        return ROOT / "build" / f"temp.{get_platform()}-{sys.implementation.cache_tag}"


def cmake_options(suffix: str) -> dict[str, str]:
    import pybind11

    cuda, why = cuda_choice()
    return {
        "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
        "CMAKE_MAKE_PROGRAM": program("ninja"),
        "FASTDIFF_MODULE_SUFFIX": suffix,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "FASTDIFF_CUDA": cuda,
        "FASTDIFF_CUDA_WHY": why,
        "FASTDIFF_CUDA_ARCHS": ";".join(cuda_architectures()),
        "FASTDIFF_SANITIZE": os.environ.get("FASTDIFF_SANITIZE", ""),
    }


def cuda_choice() -> tuple[str, str]:
    """FASTDIFF_CUDA of CMakeLists.txt, and why the kernels are left out where they are."""
    asked = os.environ.get("FASTDIFF_CUDA", "")
    choices = {"": "AUTO", "0": "OFF", "1": "ON", "emulate": "EMULATE"}
    if asked not in choices:
        raise SetupError(f"FASTDIFF_CUDA is {asked!r}: expected 0, 1, emulate or unset")
    if not asked and not any(map(os.path.exists, DRIVERS)):
        return "OFF", "no NVIDIA driver here (FASTDIFF_CUDA=1 compiles them all the same)"
    return choices[asked], f"FASTDIFF_CUDA={asked}"


def cuda_architectures() -> list[str]:
    """Those that are asked for by number, as the library is later asked what it serves."""
    asked = os.environ.get("FASTDIFF_CUDA_ARCHS", "").replace(";", " ").split()
    for name in asked:
        if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", name):
            raise SetupError(
                f"FASTDIFF_CUDA_ARCHS has {name!r}: expected architectures such as 80-real, "
                "90a-real or 100, with spaces between them"
            )
    return asked


def replace(built: Path, module: Path) -> None:
    """Put the module there whole: a process may have loaded the one before."""
    module.parent.mkdir(parents=True, exist_ok=True)
    new = module.with_name(f".{module.name}.{os.getpid()}.tmp")
    shutil.copy2(built, new)
    os.replace(new, module)


def discard_stale_build(build_dir: Path, options: dict[str, str]) -> None:
    """Start afresh when a tool moved or came: with build isolation every build has its own ninja
    and pybind11, and a CMake cache that names those of an earlier build fails to configure; one
    that found no nvcc never looks again."""
    variables = ("CXX", "CXXFLAGS", "CUDACXX", "CUDAFLAGS", "CUDA_HOME", "CUDA_PATH")
    chosen = [os.environ.get(name, "") for name in variables]
    # python and python3.11 of an environment are one: what was compiled by one the other keeps.
    options = options | {"Python_EXECUTABLE": os.path.realpath(sys.executable)}
    fingerprint = json.dumps([program("cmake"), shutil.which("nvcc"), chosen, options])
    stamp = build_dir / "fastdiff_options.json"
    if not stamp.is_file() or stamp.read_text() != fingerprint:
        shutil.rmtree(build_dir, ignore_errors=True)
        build_dir.mkdir(parents=True)
        stamp.write_text(fingerprint)


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SetupError(
            f"{name} was not found: it comes with a plain 'pip install .'; "
            f"with --no-build-isolation run 'pip install {name}' first"
        )
    return path


def run(command: list[str]) -> None:
    """Run one build step; a failing one has already said why on its own output."""
    returncode = subprocess.run(command).returncode
    if returncode != 0:
        raise SetupError(f"building fastdiff's native library failed: {' '.join(command[:2])} …")


setup(
    packages=[*find_packages(include=["fastdiff", "fastdiff.*"]), "fastdiff.kernels"],
    # A top-level module named "kernels" would shadow a well-known package of that name.
    package_dir={"fastdiff.kernels": "kernels"},
    ext_modules=[Extension("fastdiff._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
