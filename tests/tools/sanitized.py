"""The native library built with AddressSanitizer and UBSan, its CUDA kernels emulated."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT, TOOLS


def runtime(name: str) -> str | None:
    """A library of the compiler's, or None where it has no such file."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return found if os.path.isabs(found) else None


class Build:
    """The repository's sources, built in ``folder``: the library, and objects to link anew."""

    def __init__(self, folder: Path):
        lib = folder / "lib"
        if not lib.exists():  # another process of this run may have built it
            self._build(folder, lib)
        (self.library,) = lib.rglob("_native*.so")
        self.objects = sorted((folder / "build").rglob("*.o"))

    def _build(self, folder: Path, lib: Path) -> None:
        environment = {"FASTDIFF_SANITIZE": "address,undefined", "FASTDIFF_CUDA": "emulate"}
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(lib),
             "--build-temp", str(folder / "build")],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Python with the sanitizers' runtime, and FASTDIFF_TEST_LIBRARY naming this build."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "FASTDIFF_TEST_LIBRARY": str(self.library),
                "FASTDIFF_ISA": "",
                "FASTDIFF_BACKEND": "",
                "PYTHONMALLOC": "malloc",
                # libstdc++ too: libasan looks for its __cxa_throw when it starts.
                "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libstdc++.so')}",
                "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
                "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
                **environment,
            },
        )

    def run_tests(
        self, *arguments: str, backend: str = "cuda", library: Path | None = None
    ) -> subprocess.CompletedProcess:
        """pytest in which ``backend`` serves every call, by this build or another library of its
        kind (emulated_cuda.py)."""
        # A sanitizer ends the process: what it says must not be held back by pytest.
        options = ["-q", "-x", "--tb=short", "--capture=sys"]
        options += ["-p", "emulated_cuda", "-p", "no:cacheprovider"]
        return self.run(
            "-m", "pytest", *options, *arguments,
            FASTDIFF_BACKEND=backend, FASTDIFF_TEST_LIBRARY=str(library or self.library),
            PYTHONPATH=str(TOOLS),
        )  # fmt: skip


def make(folder: Path) -> Build:
    """Build in ``folder``, or skip the test where the tools are missing."""
    from fastdiff.ops import native

    if not native.build_info()["compiler"].startswith("GNU") or runtime("libasan.so") is None:
        pytest.skip("needs GCC with libasan")
    for module in ("setuptools", "pybind11"):
        pytest.importorskip(module)
    for program in ("cmake", "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    return Build(folder)
