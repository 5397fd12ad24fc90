"""What the benchmarks race against computes the same function, and is recorded truthfully."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch

import fastdiff
from fastdiff.models.readers.diffusers.config import diffusers_config
from gpu import goals, lines
from harness import peers, peers_eager, peers_graphs, peers_sampling, results
from paths import ROOT
from patience import WAIT

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


@pytest.mark.seconds
@pytest.mark.parametrize("before", [200, -200])
def test_a_ddim_step_is_the_same_function(before):
    bars = fastdiff.create_diffusion(steps=1000).alphas_cumprod
    scheduler = pytest.importorskip("diffusers").DDIMScheduler()
    scheduler.set_timesteps(5)
    x, eps, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), before + 200
    theirs = scheduler.step(eps, t, x, use_clipped_model_output=True).prev_sample
    step = peers_eager.ddim_step(x, eps, bars[t], bars[before] if before >= 0 else 1.0)
    torch.testing.assert_close(step, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", peers.NETWORKS)
def test_diffusers_can_be_every_network(name):
    with torch.device("meta"):
        config = diffusers_config(fastdiff.UNet(**peers.NETWORKS[name]))
    assert config["sample_size"] == peers.size(name)


@pytest.mark.seconds
def test_both_networks_have_the_same_weights_and_none_is_zero():
    pytest.importorskip("diffusers")
    ours, theirs = peers.fastdiff_network("tiny").eval(), peers.diffusers_network("tiny").eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-4, atol=1e-5)
    for model in (ours, theirs):
        layers = [m for m in model.modules() if hasattr(m, "weight") and m.weight.dim() > 1]
        assert layers and all(layer.weight.std() > 0 for layer in layers)


TRACED = {"traced": {"backend": "eager"}}


@pytest.mark.seconds
@pytest.mark.parametrize("modes", [{}, pytest.param(TRACED, marks=pytest.mark.long)])
def test_all_that_sample_make_the_same_images(modes):
    pytest.importorskip("diffusers")
    who, reference = peers_sampling.reference_images("tiny", CPU, 3)
    assert who == "diffusers float32 without tf32"
    made = peers_sampling.contenders("tiny", 3, CPU, 3, modes=modes)
    for name, make in made.items():
        if name.split()[0] in peers_graphs.RUNTIMES:  # tests/benchmarks/test_measure_sampling.py
            continue
        images = make()()
        assert images.shape == (3, 3, 8, 8), name
        assert peers_sampling.psnr_db(images, reference) > (90 if "float32" in name else 30), name


def test_equal_images_have_the_highest_psnr():
    images = torch.rand(2, 3, 4, 4)
    assert peers_sampling.psnr_db(images, images) == 200
    assert math.isclose(peers_sampling.psnr_db(images, images + 0.2), 20.0, abs_tol=1e-3)


@pytest.mark.seconds
def test_a_peer_has_weights_of_its_dtype_and_is_given_timesteps_on_its_device(monkeypatch):
    pytest.importorskip("diffusers")
    seen = []

    def compiled(model, **options):
        def network(x, t):
            seen.append((options, model.conv_in.weight, x, t))
            return model(x, t)

        return network

    monkeypatch.setattr(torch, "compile", compiled)
    peers_sampling.contenders("tiny", 2, CPU, 2)["diffusers bfloat16 compiled"]()()
    assert len(seen) == 2
    for options, weight, x, t in seen:
        assert options["dynamic"] is False
        assert weight.dtype == x.dtype == torch.bfloat16
        assert all(v.is_contiguous(memory_format=torch.channels_last) for v in (weight, x))
        assert t.shape == (2,) and t.device == x.device


def test_what_a_benchmark_needs_is_a_package_and_no_file_of_ours():
    """One that was moved would be taken for a package that is not installed."""
    sources = [path.read_text() for path in (ROOT / "benchmarks").glob("bench_*.py")]
    needed = {name for text in sources for name in re.findall(r'importorskip\("(\w+)"', text)}
    assert needed == {"diffusers"}


def run_benchmark(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=WAIT)


OPTIONS = ("--device=cpu", "--shapes=quick", "--compiled=none", "--budget=0.001")
CASE = "benchmarks/bench_{0}.py::test_{0}[{1}]"
NORM = CASE.format("group_norm_silu", "256@8-8-float32-NCHW-forward+backward")


def rows_after(node, path, *more: str) -> list[dict]:
    """Of the results in ``path`` when a benchmark has run."""
    done = run_benchmark(node, *OPTIONS, f"--results={path}", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times faster than eager" in done.stdout
    return json.loads(path.read_text())["rows"]


@pytest.mark.seconds
def test_a_run_writes_its_rows(tmp_path):
    path = tmp_path / "results.json"
    (norm,) = rows_after(NORM, path, "--lines", str(tmp_path))
    # A GPU run's report reads them from there.
    (line,) = lines.read(tmp_path)
    assert (line["phase"], line["dry"]) == ("bench_group_norm_silu", True)
    assert norm.items() <= {**line, "date": norm["date"]}.items()
    (judged,) = goals.benched([line])
    assert judged.percent == pytest.approx(norm["percent_of_floor"])
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
