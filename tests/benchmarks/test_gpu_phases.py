"""The scripts that measure on a GPU, run to their end on the CPU; what fails costs itself alone."""

import subprocess
import sys
import time

import pytest
import torch

import fastdiff
from gpu import (
    compilations,
    compile_peers,
    compiled,
    device,
    eager,
    lines,
    ncu,
    operations,
    profile,
    sampler,
    watched,
)
from gpu.phase import Phase, race
from harness import summary
from harness.timing import Contender

CPU = torch.device("cpu")
COMPILED = {
    f"{peer} bfloat16 {mode}"
    for peer in ("diffusers", "plain")
    for mode in ("compiled", "max-autotune")
}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """What is compiled here is this test's alone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def lines_of(script, out, *arguments, status=0):
    assert script.main(["--out", str(out), "--dry", *arguments]) == status
    return lines.read(out)


def rows_of(script, out, *arguments, status=0):
    """What it measured, and all that it planned to has a row."""
    rows = lines_of(script, out, *arguments, status=status)
    for case in (case for row in rows for case in row.get("planned", ())):
        assert any(case.items() <= row.items() for row in rows), case
    return [row for row in rows if "planned" not in row]


def phase_in(out, seconds=60.0):
    return Phase("phase", out, True, CPU, time.monotonic() + seconds)


@pytest.mark.seconds
def test_the_sampler_is_measured_with_both_norms_and_cudnn_both_ways(tmp_path):
    (ceiling, *rows) = rows_of(sampler, tmp_path)
    assert ceiling["matmul_tflops"] > 0
    assert sorted(row["round"] for row in rows) == [0] * 5 + [1] * 5 + [2] * 5
    for row in rows:
        assert row["phase"] == "sampler" and row["dry"] and row["ms_per_step"] > 0
        assert row["norms"] == ("native" if "plan" in row["contender"] else "reference")
        assert row["ran"].startswith("eager: CUDA graphs need")
        assert "executor=True" not in row["contender"] or "as a program of" in row["ran"]


@pytest.mark.seconds
@pytest.mark.parametrize("script", [eager, compiled])
def test_peers_make_the_same_images_as_the_float32_one(script, tmp_path):
    pytest.importorskip("diffusers")
    rows = [row for row in rows_of(script, tmp_path) if "contender" in row]
    names = {row["contender"] for row in rows}
    if script is eager:
        assert names == set(eager.CONTENDERS)
    else:
        assert names == {"fastdiff bfloat16", compiled.PROGRAM, *COMPILED}
    assert all(row["psnr_against"] == "diffusers float32 without tf32" for row in rows)
    assert all(row["psnr_db"] > 35 for row in rows)


@pytest.mark.seconds
def test_without_diffusers_a_row_says_so_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    rows = [row for row in rows_of(compiled, tmp_path) if "contender" in row]
    said = {row["contender"]: row["skipped"] for row in rows if "skipped" in row}
    assert set(said.values()) == {"diffusers is not installed"} and len(said) == 2
    measured = {row["contender"] for row in rows if "ms_per_step" in row}
    assert {"fastdiff bfloat16", "plain bfloat16 max-autotune"} <= measured
    assert {row["psnr_against"] for row in rows if "psnr_db" in row} == {
        "plain float32 without tf32"
    }


@pytest.mark.seconds
def test_all_that_is_raced_is_compiled_beforehand(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    rows = rows_of(compile_peers, tmp_path / "run")
    assert all(row["compile_s"] > 0 for row in rows)
    assert {row["contender"] for row in rows} == {compile_peers.KERNELS, *COMPILED}
    assert compilations.cache() == tmp_path / "inductor"
    assert compilations.os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "triton")


def test_what_is_in_the_caches_is_not_compiled_again(tmp_path):
    first, *_ = compilations.wanted(phase_in(tmp_path))
    first.note()
    planned, *_ = lines_of(compile_peers, tmp_path / "run", "--budget", "0")
    assert len(planned["planned"]) == 4 and first.fields() not in planned["planned"]


def test_what_is_compiled_first_is_what_the_goal_is_stated_for(tmp_path):
    phase = Phase("compile_peers", tmp_path, False, CPU, 0.0)
    made = list(compilations.wanted(phase))
    assert len(made) == len(set(made)) == 16 and {one.batch for one in made[:8]} == {64}
    assert [(one.network, one.contender) for one in made[:4]] == [
        ("ddpm-cifar10", "plain bfloat16 compiled"),
        ("ddpm-cifar10", "plain bfloat16 max-autotune"),
        ("iddpm-imagenet64", "plain bfloat16 compiled"),
        ("iddpm-imagenet64", "plain bfloat16 max-autotune"),
    ]


def test_what_is_not_compiled_yet_is_raced_last(tmp_path):
    phase = Phase("compiled", tmp_path, False, CPU, 0.0)
    ready = "diffusers bfloat16 max-autotune"
    compilations.Compilation(ready, "ddpm-cifar10", 64).note()
    first, *others = compiled.cases(phase)
    assert (first.network, first.batch, len(others)) == ("ddpm-cifar10", 64, 3)
    ours, program, raced_first, *rest = first.makers
    assert (ours, program) == ("fastdiff bfloat16", compiled.PROGRAM)
    assert (raced_first, first.takes[ready]) == (ready, 0.0)
    assert rest[-1] == "plain bfloat16 max-autotune" and {*rest, ready} == COMPILED
    assert all(seconds > 0 for case in others for seconds in case.takes.values())


def test_what_was_compiled_elsewhere_is_not_ready_here(tmp_path, monkeypatch):
    made = compilations.Compilation("plain bfloat16 compiled", "ddpm-cifar10", 64)
    made.note()
    assert made.is_ready()
    monkeypatch.setattr(lines, "stamp", lambda: {"device": "another", "versions": {}})
    assert not made.is_ready()


@pytest.mark.seconds
def test_the_profile_has_a_table_and_sums_by_kind(tmp_path):
    rows = rows_of(profile, tmp_path)
    for batch in (1, 2):
        of_batch = {row["kind"]: row for row in rows if row["batch"] == batch}
        assert set(of_batch) == set(profile.KINDS)
        assert sum(row["percent"] for row in of_batch.values()) == pytest.approx(100)
        assert of_batch["norm"]["calls_per_step"] > 0
    text = (tmp_path / "profile.txt").read_text()
    assert "batch 2, 2 steps" in text and "group_norm_silu" in text


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, float>", "copy"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop>", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "elementwise"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<>", "copy"),
        ("forward_once_kernel", "norm"),
        ("void fastdiff::group_norm_silu_kernel<>", "norm"),
        ("forward_kernel", "attention"),
        ("normal_kernel", "elementwise"),
        ("posterior_step_kernel", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel, kind):
    assert profile.kind_of(kernel) == kind


@pytest.mark.seconds
def test_every_operation_is_raced_with_a_copy(tmp_path):
    rows = rows_of(operations, tmp_path)
    # What a goal is stated for, but for what only the benchmarks measure.
    goals = {*summary.GPU_SHARES, ("attention", "forward")}
    assert {(row["op"], row["direction"]) for row in rows} == goals
    for row in rows:
        assert row["gbps"] > 0
        assert (row["contender"] == "copy") == ("percent_of_copy" not in row)
        if row["contender"] != "copy":
            assert row["gbps"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
    assert {r["contender"] for r in rows if r["op"] == "attention"} >= {"copy", "native", "sdpa"}


def test_the_norms_backward_is_that_of_autograd():
    made = operations.norm_backward(CPU, 2, 64, 4, torch.float32, "channels_last")
    dy, statistics, x, weight, bias = made.inputs()
    with fastdiff.backend("native"):
        found = made.call(dy, statistics, x, weight, bias)
    with fastdiff.backend("reference"):
        leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
        y = fastdiff.ops.group_norm_silu(x, operations.shapes.GROUPS, weight, bias)
        wanted = torch.autograd.grad(y, leaves, dy)
    for ours, theirs in zip(found, wanted, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert made.size_bytes == 3 * x.nbytes


def test_a_contender_that_raises_leaves_the_others_rows(tmp_path):
    calls = []

    def wears_out():
        calls.append(1)
        if len(calls) > 2:  # after the turns that warm up
            raise ValueError("no more\nof this")

    def cannot_be_made():
        raise RuntimeError("no kernel image")

    makers = {
        "broken": cannot_be_made,
        "wearing out": lambda: Contender("", wears_out),
        "sound": lambda: Contender("", lambda: None),
    }
    phase = phase_in(tmp_path)
    race(phase, makers, lambda name, seconds: {"figure": seconds}, case="a")
    rows = lines.read(tmp_path)
    assert [row["round"] for row in rows if row["contender"] == "sound"] == [0, 1, 2]
    errors = {row["contender"]: row["error"] for row in rows if "error" in row}
    assert errors["broken"] == "RuntimeError: no kernel image"
    assert errors["wearing out"].startswith("ValueError: no more")
    assert len([row for row in rows if row["contender"] == "wearing out"]) == 2
    assert all(row["case"] == "a" for row in rows)
    assert phase.ended() == 1


def test_what_there_is_no_time_for_is_said(tmp_path):
    phase = phase_in(tmp_path, seconds=-1.0)
    race(phase, {"late": lambda: pytest.fail("it was begun")}, lambda *_: {}, case="a")
    (row,) = lines.read(tmp_path)
    assert (row["contender"], row["skipped"]) == ("late", "the phase's time is over")
    assert phase.ended() == 0


def test_what_is_not_made_in_the_time_that_is_left_is_said(tmp_path):
    made = lambda: Contender("", lambda: None)  # noqa: E731
    late = lambda: pytest.fail("it was begun")  # noqa: E731
    phase = phase_in(tmp_path, seconds=30.0)
    race(phase, {"slow": late, "sound": made}, lambda *_: {}, takes={"slow": 200.0})
    skipped, *rows = lines.read(tmp_path)
    assert skipped["contender"] == "slow"
    assert skipped["skipped"] == "to make it takes some 200 s, and 30 s are left"
    assert [row["contender"] for row in rows] == ["sound"] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_a_script_says_so_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no NVIDIA GPU that PyTorch can use was found here"):
        sampler.main(["--out", str(tmp_path)])


def test_the_device_is_asked_what_pytorch_knows(monkeypatch):
    asked = []
    names = ("synchronize", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache")
    for name in names:
        assert callable(getattr(torch.cuda, name))
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name) or 1 << 30)
    assert device.peak_gib(device.GPU) == 1.0 and device.peak_gib(CPU) is None
    device.wait(device.GPU)
    device.release(device.GPU)
    assert set(asked) == set(names)
    assert hasattr(device.FunctionEventAvg(), "self_device_time_total")
    assert callable(torch.cuda.profiler.profile)


# ncu


class Ncu:
    """Stands for subprocess.run: launches in this process, and answers what it is told."""

    def __init__(self, stdout="", stderr="", code=0):
        self.answer, self.commands = (stdout, stderr, code), []

    def __call__(self, command, *, timeout, **options):
        self.commands.append(command)
        stdout, stderr, code = self.answer
        assert timeout > 0
        module = command.index("gpu.watched")
        assert watched.main([*command[module + 1 :], "--dry"]) == 0
        return subprocess.CompletedProcess(command, code, stdout, stderr)


def test_ncu_has_a_row_for_each_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(ncu.subprocess, "run", Ncu())
    (row,) = rows_of(ncu, tmp_path)
    assert (row["kernel"], row["dram_percent"], row["duration"]) == ("norm_kernel", 81.5, 1024.0)
    assert "L2 Hit Rate" not in (tmp_path / "ncu.csv").read_text()


def run_ncu(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(device, "chosen", lambda dry: CPU)
    monkeypatch.setattr(ncu, "program", lambda name: "/opt/ncu")
    monkeypatch.setattr(ncu.subprocess, "run", answer)
    status = ncu.main(["--out", str(tmp_path)])
    return status, lines.read(tmp_path)


def test_ncu_watches_the_launches_alone(tmp_path, monkeypatch):
    answer = Ncu(stdout=ncu.STAND_IN)
    status, (row,) = run_ncu(tmp_path, monkeypatch, answer)
    (command,) = answer.commands
    assert status == 0 and row["kernel"] == "norm_kernel"
    assert command[:2] == ["/opt/ncu", "--csv"] and "--profile-from-start" in command


def test_ncu_that_may_not_read_the_counters_says_so(tmp_path, monkeypatch):
    refused = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    status, (row,) = run_ncu(tmp_path, monkeypatch, Ncu(stdout=refused, code=1))
    assert status == 1 and "ERR_NVGPUCTRPERM" in row["error"]


def test_where_there_is_no_ncu_a_row_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "chosen", lambda dry: CPU)
    monkeypatch.setattr(ncu, "program", lambda name: None)
    assert ncu.main(["--out", str(tmp_path)]) == 0
    assert "ncu is not" in lines.read(tmp_path)[0]["skipped"]
    assert not (tmp_path / "ncu.csv").exists()
