"""``fastdiff info``: versions, devices, instruction sets, and what was compiled for what.

It prints on any machine: what is missing or broken is one of the lines.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from fastdiff import wait_policy
from fastdiff.optional import version_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    info = collect()
    print(json.dumps(info, indent=2) if args.json else as_text(info))
    return 0


def collect() -> dict[str, Any]:
    """Sections of plain values: versions, cpu, cuda, native."""
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "cuda": _cuda(),
        "native": _native(),
    }


def as_text(info: dict[str, Any]) -> str:
    lines = []
    for section, values in info.items():
        lines.append(section)
        lines += [f"  {key:<20}{_as_text(value)}" for key, value in values.items()]
    return "\n".join(lines)


def _as_text(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _versions() -> dict[str, str | None]:
    versions = {name: version_of(name) for name in ("fastdiff", "torch", "triton", "numpy")}
    return {**versions, "python": platform.python_version(), "platform": platform.platform()}


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "model": _cpu_model(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "openmp": _openmp_runtimes(),
        "waiting threads": wait_policy.described(),
    }


def _openmp_runtimes() -> list[str]:
    """The files of the OpenMP runtimes in this process: GNU's, Intel's or LLVM's."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    names = {Path(line.split(maxsplit=5)[5]).name for line in maps.splitlines() if "/" in line}
    return sorted(name for name in names if name.startswith(("libgomp", "libiomp", "libomp")))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    import torch

    return {
        "torch built for": torch.version.cuda,
        "driver serves": _driver(),
        "devices": [
            f"{index}: {_device(torch.cuda.get_device_properties(index))}"
            for index in range(torch.cuda.device_count())
        ],
    }


def _driver() -> str | None:
    from fastdiff.errors import InputError
    from fastdiff.ops import native

    try:
        version = native.cuda_driver_version()
    except (native.NativeLibraryError, InputError):
        return None  # the native section says why
    return f"CUDA {_cuda_version(version)}" if version else None


def _device(properties: Any) -> str:
    memory = properties.total_memory / 2**30
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"


def _native() -> dict[str, Any]:
    from fastdiff.errors import InputError
    from fastdiff.ops import native

    try:
        library = native.library()
    except (native.NativeLibraryError, InputError) as error:
        return {"error": str(error)}
    built = native.build_info()
    cuda = None if built["cuda"] is None else f"{_cuda_version(built['cuda'])}"
    return {
        "isa in use": library.current_isa(),
        "isas that run here": library.supported_isas(),
        "isas compiled": built["isas"],
        "openmp": "torch's runtime" if built["openmp"] else "off: one thread",
        "compiler": built["compiler"],
        "cuda": cuda,
        "cuda archs": built["cuda_archs"].split(),
        "sanitizers": built["sanitize"] or None,
        "pybind11": built["pybind11"],
    }


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
