"""The first phase: what this machine has, a library that fits it, the peers and the caches.

    python -m gpu.first --out FOLDER [--dry] [--budget SECONDS]

It alone is needed by the others. Its line in rows.jsonl says what there is ("has"), by which the
runner leaves out phases, and in words what is missing ("notes").
"""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpu import caches, library, lines
from gpu.machine import notes, this_machine
from gpu.places import BUNDLE, ROOT, State


def main(argv: Sequence[str] | None = None) -> int:
    given = lines.arguments(__doc__, argv)
    state = State(given.dry)
    said = install_peers(BUNDLE / "wheels", state.peers)
    said += caches.unpack(BUNDLE, state.caches)
    machine = this_machine()
    if given.dry:
        machine = replace(machine, gpu=None, capability=None, memory_gib=0.0)
    folders = [BUNDLE, state.library.parent, ROOT / "fastdiff"]
    taken, more = library.obtain(machine, folders, state.library, given.budget)
    said += more
    archs = taken.archs if taken is not None else ()
    has = sorted({*machine.packages, *machine.programs, *(["cuda kernels"] if archs else [])})
    said += notes(machine)
    lines.write(
        given.out,
        "import",
        ok=taken is not None,
        notes=said,
        has=has,
        machine=machine.as_fields(),
        archs=archs,
    )
    print("\n".join(said))
    return 0 if taken is not None else 1


def install_peers(wheels: Path, target: Path) -> list[str]:
    """Unpack the wheels of what is not installed, beside what is: no package is replaced."""
    missing = [w for w in sorted(wheels.glob("*.whl")) if not is_installed(w)]
    if not missing:
        return []
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-compile", "--target", str(target), *map(str, missing)]
    done = subprocess.run(command, capture_output=True, text=True)
    importlib.invalidate_caches()
    names = ", ".join(wheel.name.split("-")[0] for wheel in missing)
    if done.returncode != 0:
        return [f"the wheels of {names} were not installed: {done.stderr.strip()[-200:]}"]
    return [f"installed beside the machine's packages: {names}"]


def is_installed(wheel: Path) -> bool:
    from importlib import metadata

    try:
        metadata.version(wheel.name.split("-")[0])
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
