"""Which native library the phases use: one built beforehand where it fits, else one built here.

The library of ``make gpu-bundle`` is taken first, then that of an earlier run here, then the
clone's own. None fits: one is built, for this GPU alone. No nvcc, or a build that fails: one that
only lacks this GPU's kernels serves, or is built, and Triton's phases still run.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpu.machine import Machine, program
from gpu.places import MODULE, ROOT

NOTE = "library.json"  # beside a library: from which sources it was built
PROBE_S = 60
PLAIN_S = 35  # of the time to build, kept for a build without CUDA kernels
PROBE = (
    "import json; from fastdiff.ops import native; i = native.build_info(); "
    "print(json.dumps([i['cuda_archs'].split(), native.INTERFACE]))"
)


@dataclass(frozen=True)
class Library:
    """One that is there, and what is known of it."""

    path: Path
    archs: tuple[str, ...] = ()  # none: without CUDA kernels
    sources: str | None = None  # sources() when it was built; None: nobody noted them
    broken: str = ""  # why it cannot be loaded here


def sources(root: Path = ROOT) -> str:
    """A digest of what the library is built from."""
    digest = hashlib.sha256()
    for path in [root / "CMakeLists.txt", *sorted((root / "csrc").rglob("*"))]:
        if path.is_file():
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def found_in(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.glob(f"{MODULE}.*"))]


def examine(path: Path, machine: Machine) -> Library:
    """Load it in a process of its own, which it may take with it."""
    note = path.with_name(NOTE)
    built_from = json.loads(note.read_text())["sources"] if note.exists() else None
    if path.name != MODULE + machine.python:
        wanted = (MODULE + machine.python).split(".")[1]
        other = f"it is for {path.name.split('.')[1]}, and this Python is {wanted}"
        return Library(path, sources=built_from, broken=other)
    environment = {**os.environ, "FASTDIFF_LIBRARY": str(path)}
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROBE_S, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return Library(path, sources=built_from, broken=f"it did not load within {PROBE_S} s")
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        why = said[-1] if said else f"its process ended with {done.returncode}"
        return Library(path, sources=built_from, broken=why)
    archs, _ = json.loads(done.stdout.splitlines()[-1])
    return Library(path, archs=tuple(archs), sources=built_from)


def problem(library: Library, machine: Machine, now: str) -> str:
    """Why it does not fit, in words; "" where it does. ``now``: sources() of this clone."""
    from fastdiff.ops.native import archs_serve

    if library.broken:
        return library.broken
    if library.sources not in (None, now):
        return "it was built from other sources"
    if machine.architecture() is None:
        return ""
    if not library.archs:
        return "it has no CUDA kernels"
    if not archs_serve(list(library.archs), machine.capability):
        asked = ".".join(map(str, machine.capability))
        return f"it was built for {' '.join(library.archs)}, and {machine.gpu} is {asked}"
    return ""


def choose(
    libraries: Sequence[Library], machine: Machine, now: str
) -> tuple[Library | None, list[str]]:
    """The first that fits, or None; and a line on each one that does not."""
    lines = []
    for library in libraries:
        why = problem(library, machine, now)
        if not why:
            return library, lines
        lines.append(f"{library.path} does not fit: {why}")
    return None, lines


def without_kernels(libraries: Sequence[Library], now: str) -> Library | None:
    """One that at least loads and is of these sources: all but the CUDA kernels can run."""
    for library in libraries:
        if not library.broken and library.sources in (None, now):
            return library
    return None


def builds(machine: Machine) -> list[dict[str, str]]:
    """The environments of the builds to try, the best first."""
    plain = {"FASTDIFF_CUDA": "0"}
    architecture = machine.architecture()
    if machine.nvcc is None or architecture is None:
        return [plain]
    return [{"FASTDIFF_CUDA": "1", "FASTDIFF_CUDA_ARCHS": architecture}, plain]


def build(options: dict[str, str], folder: Path, limit_s: float | None = None) -> Path:
    """Build it into ``folder`` with a note of its sources. OSError or SubprocessError: it failed,
    or took longer than ``limit_s``.

    ``folder``/build keeps what was compiled for the next time.
    """
    tools = [str(Path(sys.executable).parent)]  # cmake and ninja of its environment
    nvcc = program("nvcc")
    if nvcc is not None:
        tools.append(str(Path(nvcc).parent))
    path = os.pathsep.join([*tools, os.environ.get("PATH", "")])
    target = folder / "built"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    command += ["--build-lib", str(target), "--build-temp", str(folder / "build")]
    environment = {**os.environ, **options, "PATH": path}
    _run(command, environment, limit_s)
    (module,) = found_in([target / "fastdiff"])
    placed = place(module, folder / module.name)
    placed.with_name(NOTE).write_text(json.dumps({"sources": sources(), **options}))
    return placed


def _run(command: list[str], environment: dict[str, str], limit_s: float | None) -> None:
    """In a group of its own: when its time is over its compilers end with it."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit_s)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if code != 0:
        raise subprocess.CalledProcessError(code, command)


def place(module: Path, target: Path) -> Path:
    """Copy it there whole, with its note: a process may have loaded the one before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for source, destination in ((module.with_name(NOTE), target.with_name(NOTE)), (module, target)):
        new = destination.with_name(f".{destination.name}.new")
        if source == destination:
            continue
        if not source.exists():
            destination.unlink(missing_ok=True)
            continue
        shutil.copy2(source, new)
        os.replace(new, destination)
    return target


def obtain(
    machine: Machine, folders: Sequence[Path], target: Path, limit_s: float
) -> tuple[Library | None, list[str]]:
    """Put the library that the phases use at ``target``; a line on each step that was not plain."""
    now = sources()
    libraries = [examine(path, machine) for path in found_in(folders)]
    library, lines = choose(libraries, machine, now)
    if library is not None:
        place(library.path, target)
        return library, lines
    fallback = without_kernels(libraries, now)
    deadline = time.monotonic() + limit_s
    for options in builds(machine):
        if options["FASTDIFF_CUDA"] == "0" and fallback is not None:
            lines.append(f"{fallback.path} serves all the same, without CUDA kernels for this GPU")
            place(fallback.path, target)
            return replace(fallback, archs=()), lines
        described = " ".join(f"{name}={value}" for name, value in options.items())
        kept = 0 if options["FASTDIFF_CUDA"] == "0" or fallback is not None else PLAIN_S
        left = max(deadline - kept - time.monotonic(), 1)
        try:
            place(build(options, target.parent.parent / "native", left), target)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            lines.append(f"a build with {described} failed: {' '.join(str(error).split())[:200]}")
            continue
        lines.append(f"built here with {described}")
        built = examine(target, machine)
        if not built.broken:
            return built, lines
        lines.append(f"what was built does not load: {built.broken}")
    return None, lines
