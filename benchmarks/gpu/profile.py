"""Where the time of a captured step goes: the profiler's kernel table, and its sums by kind.

    python -m gpu.profile --out FOLDER [--dry] [--budget SECONDS]

Writes FOLDER/profile.txt, and a row in rows.jsonl for each kind of kernel.
"""

import re
import sys
from collections.abc import Sequence

import torch

from gpu import device
from gpu.phase import Phase
from gpu.sampling import network, steps
from harness.peers_sampling import fastdiff_sampling

FILE = "profile.txt"
NETWORK = "ddpm-cifar10"
BATCHES = (64, 1)
ROWS = 60  # of the table

# By what its name has, the first that fits; cuDNN's own changes of layout are copies.
KINDS = {
    "copy": r"memcpy|memset|copy|tonhwc|tonchw|nhwcto|nchwto|transpose|catarray|::cat|clone|fill",
    "attention": r"attention|attn|fmha|flash|^forward_kernel|sdpa",
    "norm": r"norm(?!al)|moments|forward_once|forward_apply|merge_kernel",
    "convolution": r"conv|cudnn|fprop|dgrad|implicit|winograd",
    "matmul": r"gemm|gemv|matmul|cublas|cutlass|nvjet|addmm|aten::mm|bmm|splitk|linear",
    "elementwise": r"",
}


def main(argv: Sequence[str] | None = None) -> int:
    phase = Phase.begin("profile", __doc__, argv)
    (phase.out / FILE).unlink(missing_ok=True)
    batches = (2, 1) if phase.dry else BATCHES
    phase.plan({"network": NETWORK, "batch": batch} for batch in batches)
    for batch in batches:
        if phase.time_left(network=NETWORK, batch=batch):
            with phase.attempt(network=NETWORK, batch=batch):
                profile_steps(phase, batch)
    return phase.ended()


def profile_steps(phase: Phase, batch: int) -> None:
    name = network(phase, NETWORK)
    # Tried on a CPU, the modules: a program there calls no operators that a profiler sees.
    options: dict = {} if phase.device.type == "cuda" else {"executor": False}
    sample = fastdiff_sampling(name, batch, torch.bfloat16, phase.device, steps(phase), **options)
    sample()  # compiles, and captures the step
    sample()
    device.wait(phase.device)
    with torch.profiler.profile(activities=[device.activity(phase.device)]) as profile:
        sample()
        device.wait(phase.device)
    events = sorted(device.kernels(profile, phase.device), key=device.microseconds, reverse=True)
    title = f"{NETWORK}, batch {batch}, {steps(phase)} steps in bfloat16"
    with (phase.out / FILE).open("a", encoding="utf-8") as file:
        file.write(f"{title}\n{table(events)}\n\n")
    total = sum(map(device.microseconds, events))
    if not total:
        raise RuntimeError("the profiler saw nothing run on the device")
    for kind in KINDS:
        of_kind = [event for event in events if kind_of(event.key) == kind]
        spent = sum(map(device.microseconds, of_kind))
        phase.write(
            network=NETWORK,
            batch=batch,
            kind=kind,
            ms_per_step=spent / 1e3 / steps(phase),
            percent=100 * spent / total,
            calls_per_step=sum(event.count for event in of_kind) / steps(phase),
        )


def kind_of(kernel: str) -> str:
    return next(kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE))


def table(events: Sequence) -> str:
    """One line for each kernel, the longest first: all its calls, one call, and its name whole."""
    lines = [f"{'us':>12} {'calls':>7} {'us/call':>10}  kind         kernel"]
    for event in events[:ROWS]:
        spent = device.microseconds(event)
        kind = kind_of(event.key)
        each = spent / max(event.count, 1)
        lines.append(f"{spent:12.1f} {event.count:7d} {each:10.2f}  {kind:12} {event.key}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
