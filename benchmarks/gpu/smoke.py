"""Does every operation work on every backend here? Each on a few shapes, against float64.

    python -m gpu.smoke --out FOLDER [--dry] [--budget SECONDS]

A line in rows.jsonl for each operation, shape, direction and backend: the error and what it may be,
or the first line of what was raised. A kernel that reads beyond its tensors takes the process with
it, as a kernel that never ends does: the calls are made in a worker, and another goes on after the
one that was lost. With --dry Triton's kernels run in its interpreter.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu import lines

PHASE = "smoke"
BACKENDS = ("reference", "triton", "cuda")
WORKER = "FASTDIFF_SMOKE_FROM"  # in a worker: the first of the calls that it makes
CALL_S = 25.0  # a call that takes longer, its compilation included, hangs
POISONED = 7  # a worker's exit when CUDA serves it no longer

# What a kernel may be off by: a few times the reference's own error in that dtype, and some ulps of
# the largest value.
TIMES_REFERENCE, ULPS = 4, 2


def main(argv: Sequence[str] | None = None) -> int:
    given = lines.arguments(__doc__, argv)
    if WORKER in os.environ:
        return work(given, int(os.environ[WORKER]))
    command = [sys.executable, "-m", "gpu.smoke", *(argv if argv is not None else sys.argv[1:])]
    return oversee(given.out, command, given.budget)


# --- The overseer -----------------------------------------------------------------------------


def oversee(out: Path, command: Sequence[str], budget_s: float, call_s: float = CALL_S) -> int:
    """Start workers until every call has its line; 0 where all are well."""
    before, deadline = len(smoke_lines(out)), time.monotonic() + budget_s
    done, all_made = 0, False
    while not all_made and time.monotonic() < deadline:
        code, lost = watch(out, command, done, before, deadline, call_s)
        done, all_made = len(smoke_lines(out)) - before, code == 0
        if not all_made and code != POISONED and time.monotonic() < deadline:
            lines.write(out, PHASE, call=done, ok=False, error=lost or f"the worker ended: {code}")
            done += 1
    rows = smoke_lines(out)[before:]
    wrong = [row for row in rows if row["ok"] is False]
    print(f"smoke: {len(rows)} calls, {len(wrong)} wrong{'' if all_made else ', not all made'}")
    return 1 if wrong or not all_made else 0


def watch(
    out: Path, command: Sequence[str], done: int, before: int, deadline: float, call_s: float
) -> tuple[int, str]:
    """A worker's exit code, and why it was ended if it was."""
    worker = subprocess.Popen(command, env={**os.environ, WORKER: str(done)})
    seen, since, allowed = done, time.monotonic(), 2 * call_s  # the first has the imports
    try:
        while worker.poll() is None:
            time.sleep(0.1)
            now = len(smoke_lines(out)) - before
            if now > seen:
                seen, since, allowed = now, time.monotonic(), call_s
            if time.monotonic() > min(since + allowed, deadline):
                return -1, f"no answer for {time.monotonic() - since:.0f} s"
        return worker.returncode, ""
    finally:
        worker.kill()
        worker.wait()


def smoke_lines(out: Path) -> list[dict[str, Any]]:
    return [row for row in lines.read(out) if row["phase"] == PHASE and "call" in row]


# --- A worker ---------------------------------------------------------------------------------


def work(given: Any, start: int) -> int:
    if given.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    from fastdiff.errors import first_line

    device = torch.device("cpu" if given.dry else "cuda")
    for number, (fields, measure) in enumerate(calls(device, given.dry)):
        if number < start:
            continue
        began = time.monotonic()
        try:
            fields |= measure()
        except Exception as error:
            said = f"{type(error).__name__}: {first_line(error)}"
            fields |= {"ok": False, "error": said[:300]}
        seconds = round(time.monotonic() - began, 3)
        lines.write(given.out, PHASE, call=number, **fields, seconds=seconds)
        if not serves(device):
            return POISONED
    return 0


def calls(device: Any, dry: bool) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What a line says of a call, and the call, which says whether it is well."""
    from gpu.cases import cases

    backends = ("reference", "native", *BACKENDS[1:]) if dry else BACKENDS
    for case in cases(device, dry):
        for direction in ("forward", "backward")[: 1 + case.is_differentiable]:
            for backend in backends:
                names = dict(op=case.op, shape=case.shape, dtype=case.dtype)
                names |= dict(direction=direction, backend=backend)
                yield names, lambda case=case, b=backend, d=direction: compare(case, b, d)


def compare(case: Any, backend: str, direction: str) -> dict[str, Any]:
    """The fields of a call's line: ok is None where this backend does not serve this device."""
    import fastdiff
    from fastdiff.ops.dispatch import OPERATIONS, problem

    x = case.tensors[0]
    why_not = problem(OPERATIONS[case.op], backend, x.device, x.dtype)
    if why_not:
        return {"ok": None, "left_out": why_not}
    wide = [tensor.double() for tensor in case.tensors]
    exact = results(case.truth, wide, direction)
    with fastdiff.backend("reference"):
        theirs = results(case.call, case.tensors, direction)
    with fastdiff.backend(backend):
        ours = results(case.call, case.tensors, direction)
    worst = {"share": 0.0}
    for index, (mine, reference, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        off = measure_error(mine, reference, truth)
        if not off["share"] <= worst["share"]:  # a NaN is the worst
            worst = {"result": index, **off}
    return {"ok": worst["share"] <= 1, **worst}


def measure_error(ours: Any, reference: Any, truth: Any) -> dict[str, float]:
    """The largest error, and its share of what is allowed."""
    import torch

    def off(value: Any) -> float:
        return (value.double() - truth).abs().max().item()

    largest = truth.abs().max().item()
    allowed = TIMES_REFERENCE * off(reference) + ULPS * torch.finfo(ours.dtype).eps * largest
    return {"error": off(ours), "allowed": allowed, "share": off(ours) / allowed}


def results(call: Callable[..., Any], tensors: Sequence[Any], direction: str) -> list[Any]:
    """What the call returns, or the gradients of all its tensors."""
    import torch

    if direction == "forward":
        with torch.no_grad():
            found = call(*tensors)
        return list(found) if isinstance(found, tuple) else [found]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = call(*leaves)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device)
    return list(torch.autograd.grad(y, leaves, upstream.view(y.shape).to(y.dtype)))


def serves(device: Any) -> bool:
    """Whether CUDA still works in this process: after an illegal access nothing does."""
    import torch

    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
