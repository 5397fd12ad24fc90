"""The native CPU code under AddressSanitizer and UBSan, every operation and instruction set."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff import native

HERE = Path(__file__).parent
ROOT = HERE.parent


def runtime(name):
    """A library of the compiler's, or None where it has no such file."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """The native library, built with -fsanitize=address,undefined."""
    if not native.build_info()["compiler"].startswith("GNU") or runtime("libasan.so") is None:
        pytest.skip("needs GCC with libasan")
    for module in ("setuptools", "pybind11"):
        pytest.importorskip(module)
    for program in ("cmake", "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    folder = tmp_path_factory.mktemp("sanitized")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib"),
         "--build-temp", str(folder / "build")],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "FASTDIFF_SANITIZE": "address,undefined", "FASTDIFF_CUDA": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = (folder / "lib").rglob("_native*.so")
    return library


def check(library, *arguments):
    return subprocess.run(
        [sys.executable, str(HERE / "sanitizer_check.py"), str(library), *arguments],
        capture_output=True, text=True,
        env={
            **os.environ,
            "FASTDIFF_ISA": "",
            "FASTDIFF_BACKEND": "",
            "OMP_WAIT_POLICY": "passive",
            "PYTHONMALLOC": "malloc",
            # libstdc++ too: libasan looks for its __cxa_throw when it starts.
            "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libstdc++.so')}",
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        },
    )  # fmt: skip


@pytest.mark.slow
def test_no_operation_leaves_its_memory(sanitized):
    done = check(sanitized)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    for isa in native.library().supported_isas():
        for threads in (1, 3):
            assert f"ran group_norm_silu {isa} {threads}" in done.stdout


@pytest.mark.slow
def test_the_sanitizer_is_awake(sanitized):
    done = check(sanitized, "overflow")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
