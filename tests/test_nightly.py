""".ci/nightly runs every configuration, whatever fails, and names at the end what did."""

import os
import subprocess

from paths import ROOT

NIGHTLY = ROOT / ".ci" / "nightly"

# In Python's place: a CPU without AVX-512, on which the tests fail with two threads.
PYTHON = """#!/bin/sh
[ "$1" = -c ] && { echo baseline avx2; exit; }
echo "ran $ONEDNN_MAX_CPU_ISA $FASTDIFF_ISA $OMP_NUM_THREADS: $*"
[ "$OMP_NUM_THREADS" = 1 ]
"""


def test_all_run_and_those_that_failed_are_named(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    plain = {k: v for k, v in os.environ.items() if k not in ("ONEDNN_MAX_CPU_ISA", "FASTDIFF_ISA")}
    done = subprocess.run(
        [NIGHTLY, "tests/commands/test_info.py"],
        capture_output=True,
        text=True,
        env={**plain, "PYTHON": str(python)},
    )
    assert done.returncode == 1 and not done.stderr
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert len(ran) == 5 and all(line.endswith(" tests/commands/test_info.py") for line in ran)
    assert any(line.startswith("ran AVX2 avx2 2: -m pytest") for line in ran)
    assert all("--all" in line for line in ran)
    summary = done.stdout.rpartition("===\n")[2].splitlines()
    assert [line.split(":")[0] for line in summary] == [
        "passed",
        "FAILED",
        "not run, this CPU has no avx512",
        "passed",
        "FAILED",
        "passed",
    ]


def test_a_library_that_cannot_be_loaded_fails(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run([NIGHTLY], capture_output=True, env={**os.environ, "PYTHON": str(python)})
    assert done.returncode == 1
