"""Broken copies of Triton's kernels, each tried in the interpreter in a process of its own.

``python triton_mutants.py NUMBER SCRIPT ARGUMENTS`` runs a script of this folder with the copy in
which the mutant of that number, from 1 on, is broken; 0 breaks nothing.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from runpy import run_path

from mutants import Mutant, replaced
from paths import ROOT, TOOLS

CHECK = ("triton_residual_norm_check.py",)
MUTANTS = [
    Mutant(
        "the second source's first channel is not read",
        "residual_norm",
        "group_norm_tiles.py",
        "rest = mask & (channel >= split)[:, None]",
        "rest = mask & (channel > split)[:, None]",
        CHECK,
    ),
    Mutant(
        "in channels_last the second source begins where the first does",
        "residual_norm",
        "group_norm_tiles.py",
        "return start - rows * missing - before, offsets",
        "return start - rows * missing, offsets",
        CHECK,
    ),
    Mutant(
        "in NCHW the second source begins where the first does",
        "residual_norm",
        "group_norm_tiles.py",
        "return start - rows * missing - before * tl.cast(positions, tl.int64), offsets",
        "return start - rows * missing, offsets",
        CHECK,
        short=True,
    ),
    Mutant(
        "the second source's later chunks begin as the first one does",
        "residual_norm",
        "group_norm_tiles.py",
        "start, offsets, sample, chunk, split, split, positions,",
        "start, offsets, sample, 0, split, split, positions,",
        CHECK,
    ),
    Mutant(
        "the bias is of the next channel",
        "residual_norm",
        "group_norm_tiles.py",
        "tl.load(bias + channel, mask=inside & (channel < split), other=0.0)\n            wide",
        "tl.load(bias + channel + 1, mask=inside & (channel + 1 < split), other=0.0)\n"
        "            wide",
        CHECK,
    ),
    Mutant(
        "the sum is written before the bias is added",
        "residual_norm",
        "group_norm_tiles.py",
        "tl.store(total + at + places, value, mask=own)",
        "tl.store(total + at + places, tl.load(x + at + places, mask=own), mask=own)",
        CHECK,
    ),
    Mutant(
        "what is added is added to the sum again",
        "residual_norm",
        "group_norm_silu.py",
        "x, add, addend = total, None, None",
        "x = total",
        CHECK,
    ),
    Mutant(
        "tiles are cut for the first source's channels alone",
        "residual_norm",
        "group_norm_tiles.py",
        "    channels += more or 0\n",
        "",
        CHECK,
    ),
    Mutant(
        "pieces are merged without what their means vary by",
        "residual_norm",
        "group_norm_silu.py",
        "block_m2 = tl.sum(part_m2 + n * d * d, 0)",
        "block_m2 = tl.sum(part_m2, 0)",
        CHECK,
    ),
    Mutant(
        "of a group cut short every part counts as a whole one",
        "residual_norm",
        "group_norm_silu.py",
        "group = tl.minimum(group - part * width, width)",
        "group = width",
        CHECK,
    ),
]


def run(mutant: Mutant | None, extent: str) -> subprocess.CompletedProcess:
    """The mutant's suite with ``extent`` ("short" or "complete"); None: with nothing broken."""
    number = 0 if mutant is None else MUTANTS.index(mutant) + 1
    suite = CHECK if mutant is None else mutant.suite
    command = [sys.executable, str(TOOLS / "triton_mutants.py"), str(number), *suite, extent]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def broken_copy(number: int, folder: Path) -> None:
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    if number:
        mutant = MUTANTS[number - 1]
        file = folder / mutant.file
        file.write_text(replaced(file.read_text(), mutant.before, mutant.after))


def load(folder: Path) -> None:
    """As fastdiff.kernels: the modules in it are then found there."""
    spec = spec_from_file_location(
        "fastdiff.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def main() -> None:
    number, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "kernels")
        broken_copy(int(number), copy)
        load(copy)
        run_path(str(TOOLS / script), run_name="__main__")


if __name__ == "__main__":
    main()
