"""Whole GPU runs without a GPU: all phases of a plan, by stand-ins, and (long) by the real scripts.

What each script does in a dry run test_gpu_phases.py has in make test.
"""

import subprocess
import sys

import pytest

from gpu import lines, plan, run
from paths import ROOT

# In Python's place: it takes a phase's arguments as the script does, and leaves a line. The report
# alone is made.
STAND_IN = """#!{python}
import importlib.util, json, os, sys
from gpu import lines

dash_m, module, *arguments = sys.argv[1:]
assert dash_m == "-m" and importlib.util.find_spec(module), module
if module == "gpu.report":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
if module == os.environ.get("BREAKS"):
    os.kill(os.getpid(), 9)
if module != "pytest":
    given = lines.arguments("", arguments)
    row = {{"phase": module, "dry": given.dry, "budget": given.budget}}
    with open(given.out / lines.FILE, "a") as file:
        file.write(json.dumps(row) + "\\n")
"""


@pytest.fixture(params=sorted(plan.RUNS))
def dry_run(request, tmp_path, monkeypatch):
    """Its name, and a function that runs it with stand-ins: its status and its phases' outcomes."""
    program = tmp_path / "python"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def whole(out):
        status = run.main([request.param, "--dry", "--out", str(out)])
        return status, outcomes(out)

    return request.param, whole


def outcomes(out):
    return {row["phase"]: row["outcome"] for row in lines.read(out) if "outcome" in row}


def names(which):
    return [phase.name for phase in plan.RUNS[which](ROOT, True).phases]


@pytest.mark.seconds
def test_every_phase_of_a_plan_runs_and_is_told_its_time(dry_run, tmp_path):
    which, whole = dry_run
    out = tmp_path / "out"
    status, ended = whole(out)
    assert status == 0 and set(ended.values()) == {"ok"} and sorted(ended) == sorted(names(which))
    rows = [row for row in lines.read(out) if "budget" in row]
    assert all(row["dry"] and 1 <= row["budget"] < 420 for row in rows)
    files = {path.name for path in out.iterdir()}
    assert files == {run.LOG, lines.FILE, "report.md"}
    assert "| not measured |" in (out / "report.md").read_text()


@pytest.mark.seconds
def test_a_phase_that_is_killed_costs_itself_alone(dry_run, tmp_path, monkeypatch):
    which, whole = dry_run
    broken = {"first": "smoke", "full": "compiled"}[which]
    monkeypatch.setenv("BREAKS", f"gpu.{broken}")
    status, ended = whole(tmp_path / "out")
    assert status == 1 and ended.pop(broken) == "failed (killed by SIGKILL)"
    assert set(ended.values()) == {"ok"} and len(ended) == len(names(which)) - 1
    said = f"| {broken} | the phase | failed (killed by SIGKILL) |"
    assert said in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.long
@pytest.mark.parametrize("which", sorted(plan.RUNS))
def test_a_whole_dry_run_is_green(which, tmp_path):
    pytest.importorskip("diffusers")
    command = [sys.executable, "-m", "gpu.run", which, "--dry", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]
    ended = outcomes(tmp_path)
    assert sorted(ended) == sorted(names(which))
    assert all(result.startswith("ok") for result in ended.values()), ended
    assert len(list(tmp_path.iterdir())) <= run.MOST_FILES
    text = (tmp_path / "report.md").read_text()
    assert {"first": "## Operations", "full": "## Benchmarks"}[which] in text
