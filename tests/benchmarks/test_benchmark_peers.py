"""What the benchmarks race against computes the same function, and is recorded truthfully."""

import json
import math
import subprocess
import sys

import pytest
import torch

import fastdiff
from harness import peers_eager, results
from paths import ROOT

CPU = torch.device("cpu")


@pytest.mark.parametrize("form", ["silu", "film", "norm"])
def test_the_norms_are_the_same_function(form):
    x, scale, shift = torch.randn(2, 64, 6, 6), torch.randn(2, 64), torch.randn(2, 64)
    weight, bias = torch.randn(64), torch.randn(64)
    activation = None if form == "norm" else "silu"
    film = {"scale": scale, "shift": shift} if form == "film" else {}
    eager = {
        "silu": peers_eager.group_norm_silu,
        "film": peers_eager.group_norm_film_silu,
        "norm": peers_eager.group_norm,
    }[form]
    ours = fastdiff.ops.group_norm_silu(x, 32, weight, bias, activation=activation, **film)
    torch.testing.assert_close(eager(x, weight, bias, *film.values()), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["silu", "film", "norm"])
def test_the_rms_norms_are_the_same_function(form):
    x, weight = torch.randn(2, 24, 6, 6), torch.randn(1, 24, 1, 1)
    film = torch.randn(2, 48, 1, 1).chunk(2, dim=1) if form == "film" else ()
    eager = {
        "silu": peers_eager.rms_norm_silu,
        "film": peers_eager.rms_norm_film_silu,
        "norm": peers_eager.rms_norm,
    }[form]
    named = dict(zip(("scale", "shift"), film, strict=False))
    activation = None if form == "norm" else "silu"
    ours = fastdiff.ops.rms_norm_silu(x, weight, activation=activation, **named)
    torch.testing.assert_close(eager(x, weight, *film), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["heads_first", "qkv_first"])
def test_attention_is_the_same_function(order):
    qkv = torch.randn(2, 3 * 4 * 8, 10)
    ours = fastdiff.ops.attention(qkv, 4, order=order)
    torch.testing.assert_close(peers_eager.attention(qkv, 4, order), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", [None, CPU], ids=["numpy tables", "device tables"])
def test_q_sample_is_the_same_function(device, monkeypatch):
    x, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    process, tables = peers_eager.Process(device=device), peers_eager.Process(device=CPU)
    t = torch.tensor([0, 400, 999])
    ours, _ = fastdiff.ops.q_sample(
        x, t, tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod, noise=noise
    )
    torch.testing.assert_close(process.q_sample(x, t), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", [None, CPU], ids=["numpy tables", "device tables"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("t", [0, 1, 600])
def test_a_step_is_the_same_function(device, learned, t, monkeypatch):
    diffusion = fastdiff.create_diffusion(steps=1000, learn_sigma=learned)
    table = fastdiff.StepTable.from_process(diffusion)
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    output = torch.randn(2, 6 if learned else 3, 4, 4)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    peer = peers_eager.Process(learned, device).p_sample(x, output, torch.full((2,), t))
    sample, x_start = fastdiff.ops.posterior_step(x, output, table, 999 - t, noise=noise)
    torch.testing.assert_close(peer["sample"], sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(peer["pred_xstart"], x_start, rtol=1e-4, atol=1e-5)


def run_benchmark(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


OPTIONS = ("--device=cpu", "--shapes=quick", "--compiled=none", "--budget=0.001")
CASE = "benchmarks/bench_{0}.py::test_{0}[{1}]"
NORM = CASE.format("group_norm_silu", "256@8-8-float32-NCHW-forward+backward")


def rows_after(node, path) -> list[dict]:
    """Of the results in ``path`` when a benchmark has run."""
    done = run_benchmark(node, *OPTIONS, f"--results={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times faster than eager" in done.stdout
    return json.loads(path.read_text())["rows"]


@pytest.mark.seconds
def test_a_run_writes_its_rows(tmp_path):
    path = tmp_path / "results.json"
    (norm,) = rows_after(NORM, path)
    assert norm["op"] == "group_norm_silu"
    assert (norm["shape"], norm["batch"], norm["dtype"]) == ("256@8", 8, "float32")
    assert norm["bytes"] == 5 * 4 * 8 * 256 * 8 * 8
    assert {"reference", "eager"} <= norm["times_s"].keys()
    gbps = norm["bytes"] / norm["times_s"][norm["ours"]] / 1e9
    assert math.isclose(norm["gbps"], gbps)
    assert math.isclose(norm["percent_of_floor"], 100 * gbps / norm["copy_gbps"])
    # Another's results of this machine are kept beside it.
    header = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("date", "rows")}
    later = results.Results(path, header)
    later.add(norm | {"op": "attention"})
    later.save()
    assert [row["op"] for row in json.loads(path.read_text())["rows"]] == ["attention", norm["op"]]


@pytest.mark.long
def test_a_run_keeps_the_rows_of_others(tmp_path):
    path = tmp_path / "results.json"
    node = CASE.format("attention", "4x64x64-8-bfloat16-channels_last-forward")
    assert [row["op"] for row in rows_after(NORM, path)] == ["group_norm_silu"]
    assert {row["op"] for row in rows_after(node, path)} == {"group_norm_silu", "attention"}
