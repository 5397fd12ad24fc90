"""Everything a GPU machine is wanted for, in nine minutes: build, test, measure, one table.

    python benchmarks/gpu.py

It uses the Python that runs it and the packages that one has, and no network; diffusers, the
sampler's peer, it installs from a folder wheels/ if there is one (pip download -d wheels). Each
phase has a time limit; what a phase measured before it was cut is kept, in
benchmarks/results/<gpu name>.json. Exits with 0 when every phase ended well, 1 when one failed or
was cut, 3 without a GPU.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHEELS = ROOT / "wheels"
TOTAL_S = 530.0
NORM_TESTS = "tests/ops/test_group_norm_silu_cuda.py"
OPERATIONS = ("group_norm_silu", "q_sample", "posterior_step", "attention", "rms_norm_silu")
STOP_S = 5.0  # from the request to stop to the end of the patience


@dataclass(frozen=True)
class Phase:
    """One command and the seconds it may take; ``needed``: without it the others make no sense."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    needed: bool = False
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str  # "ok", "failed (exit 2)", "cut after 60 s", "not started"
    seconds: float


def phases(results: Path) -> list[Phase]:
    """The plan. What is measured last is what can be spared: the fuller set of shapes."""
    python = sys.executable
    install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q", "-e", ".")
    pytest = (python, "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider")
    spread = ("-n", "6") if importlib.util.find_spec("xdist") else ()
    measure = (*pytest, "--benchmark-quiet", "--device", "cuda", "--results", str(results))
    quick = (*measure, "--shapes", "quick", "--budget", "0.05")
    full = (*measure, "--shapes", "all", "--compiled", "none", "--budget", "0.03")
    op_tests = sorted({f for op in OPERATIONS for f in _glob(f"tests/ops/test_{op}*.py")})
    suites = [*op_tests, "tests/ops/test_rng_cuda.py", "tests/ops/test_elementwise_cuda.py"]
    accuracy = (*pytest, *spread, "-p", "on_gpu", "-m", "any_backend", *suites)
    cutting = (*pytest, "-p", "on_gpu", "-k", "cutting or order_of_threads or many_channels")
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    wheels = (python, "-m", "pip", "install", "-q", "--no-index", "--find-links", "wheels")
    return [
        Phase("build", (python, *install), 120, needed=True),
        *([Phase("peers", (*wheels, "diffusers"), 30)] if WHEELS.is_dir() else []),
        Phase("accuracy of CUDA C++", accuracy, 60, environment=_served_by("cuda")),
        *(
            Phase(
                f"compute-sanitizer {tool}",
                (sanitizer, "--tool", tool, "--error-exitcode", "9", *cutting, NORM_TESTS),
                25,
                environment=_served_by("cuda"),
            )
            for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
        ),
        Phase("accuracy of Triton", accuracy, 50, environment=_served_by("triton")),
        Phase("tests that need a GPU", (*pytest, *spread, "-m", "cuda", "tests"), 100),
        Phase(
            "tests of the operations",
            (*pytest, *spread, "-m", "not cuda", *op_tests),
            60,
        ),
        Phase("q_sample", (*quick, "benchmarks/bench_q_sample.py"), 40),
        Phase("posterior_step", (*quick, "benchmarks/bench_posterior_step.py"), 50),
        Phase("group_norm_silu", (*quick, "benchmarks/bench_group_norm_silu.py"), 90),
        Phase("attention", (*quick, "benchmarks/bench_attention.py"), 70),
        Phase("rms_norm_silu", (*quick, "benchmarks/bench_rms_norm_silu.py"), 30),
        Phase("U-Net", (*measure, "benchmarks/bench_unet.py"), 40),
        Phase("sampler", (*measure, "--compiled", "none", "benchmarks/bench_sampler.py"), 90),
        Phase("pipeline", (*measure, "benchmarks/bench_pipeline.py"), 40),
        Phase("group_norm_silu, all shapes", (*full, "benchmarks/bench_group_norm_silu.py"), 120),
        Phase("attention, all shapes", (*full, "benchmarks/bench_attention.py"), 60),
    ]


def _served_by(backend: str) -> tuple[tuple[str, str], ...]:
    """The environment in which tests marked any_backend run on the GPU by one backend."""
    return ("FASTDIFF_BACKEND", backend), ("PYTHONPATH", str(ROOT / "tests" / "tools"))


def _glob(pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)]


def run_phases(plan: Sequence[Phase], total_s: float) -> list[Outcome]:
    """Run one after the other, none beyond its own limit or the total's end."""
    deadline = time.monotonic() + total_s
    outcomes: list[Outcome] = []
    for phase in plan:
        left = deadline - time.monotonic()
        broken = any(o.result != "ok" and p.needed for o, p in zip(outcomes, plan, strict=False))
        if left <= STOP_S or broken:
            outcomes.append(Outcome(phase.name, "not started", 0.0))
            continue
        limit = min(phase.limit_s, left - STOP_S)
        print(f"\n=== {phase.name} (at most {limit:.0f} s)", flush=True)
        outcomes.append(run_phase(phase, limit))
    return outcomes


def run_phase(phase: Phase, limit_s: float) -> Outcome:
    """Run one command in a process group of its own, and end the group when its time is over.

    First it is interrupted, as by Ctrl-C: pytest then still prints what it has and saves it.
    """
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            phase.command,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=_listen_to_interrupts,
            env={**os.environ, **dict(phase.environment)},
        )
    except OSError as error:
        return Outcome(phase.name, f"failed ({error})", 0.0)
    try:
        code = process.wait(limit_s)
        result = "ok" if code == 0 else f"failed (exit {code})"
    except subprocess.TimeoutExpired:
        result = f"cut after {limit_s:.0f} s"
        _end(process)
    except BaseException:
        _end(process)
        raise
    return Outcome(phase.name, result, time.monotonic() - start)


def _listen_to_interrupts() -> None:
    """In the child: a shell starts what it runs in the background deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(process: subprocess.Popen) -> None:
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            continue


def find_gpu() -> str | None:
    """The GPU's name, or None without one (or without PyTorch's means to use it)."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def show(outcomes: Sequence[Outcome], path: Path) -> None:
    from harness import results, summary

    print("\n=== phases")
    for outcome in outcomes:
        print(f"{outcome.name:28} {outcome.seconds:5.0f} s  {outcome.result}")
    data = results.load(path)
    if data is None:
        print(f"nothing was measured: there is no {path}")
        return
    print(f"\n=== {data['device']}, driver {data['driver']}, torch {data['versions']['torch']}")
    print(f"copy {data['copy_gbps']:.0f} GB/s, matrix product {data['matmul_tflops']} TFLOP/s")
    print(summary.as_text(data["rows"], "cuda", brief=True))
    print(summary.others_as_text(data["rows"]))
    print(f"written: {path} ({len(data['rows'])} rows)")


def main() -> int:
    name = find_gpu()
    if name is None:
        print("make gpu: no NVIDIA GPU that PyTorch can use was found here", file=sys.stderr)
        return 3
    import torch

    from harness import results

    path = results.default_path(torch.device("cuda"))
    outcomes = run_phases(phases(path), TOTAL_S)
    show(outcomes, path)
    return 0 if all(outcome.result == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
