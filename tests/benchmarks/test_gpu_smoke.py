"""The smoke script: every operation's calls on the CPU, and workers that crash or hang."""

import sys

import pytest
import torch

from gpu import launches, lines, smoke
from gpu.cases import cases
from paths import ROOT

CPU = torch.device("cpu")
WORKER = """
import json, os, sys, time
from gpu import smoke
for call in range(int(os.environ[smoke.WORKER]), 5):
    if call == 1: os.abort()
    if call == 3: time.sleep(60)
    row = dict(phase=smoke.PHASE, call=call, ok=True)
    print(json.dumps(row), file=open({file!r}, "a"), flush=True)
    if call == 2: sys.exit(smoke.POISONED)
"""


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_each_call_is_well_on_the_cpu(backend):
    found = {}
    for fields, measure in smoke.calls(CPU, dry=True):
        if fields["backend"] == backend:
            found[fields["op"], fields["shape"], fields["direction"]] = measure()
    assert {op for op, _, _ in found} == {
        "group_norm_silu", "residual_norm", "rms_norm_silu", "attention", "q_sample",
        "posterior_step",
    }  # fmt: skip
    without = {"residual_norm"} if backend == "native" else set()  # it is the GPUs'
    assert {op for (op, _, _), row in found.items() if "left_out" in row} == without
    wrong = {at: row for at, row in found.items() if row["ok"] is not True}
    assert {op for op, _, _ in wrong} == without, wrong


def test_the_calls_for_gpus_differ_in_size_alone():
    small, large = ({c.op for c in cases(CPU, dry)} for dry in (True, False))
    assert small == large
    assert {str(c.dtype) for c in cases(CPU, dry=True)} == {"float32", "bfloat16"}


def test_a_wrong_answer_is_told_from_a_right_one():
    truth = torch.tensor([1.0, -2.0], dtype=torch.float64)
    right = truth.float()
    assert smoke.measure_error(right + 1e-7, right, truth)["share"] <= 1
    assert smoke.measure_error(right + 1e-4, right, truth)["share"] > 1
    nan = smoke.measure_error(right * float("nan"), right, truth)["share"]
    assert not nan <= 1


def test_a_call_that_no_kernel_serves_is_left_out_and_says_why():
    case = next(c for c in cases(CPU, dry=True) if c.op == "rms_norm_silu")
    row = smoke.compare(case, "cuda", "forward")
    assert row == {"ok": None, "left_out": "there is no CUDA C++ kernel of rms_norm_silu"}


@pytest.mark.seconds
def test_a_worker_that_crashes_or_hangs_costs_one_call(tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-c", WORKER.format(file=str(tmp_path / lines.FILE))]
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    assert smoke.oversee(tmp_path, command, budget_s=60, call_s=2) == 1
    rows = {row["call"]: row for row in lines.read(tmp_path)}
    assert [rows[call]["ok"] for call in range(5)] == [True, False, True, False, True]
    assert rows[1]["error"] == "the worker ended: -6"
    assert rows[3]["error"].startswith("no answer for")
    assert "5 calls, 2 wrong" in capsys.readouterr().out


@pytest.mark.seconds
def test_the_launches_for_the_sanitizer_run(tmp_path):
    assert launches.main(["--out", str(tmp_path), "--dry"]) == 0
    (row,) = lines.read(tmp_path)
    assert row["calls"] == sum(1 + c.is_differentiable for c in cases(CPU, dry=True))
