"""The public names as mypy sees them in a user's program: typed, and wrong calls are found."""

import os
import subprocess
import sys

import pytest

import fastdiff
from paths import ROOT, TOOLS

pytest.importorskip("mypy")
pytestmark = pytest.mark.seconds

PROGRAM = TOOLS / "typed_program.py"
WRONG = """
import fastdiff
fastdiff.ops.attention("qkv", 4)
fastdiff.create_diffusion(steps="many")
fastdiff.Samples
"""


def strict_mypy(program):
    """As after an install: fastdiff's own lines are not the user's matter (py.typed lets mypy read
    them; that the wheel has it is for test_packaging)."""
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=",
         "--cache-dir", ROOT / ".mypy_cache" / "user", program],
        cwd=program.parent, capture_output=True, text=True, env=environment,
    )  # fmt: skip


def test_the_public_names_have_the_types_that_their_use_has():
    text = PROGRAM.read_text()
    missing = [name for name in fastdiff.__all__ if f"fastdiff.{name}" not in text]
    missing += [name for name in fastdiff.ops.__all__ if f"ops.{name}(" not in text]
    assert [name for name in missing if name != "ops"] == []
    done = strict_mypy(PROGRAM)
    assert done.returncode == 0, done.stdout


def test_wrong_calls_are_found(tmp_path):
    program = tmp_path / "wrong.py"
    program.write_text(WRONG)
    errors = strict_mypy(program).stdout.splitlines()
    found = [(line.split(":")[1], line.rpartition("[")[2]) for line in errors if ": error:" in line]
    assert found == [("3", "arg-type]"), ("4", "arg-type]"), ("5", "attr-defined]")], errors
