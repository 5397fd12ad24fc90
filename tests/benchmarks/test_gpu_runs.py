"""The GPU runs: each phase within its limit, all within the total, whatever the phases do."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from gpu import lines, plan, run
from gpu.plan import Phase, Run
from paths import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}


def python(code: str, limit_s: float = 60, **options) -> Phase:
    options = {"name": code[:20]} | options
    return Phase(command=(sys.executable, "-c", code), limit_s=limit_s, **options)


def outcomes(phases, out, total_s=60.0, **options):
    made = run.Runner(Run("test", total_s, tuple(phases)), out, ENVIRONMENT, **options)()
    return [outcome.result for outcome in made]


def test_a_failure_costs_itself_alone(tmp_path):
    log = tmp_path / "ran"
    results = outcomes(
        [
            python(f"open({str(log)!r}, 'a').write('one ')"),
            python("raise ValueError('what was wrong')"),
            python("import os; os.kill(os.getpid(), 9)"),
            Phase("missing", ("/nonexistent/program",), 5),
            python(f"open({str(log)!r}, 'a').write('two')"),
        ],
        tmp_path,
    )
    assert results[:3] == ["ok", "failed (exit 1)", "failed (killed by SIGKILL)"]
    assert results[3].startswith("failed (") and "/nonexistent" in results[3]
    assert results[4] == "ok" and log.read_text() == "one two"
    said = (tmp_path / run.LOG).read_text()
    assert "ValueError: what was wrong" in said
    noted = [line["outcome"] for line in lines.read(tmp_path)]
    assert noted == results


def test_a_failure_is_shown_with_its_last_lines(tmp_path, capsys):
    outcomes([python("raise SystemExit('nothing to measure')", name="profile")], tmp_path)
    printed = capsys.readouterr().out
    assert "profile: failed (exit 1)" in printed and "    nothing to measure" in printed


def test_a_script_that_is_not_there_is_a_failed_phase_with_a_line(tmp_path, capsys):
    phase = plan.Commands(tmp_path, dry=True).module("no_such_phase", 30)
    assert outcomes([phase, python("")], tmp_path) == ["failed (exit 1)", "ok"]
    assert "No module named gpu.no_such_phase" in capsys.readouterr().out


def test_without_the_import_the_rest_is_not_started(tmp_path):
    phases = [python("raise SystemExit(1)", name="import"), python("")]
    assert outcomes(phases, tmp_path) == ["failed (exit 1)", "not started: the import failed"]


@pytest.mark.seconds
def test_what_a_phase_had_is_kept_when_it_is_cut(tmp_path):
    file = str(tmp_path / lines.FILE)
    code = f"import time; print('{{\"value\": 1}}', file=open({file!r}, 'a'), flush=True)\n"
    start = time.monotonic()
    results = outcomes([python(code + "time.sleep(60)", 3.0), python("")], tmp_path)
    assert results == ["cut after 3 s", "ok"]
    assert time.monotonic() - start < 30
    assert [row["value"] for row in lines.read(tmp_path) if "value" in row] == [1]
    assert "KeyboardInterrupt" in (tmp_path / run.LOG).read_text()  # and says where it was


@pytest.mark.seconds
def test_what_does_not_listen_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu.process.STOP_S", 0.5)
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(6); open({str(alive)!r}, 'w')"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(60)\n"
    )
    assert outcomes([python(code, 2.0)], tmp_path) == ["cut after 2 s"]
    # A phase that ends well leaves no child behind either.
    left = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    assert outcomes([python(left)], tmp_path) == ["ok"]
    time.sleep(6)
    assert not alive.exists()


@pytest.mark.seconds
def test_the_total_cuts_too_and_what_is_reserved_runs_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu.process.STOP_S", 0.5)
    monkeypatch.setattr("gpu.run.STOP_S", 0.5)
    start = time.monotonic()
    phases = [
        python("import time; time.sleep(60)"),
        python("", name="no time"),
        python("", name="spare", spare=True),
        python("", 4.0, reserved=True),
    ]
    results = outcomes(phases, tmp_path, total_s=7)
    assert results[0].startswith("cut after")
    assert results[1:] == ["not started: no time is left", "left out: no time is left", "ok"]
    assert time.monotonic() - start < 20


def test_a_phase_is_told_of_the_time_that_the_total_leaves_it(tmp_path):
    told = tmp_path / "told"
    code = f"import sys; print(sys.argv[1], file=open({str(told)!r}, 'a'))"
    for limit_s in (60, 8):
        command = (sys.executable, "-c", code, plan.BUDGET)
        assert outcomes([Phase("a", command, limit_s)], tmp_path, total_s=30) == ["ok"]
    shortened, whole = map(float, told.read_text().split())
    assert 30 - 2 * run.STOP_S - 5 < shortened <= 30 - 2 * run.STOP_S
    assert whole == 8 - run.STOP_S


def test_what_runs_beside_the_others_ends_before_one_that_measures(tmp_path):
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    background = (
        f"import time; open({str(begun)!r}, 'w')\n"
        f"try: time.sleep(60)\nexcept KeyboardInterrupt: open({str(ended)!r}, 'w')\n"
    )
    wait = f"import os, time\nwhile not os.path.exists({str(begun)!r}): time.sleep(0.01)"
    alone = f"import os; assert os.path.exists({str(ended)!r})"
    phases = [
        python(background, name="beside", background=True, spare=True),
        python(wait, name="first"),
        python(alone, name="alone", measures=True),
    ]
    first, beside, alone = outcomes(phases, tmp_path)
    assert (first, alone) == ("ok", "ok") and beside.startswith("ok")


def test_a_phase_without_what_it_needs_is_left_out_but_for_dry_runs(tmp_path):
    lines.write(tmp_path, "import", has=["diffusers"])
    phases = [python("", needs=("diffusers",)), python("", needs=("ncu", "diffusers"))]
    assert outcomes(phases, tmp_path) == ["ok", "left out: ncu not found here"]
    assert outcomes(phases, tmp_path, dry=True) == ["ok", "ok"]


def test_phases_are_chosen_by_name():
    whole = Run("gpu-first", 10, tuple(python("", name=n) for n in ("import", "a", "b", "c")))

    def names(**given):
        return [p.name for p in run.chosen(whole, **{"only": None, "start": None} | given).phases]

    assert names() == ["import", "a", "b", "c"]
    assert names(only="c,a") == ["import", "a", "c"]
    assert names(start="b") == ["import", "b", "c"]
    for given in ({"only": "a,d"}, {"start": "d"}):
        with pytest.raises(ValueError, match="no phase 'd'; it has import, a, b, c"):
            names(**given)


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(("name", "most_s"), [("first", 300), ("full", 420)])
def test_the_plans_fit_their_time_and_name_what_is_there(name, most_s, dry, tmp_path):
    made = plan.RUNS[name](tmp_path, dry)
    assert made.total_s <= most_s and made.phases[0].name == "import"
    assert made.phases[-1].name == "report" and made.phases[-1].reserved
    assert len({phase.name for phase in made.phases}) == len(made.phases)
    for phase in made.phases:
        files = [a for a in phase.command if a.startswith(("tests/", "benchmarks/"))]
        assert all((ROOT / file).exists() for file in files), phase
        if "gpu." in " ".join(phase.command):
            assert ("--dry" in phase.command) == dry
            assert phase.command[phase.command.index("--budget") + 1] == plan.BUDGET
    if dry:
        return
    # What shows whether anything works fits, and most of what measures.
    sure = [p for p in made.phases if not p.spare and p.name not in ("import", "cuda_tests")]
    assert sum(phase.limit_s for phase in sure[:5]) + 15 <= made.total_s


def test_the_folder_has_few_files_in_the_end(tmp_path):
    names = ["rows.jsonl", "log.txt", "report.md", *(f"trace{i}.json" for i in range(9))]
    for size, name in enumerate(names):
        (tmp_path / name).write_text("x" * size)
    run.tidy(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 8 and {"rows.jsonl", "log.txt", "report.md", "trace8.json"} <= set(files)
    (archive,) = tmp_path.glob("more-*.tar.gz")
    with tarfile.open(archive) as packed:
        assert packed.getnames() == [f"trace{i}.json" for i in (4, 3, 2, 1, 0)]


def test_each_line_says_when_where_and_with_what(tmp_path):
    before = time.time() - 1
    lines.write(tmp_path, "sampler", ms=1.5, dtype=torch.bfloat16, path=Path("a"))
    with (tmp_path / lines.FILE).open("a") as file:
        file.write('{"phase": "cut sho')  # as a crash leaves it
    (row,) = lines.read(tmp_path)
    assert row["phase"] == "sampler" and before < row["time"] < time.time() + 1
    assert row["device"] and row["versions"]["torch"] and row["ms"] == 1.5
    assert (row["dtype"], row["path"]) == ("torch.bfloat16", "a")


@pytest.mark.seconds
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    command = [sys.executable, "-m", "gpu.run", "first", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "make gpu-first: no NVIDIA GPU that PyTorch can use was found here (DRY=1 tries all "
        "without one)"
    ]


@pytest.mark.seconds
def test_a_dry_run_finds_the_library_and_leaves_lines(tmp_path):
    command = [sys.executable, "-m", "gpu.run", "first", "--dry", "--only", "import"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found, ended = lines.read(tmp_path)
    assert found["ok"] and found["machine"]["gpu"] is None and ended["outcome"] == "ok"
    assert json.dumps(found["notes"]).count("no NVIDIA GPU") == 1
