"""make gpu-bundle: what a GPU machine without a network should not have to build or fetch.

    PYTHON -m gpu.bundle [--caches FILE]

Into build/gpu-bundle, which the runs look into: the native library for the Python that runs this
and for the H100 and H200 alone, the wheels of the peers (diffusers and what it needs), and the
compilers' caches of an earlier run. The Python must be of the GPU machine's version; it needs
neither torch nor anything else installed.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from gpu import caches, library
from gpu.machine import nvcc_version
from gpu.places import BUNDLE, ROOT

ARCHITECTURE = "90a-real"
OPTIONS = {"FASTDIFF_CUDA": "1", "FASTDIFF_CUDA_ARCHS": ARCHITECTURE}
PEERS = ("diffusers>=0.36",)
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
TOOLS = ROOT / "build" / f"gpu-tools-{VERSION}"  # an environment with cmake, ninja and pybind11


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--caches", type=Path, metavar="FILE", help="an earlier run's caches.tar.gz"
    )
    given = parser.parse_args(argv)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    has_venv = importlib.util.find_spec("ensurepip") is not None
    for line in (lacks := missing(VERSION, header, nvcc_version(), has_venv)):
        print(f"make gpu-bundle: {line}", file=sys.stderr)
    if lacks:
        return 1
    if Path(sys.prefix) != TOOLS:
        return subprocess.call([make_tools(), "-m", "gpu.bundle", *(argv or sys.argv[1:])])
    failures = [*put_library(), *put_wheels(), *put_caches(given.caches)]
    for line in failures:
        print(f"make gpu-bundle: {line}", file=sys.stderr)
    show()
    return 1 if failures else 0


def missing(version: str, header: Path, nvcc: str | None, has_venv: bool) -> list[str]:
    """What the library cannot be built without, a line each."""
    lines = []
    if not has_venv:
        lines.append(f"Python {version} has no ensurepip: install python{version}-venv")
    if not header.exists():
        lines.append(
            f"{header} is missing: install the headers of Python {version} (python{version}-dev), "
            "or name another: make gpu-bundle PYTHON=/path/to/python3.12"
        )
    if nvcc is None:
        lines.append("no nvcc on PATH or in /usr/local/cuda: install the CUDA toolkit 13.0")
    return lines


def make_tools() -> str:
    """The environment's Python."""
    python = TOOLS / "bin" / "python"
    if not python.exists():
        print(f"== Making {TOOLS.name} with the build tools", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(TOOLS)], check=True)
        wanted = subprocess.run(
            [str(python), str(ROOT / ".ci" / "requirements.py")],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *wanted], check=True)
    return str(python)


def put_library() -> list[str]:
    print(f"== The library for Python {VERSION} and {ARCHITECTURE}", flush=True)
    for old in library.found_in([BUNDLE]):
        old.unlink()
    try:
        built = library.build(OPTIONS, ROOT / "build" / f"gpu-native-{VERSION}")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return [f"the library was not built: {error}"]
    library.place(built, BUNDLE / built.name)
    return []


def put_wheels() -> list[str]:
    print(f"== The wheels of {', '.join(PEERS)}", flush=True)
    wheels = BUNDLE / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(wheels), *PEERS])
    return [f"the wheels of {', '.join(PEERS)} were not fetched"] if done.returncode else []


def put_caches(file: Path | None) -> list[str]:
    """Kept from the bundle before where none are named."""
    if file is None:
        return []
    if not file.is_file():
        return [f"there is no {file}: expected the {caches.FILE} that an earlier run left"]
    shutil.copy2(file, BUNDLE / caches.FILE)
    return []


def show() -> None:
    files = [path for path in BUNDLE.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files) / 2**20
    print(f"== {os.path.relpath(BUNDLE)}: {len(files)} files, {total:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
