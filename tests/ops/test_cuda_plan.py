"""Where the plan chooses the CUDA C++ kernels over Triton's: where the committed results say so."""

import statistics

import pytest
import torch

from fastdiff.ops import backends, dispatch, native
from fastdiff.ops.dispatch import OPERATIONS
from harness import results

GPU = torch.device("cuda:0")


def faster(data):
    """The operations of one results file whose CUDA kernel beats Triton's, with the GPU's name."""
    found = set()
    for op in (name for name, op in OPERATIONS.items() if "cuda" in op.kernels):
        times = [row["times_s"] for row in data["rows"] if row["op"] == op]
        ratios = [t["triton"] / t["cuda"] for t in times if {"triton", "cuda"} <= t.keys()]
        if ratios and statistics.geometric_mean(ratios) > 1:
            found.add((op, data["device"]))
    return found


@pytest.mark.seconds
def test_the_table_is_what_was_measured():
    files = [data for path in results.FOLDER.glob("*.json") if (data := results.load(path))]
    assert files
    measured = set().union(*(faster(data) for data in files if data["kind"] == "cuda"))
    assert dispatch.FASTER_IN_CUDA == measured


def test_a_results_file_decides():
    def row(op, **times):
        return {"op": op, "times_s": {**times, "eager": 3.0}}

    rows = [row("q_sample", triton=2.0, cuda=1.0), row("q_sample", triton=1.0, cuda=1.5)]
    rows += [row("posterior_step", triton=1.0, cuda=1.2), row("attention", triton=1.0)]
    rows += [row("group_norm_silu", cuda=1.0, triton=1.3)]
    data = {"device": "GPU", "kind": "cuda", "rows": rows}
    assert faster(data) == {("q_sample", "GPU"), ("group_norm_silu", "GPU")}


@pytest.mark.parametrize(
    ("has_triton", "measured", "serves", "expected"),
    [
        (True, False, True, "triton"),
        (True, True, True, "cuda"),
        (True, True, False, "triton"),
        (False, False, True, "cuda"),
        (False, False, False, "reference"),
    ],
)
def test_the_plan_on_gpus(monkeypatch, has_triton, measured, serves, expected):
    dispatch.faster_in_cuda.cache_clear()
    monkeypatch.setattr(backends, "HAS_TRITON", has_triton)
    monkeypatch.setattr(native, "cuda_problem", lambda device: "" if serves else "too old")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    table = {("q_sample", "some GPU")} if measured else {("q_sample", "another")}
    monkeypatch.setattr(dispatch, "FASTER_IN_CUDA", frozenset(table))
    backend, reason = dispatch.default(OPERATIONS["q_sample"], GPU, torch.float32)
    assert backend == expected and "\n" not in reason
    assert dispatch.default(OPERATIONS["attention"], GPU, torch.float32)[0] != "cuda"
    dispatch.faster_in_cuda.cache_clear()
