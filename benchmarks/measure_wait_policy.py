"""How long OpenMP's threads should spin before they sleep: milliseconds a step, by policy and by
how many other processes keep the cores busy.

    python benchmarks/measure_wait_policy.py

Each figure is the median step of a process of its own, which starts with that policy in its
environment; the policies take turns, so that what else the machine does meets them all. Run it on
otherwise idle cores: fastdiff/wait_policy.py rests on its table.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch

import fastdiff

POLICIES: dict[str, dict[str, str]] = {
    "runtime's own": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=100": {"GOMP_SPINCOUNT": "100"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
# (preset, batch, whether it trains)
STEPS = {
    "CIFAR-10 U-Net, batch 1": ("ddpm-cifar10", 1, False),
    "CIFAR-10 U-Net, batch 8": ("ddpm-cifar10", 8, False),
    "digits U-Net, training, batch 32": ("digits", 32, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--step", choices=STEPS, help="take this step and print its milliseconds")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each process's steps")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each policy")
    parser.add_argument("--neighbours", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=STEPS, default=list(STEPS))
    args = parser.parse_args()
    if args.step is not None:
        print(median_step(*STEPS[args.step], args.seconds))
        return
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} threads on {cores} cores, milliseconds a step, median of {args.rounds}\n")
    for step in args.only:
        print(f"| {step} | " + " | ".join(f"{n} busy" for n in args.neighbours) + " |")
        print("|---" * (len(args.neighbours) + 1) + "|")
        columns = [measure(step, n, cores, args.rounds, args.seconds) for n in args.neighbours]
        for policy in POLICIES:
            cells = [f"{statistics.median(column[policy]):.0f}" for column in columns]
            print(f"| {policy} | " + " | ".join(cells) + " |", flush=True)
        print(flush=True)


def measure(
    step: str, neighbours: int, cores: int, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Median steps of each policy's processes, beside so many busy ones."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    try:
        for _ in range(rounds):
            for policy, settings in POLICIES.items():
                done = subprocess.run(
                    [sys.executable, __file__, "--step", step, "--seconds", str(seconds)],
                    env={**plain, "OMP_NUM_THREADS": str(cores), **settings},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                times[policy].append(float(done.stdout))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return times


def median_step(preset: str, batch: int, trains: bool, seconds: float) -> float:
    """Milliseconds of one step of ``preset``'s network: its forward, or a training step."""
    torch.manual_seed(0)
    model = fastdiff.UNet.from_preset(preset)
    size = 8 if preset == "digits" else 32
    x, t = torch.randn(batch, model.in_channels, size, size), torch.zeros(batch, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        if not trains:
            with torch.no_grad():
                model(x, t)
            return
        optimizer.zero_grad()
        model(x, t).square().mean().backward()
        optimizer.step()

    times: list[float] = []
    step()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
