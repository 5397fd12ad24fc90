"""make gpu's phases: each within its limit, all within the total, whatever the commands do."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu
from paths import ROOT


def python(code: str, limit_s: float = 60, **options) -> gpu.Phase:
    return gpu.Phase(code[:20], (sys.executable, "-c", code), limit_s, **options)


def results_of(plan, total_s=60.0) -> list[str]:
    return [outcome.result for outcome in gpu.run_phases(plan, total_s)]


def test_phases_run_in_order_and_a_failure_does_not_stop_the_others(tmp_path):
    log = tmp_path / "log"
    plan = [
        python(f"open({str(log)!r}, 'a').write('one ')"),
        python("raise SystemExit(2)"),
        python(f"open({str(log)!r}, 'a').write('two')"),
        gpu.Phase("missing", ("/nonexistent/program",), 5),
    ]
    *ran, missing = results_of(plan)
    assert ran == ["ok", "failed (exit 2)", "ok"]
    assert missing.startswith("failed (")
    assert log.read_text() == "one two"


def test_without_what_is_needed_the_rest_is_not_started():
    plan = [python("raise SystemExit(1)", needed=True), python("")]
    assert results_of(plan) == ["failed (exit 1)", "not started"]


def test_a_phase_is_cut_at_its_limit_and_may_save_what_it_has(tmp_path):
    saved = tmp_path / "saved"
    code = (
        "import time\n"
        "try: time.sleep(60)\n"
        f"except KeyboardInterrupt: open({str(saved)!r}, 'w').write('rows')\n"
    )
    start = time.monotonic()
    assert results_of([python(code, 3.0), python("")]) == ["cut after 3 s", "ok"]
    assert time.monotonic() - start < 30
    assert saved.read_text() == "rows"


def test_what_does_not_listen_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "STOP_S", 0.5)
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(6); open({str(alive)!r}, 'w')"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(60)\n"
    )
    assert results_of([python(code, 2.0)]) == ["cut after 2 s"]
    time.sleep(6)
    assert not alive.exists()


def test_the_total_cuts_too(monkeypatch):
    monkeypatch.setattr(gpu, "STOP_S", 0.5)
    start = time.monotonic()
    plan = [python("import time; time.sleep(60)"), python("")]
    assert results_of(plan, total_s=2.5) == ["cut after 2 s", "not started"]
    assert time.monotonic() - start < 20


def test_the_plan_measures_every_operation_within_the_time():
    plan = gpu.phases(Path("results.json"))
    assert gpu.TOTAL_S <= 540
    names = [phase.name for phase in plan]
    assert plan[0].name == "build" and plan[0].needed
    spared = names.index("group_norm_silu, all shapes")
    assert set(gpu.OPERATIONS) <= set(names[:spared])
    # What must not be spared fits.
    assert sum(phase.limit_s for phase in plan[:3]) < gpu.TOTAL_S / 2 + 20
    for phase in plan:
        files = [a for a in phase.command if a.startswith(("tests/", "benchmarks/"))]
        assert all((ROOT / file).exists() for file in files), phase
    tested = next(phase for phase in plan if phase.name == "tests of the operations").command
    assert all(f"tests/ops/test_{op}.py" in tested for op in gpu.OPERATIONS)


def test_the_table_says_when_nothing_was_measured(tmp_path, capsys):
    gpu.show([gpu.Outcome("build", "cut after 120 s", 120.0)], tmp_path / "none.json")
    printed = capsys.readouterr().out
    assert "build" in printed and "cut after 120 s" in printed and "nothing was measured" in printed


@pytest.mark.seconds
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line():
    command = [sys.executable, "benchmarks/gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.strip() == "make gpu: no NVIDIA GPU that PyTorch can use was found here"
