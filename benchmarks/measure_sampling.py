"""What a step of sampling costs on this CPU: the Sampler, and what others serve a network by.

    python benchmarks/measure_sampling.py                                  # all, in half an hour
    python benchmarks/measure_sampling.py --presets ddpm-cifar10 --batches 1 --dtypes bfloat16
    python benchmarks/measure_sampling.py --contenders 'openvino *' '* compiled' --no-memory

DDIM with one state_dict, from the same noise, turn by turn; a figure is one network call with the
update after it. Beside it: the floor, measured in the same rounds (harness/products.py); the PSNR
of the images to diffusers' in float32; the peak memory of a process that does nothing else.
OpenVINO and ONNX Runtime are the extra "peers"; what is missing is left out, with a line.

Rows go to benchmarks/results/sampling/; report.py makes a table of docs/benchmarks.md of them.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch

from fastdiff.optional import version_of
from harness import peers, results
from harness import peers_sampling as sampling
from harness.products import Floor
from harness.timing import seconds
from report import sampling_table

CPU = torch.device("cpu")
PRESETS = ("ddpm-cifar10", "iddpm-imagenet64")
PACKAGES = ("diffusers", "onnxruntime", "openvino")  # whose versions are kept
RIVALS = ("diffusers *", "openvino *", "onnxruntime *")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=peers.NETWORKS, default=PRESETS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=sampling.DTYPES, default=sampling.DTYPES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="in which the contenders take turns")
    parser.add_argument(
        "--contenders", nargs="+", default=RIVALS, metavar="PATTERN", help="beside fastdiff's own"
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sampling/DEVICE.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    default = results.default_path(CPU)
    path = args.out or default.parent / "sampling" / default.name
    found = results.Results(path, results.machine(CPU))
    for preset in args.presets:
        for batch in args.batches:
            for dtype in args.dtypes:
                row = measure(preset, batch, dtype, args.steps, args.rounds, args.contenders)
                if args.memory:
                    peak_mb = partial(sampling.peak_memory_mb, preset, batch)
                    row["peak_mb"] = {name: peak_mb(name) for name in row["times_s"]}
                found.add(row)
                found.save()
                data = {**found.header, "date": results.today(), "rows": [row]}
                print(f"\n{sampling_table(data)}", flush=True)


def measure(
    preset: str, batch: int, dtype: str, steps: int, rounds: int, rivals: Sequence[str]
) -> results.Row:
    """The row of one race: seconds of a network call by contender, and what is beside them."""
    ours = f"fastdiff {dtype}"
    made = sampling.contenders(preset, batch, CPU, steps)
    wanted = [name for name in made if is_wanted(name, dtype, rivals)]
    _, reference = sampling.reference_images(preset, CPU, steps, min(batch, sampling.COMPARED))
    samples, missing, psnr = {}, {}, {}
    for name in dict.fromkeys([ours, *wanted]):
        try:
            samples[name] = made[name]()
            images = samples[name]()  # compiles, and warms up
        except Exception as error:
            if name == ours:
                raise
            samples.pop(name, None)
            missing[name] = " ".join(str(error).split())[:120] or type(error).__name__
            print(f"left out: {name}: {missing[name]}", flush=True)
        else:
            psnr[name] = sampling.psnr_db(images, reference)
    floor = Floor(preset, batch, getattr(torch, dtype))
    times: dict[str, list[float]] = {name: [] for name in samples}
    for _ in range(rounds):
        for name, sample in samples.items():
            times[name].append(seconds(sample) / steps)
        floor.turn()
    return {
        **{"op": "sampling", "variant": f"{steps} steps", "shape": preset, "batch": batch},
        **{"dtype": dtype, "layout": "-", "direction": "forward", "ours": ours},
        **{"steps": steps, "rounds": rounds, "threads": torch.get_num_threads()},
        "times_s": {name: statistics.median(taken) for name, taken in times.items()},
        "least_s": {name: min(taken) for name, taken in times.items()},
        # Each round gives one ratio.
        "times_faster": {
            name: statistics.median(p / o for p, o in zip(taken, times[ours], strict=True))
            for name, taken in times.items()
            if name != ours
        },
        "floor_s": floor.floor_s,
        "flops": sampling.network_flops(preset, batch),
        "psnr_db": psnr,
        "missing": missing,
        "packages": {name: version_of(name) for name in PACKAGES},
    }


def is_wanted(name: str, dtype: str, patterns: Sequence[str]) -> bool:
    """Whether a contender of this name, "WHO DTYPE [HOW]", is among the rivals."""
    return name.split()[1] == dtype and any(fnmatch(name, pattern) for pattern in patterns)


if __name__ == "__main__":
    main()
