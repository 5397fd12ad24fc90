"""Measures the host time of an eager Triton call: python benchmarks/measure_launch.py

Of each operation, called through fastdiff.ops on small tensors up to a driver that does nothing
(harness/fake_gpu.py): no GPU is needed, and none is waited for. The columns, in microseconds, are
the least of many rounds, turn by turn in one process:

    binder      every launch by ``kernel[grid](...)``
    operation   as fastdiff launches (kernels/launcher.py), all of the call
    launcher    of that, what the launches take from their arguments up to the driver

A GPU's calls take besides what torch asks of CUDA (the current device and stream: about a
microsecond), Triton's launcher in C, and the driver. Small float32 tensors of a CPU stand for the
GPU's, and q_sample is kept from looking at their t, which it does not on a GPU.
"""

import importlib
import time
from collections.abc import Callable

import torch

import fastdiff
from fastdiff import ops
from fastdiff.kernels import launcher
from fastdiff.methods.table import StepTable
from fastdiff.ops.normal import normal
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.schedules import cosine_betas
from harness.fake_gpu import fake_gpu

ROUNDS, CALLS = 200, 50


def operations() -> dict[str, Callable[[], object]]:
    process = GaussianDiffusion(cosine_betas(6), var_type="learned_range")
    table, step, t = StepTable.from_process(process), torch.tensor(3), torch.arange(2)
    x, output, noise, rows = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8), *torch.rand(2, 10)
    image = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    weight, (scale, shift) = torch.randn(32), torch.randn(2, 64).chunk(2, 1)
    norm, film = (image, 8, weight, weight), {"scale": scale, "shift": shift}
    qkv, out = torch.randn(2, 16, 192).transpose(1, 2), torch.empty_like(x)
    return {
        "posterior_step": lambda: ops.posterior_step(x, output, table, step, seed=5),
        "q_sample": lambda: ops.q_sample(x, t, noise, rows, seed=5),
        "normal": lambda: normal(out.shape, seed=5, out=out, backend="triton"),
        "group_norm_silu": lambda: ops.group_norm_silu(*norm),
        "group_norm_silu, FiLM": lambda: ops.group_norm_silu(*norm, **film),
        "rms_norm_silu": lambda: ops.rms_norm_silu(image, weight),
        "attention": lambda: ops.attention(qkv, 2),
    }


def microseconds(calls: list[Callable[[], object]]) -> list[float]:
    """The least time of each, turn by turn."""
    least = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for i, call in enumerate(calls):
            call()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            least[i] = min(least[i], (time.perf_counter() - start) / CALLS * 1e6)
    return least


def launches_of(operation: Callable[[], object]) -> list[tuple]:
    """(launch, its arguments) of a call."""
    seen: list[tuple] = []
    original = launcher.Launch.__call__

    def noted(self: launcher.Launch, *changing: object) -> None:
        seen.append((self, changing))
        original(self, *changing)

    launcher.Launch.__call__ = noted  # type: ignore[method-assign]
    operation()
    launcher.Launch.__call__ = original  # type: ignore[method-assign]
    return seen


def by_binder(operation: Callable[[], object]) -> None:
    launcher.KNOWN = False
    operation()
    launcher.KNOWN = True


def main() -> None:
    torch.set_num_threads(1)
    q_sample = importlib.import_module("fastdiff.ops.q_sample.op")
    q_sample._check = lambda *_, **__: None  # type: ignore[attr-defined]
    print(f"Triton {launcher.triton.__version__}, torch {torch.__version__}")
    print(f"{'µs per call':24s}{'binder':>10s}{'operation':>12s}{'launcher':>11s}")
    with fake_gpu(noting=False), fastdiff.backend("triton"):
        for name, operation in operations().items():
            launches = launches_of(operation)

            def launch(launches: list[tuple] = launches) -> None:
                for launch, changing in launches:
                    launch(*changing)

            binder = lambda operation=operation: by_binder(operation)  # noqa: E731
            times = microseconds([binder, operation, launch])
            print(f"{name:24s}{times[0]:10.1f}{times[1]:12.1f}{times[2]:11.1f}")


if __name__ == "__main__":
    main()
