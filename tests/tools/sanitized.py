"""The native library built with AddressSanitizer and UBSan, its CUDA kernels emulated."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cpu_mutants
import cuda_mutants
from paths import ROOT, TOOLS

COMPLETE = {"FASTDIFF_SANITIZE": "address,undefined"}
# Most of UBSan's checks are of every access and double the code; of the instruction sets one.
SHORT = {"FASTDIFF_SANITIZE": "address,alignment", "FASTDIFF_BASELINE_ONLY": "ON"}


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
    """csrc/ with the switches of all mutants, built in ``folder``; what is there is built on."""

    def __init__(self, folder: Path, options: dict[str, str]):
        import pybind11

        source, build = folder / "source", folder / "build"
        copy_sources(source)
        options = {
            "CMAKE_BUILD_TYPE": "Debug",
            # ASan's checks are calls, a third of the code that they are inline.
            "CMAKE_CXX_FLAGS": "--param asan-instrumentation-with-call-threshold=0",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(folder / "lib"),
            "FASTDIFF_CUDA": "EMULATE",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            **options,
        }
        given = [f"-D{name}={value}" for name, value in options.items()]
        done = command("cmake", "-S", source, "-B", build, "-G", "Ninja", *given)
        assert done.returncode == 0, done.stdout[-5000:]
        done = command("cmake", "--build", build, "--parallel", os.cpu_count() or 1)
        assert done.returncode == 0, done.stdout[-5000:]
        (self.library,) = (folder / "lib").glob("_native*.so")

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
        self, *arguments: str, backend: str = "cuda", **environment: str
    ) -> subprocess.CompletedProcess:
        """pytest in which ``backend`` serves every call, by this build (emulated_cuda.py)."""
        # A sanitizer ends the process: what it says must not be held back by pytest.
        options = ["-q", "-x", "--tb=short", "--capture=sys"]
        options += ["-p", "emulated_cuda", "-p", "no:cacheprovider"]
        return self.run(
            "-m", "pytest", *options, *arguments,
            FASTDIFF_BACKEND=backend, PYTHONPATH=str(TOOLS), **environment,
        )  # fmt: skip


def command(*words: object) -> subprocess.CompletedProcess:
    done = [str(word) for word in words]
    return subprocess.run(done, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def copy_sources(folder: Path) -> None:
    """CMakeLists.txt and csrc/ with the mutants' switches; a file that is the same stays as old as
    it is, so that ninja compiles what changed."""
    texts = {Path("CMakeLists.txt"): (ROOT / "CMakeLists.txt").read_text()}
    texts[Path("csrc/cpu", cpu_mutants.HEADER)] = cpu_mutants.SWITCH
    for path in (p for p in (ROOT / "csrc").rglob("*") if p.is_file()):
        name = path.relative_to(ROOT)
        of_csrc = name.relative_to("csrc").as_posix()
        text = cuda_mutants.with_switches(of_csrc, path.read_text())
        texts[name] = cpu_mutants.with_switches(of_csrc, text)
    for name, text in texts.items():
        copy = folder / name
        if not copy.exists() or copy.read_text() != text:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)


def make(complete: bool) -> Build:
    """The short or the complete build, of now; skips the test where the tools are missing.

    Both stay in build/, where a later run compiles only what has changed.
    """
    from fastdiff.ops import native

    if not native.build_info()["compiler"].startswith("GNU") or runtime("libasan.so") is None:
        pytest.skip("needs GCC with libasan")
    pytest.importorskip("pybind11")
    for program in ("cmake", "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    folder = ROOT / "build" / ("sanitized-complete" if complete else "sanitized-short")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of pytest-xdist's processes the first builds
        return Build(folder, COMPLETE if complete else SHORT)
