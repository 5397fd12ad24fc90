"""The first phase: what this machine has, a library that fits it, the peers and the caches.

    python -m gpu.first --out FOLDER [--dry] [--budget SECONDS]

It alone is needed by the others. Its line in rows.jsonl says what there is ("has"), by which the
runner leaves out phases, and in words what is missing ("notes").
"""

import importlib
import json
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
    """Unpack into ``target``, which comes before the machine's packages, the wheels of what these
    lack, or have too old: nothing of theirs is replaced."""
    if not wheels.is_dir():
        return []
    offline = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
    asked = ["--dry-run", "--report", "-", "--find-links", str(wheels), "diffusers"]
    done = subprocess.run([*offline, *asked], capture_output=True, text=True)
    if done.returncode == 0:
        missing = [item["download_info"]["url"] for item in json.loads(done.stdout)["install"]]
        if not missing:
            return []
        into = ["--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
        done = subprocess.run([*offline, *into, *missing], capture_output=True, text=True)
    if done.returncode != 0:
        return [f"the wheels of diffusers were not installed: {last_line(done.stderr)}"]
    importlib.invalidate_caches()
    names = sorted(url.rsplit("/", 1)[1].split("-")[0] for url in missing)
    return [f"installed beside the machine's packages: {', '.join(names)}"]


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "pip does not say why"


if __name__ == "__main__":
    sys.exit(main())
