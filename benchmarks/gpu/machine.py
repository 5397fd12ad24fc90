"""What this machine has, and in one line each what it lacks for the phases."""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MEMORY_GIB = 40  # the largest batches, with the compiled peer's copies
GOALS_FOR = (9, 0)  # H100 and H200
LEAST = (8, 0)  # bfloat16 and asynchronous copies, which the CUDA kernels take for granted
PACKAGES = ("triton", "diffusers", "pytest")
PROGRAMS = ("ncu", "compute-sanitizer")


@dataclass(frozen=True)
class Machine:
    """The facts, so that another machine's can be given in their place."""

    python: str  # the suffix of a library for this Python
    gpu: str | None = None
    capability: tuple[int, int] | None = None
    memory_gib: float = 0.0
    nvcc: str | None = None  # its version
    packages: frozenset[str] = frozenset()
    programs: frozenset[str] = frozenset()

    def architecture(self) -> str | None:
        """What the CUDA kernels are built for here: this GPU alone; None for what they don't serve.

        90a, not 90: what only this generation has (wgmma) is in no other's code.
        """
        if self.capability is None or self.capability < LEAST:
            return None
        number = 10 * self.capability[0] + self.capability[1]
        return f"{number}a-real" if self.capability == GOALS_FOR else f"{number}-real"

    def as_fields(self) -> dict[str, Any]:
        fields = asdict(self)
        return {k: sorted(v) if isinstance(v, frozenset) else v for k, v in fields.items()}


def this_machine() -> Machine:
    import torch

    facts: dict[str, Any] = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["capability"] = (properties.major, properties.minor)
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
    return Machine(
        python=sysconfig.get_config_var("EXT_SUFFIX"),
        nvcc=nvcc_version(),
        packages=frozenset(name for name in PACKAGES if importlib.util.find_spec(name)),
        programs=frozenset(name for name in PROGRAMS if program(name)),
        **facts,
    )


def program(name: str) -> str | None:
    """Its path; CUDA's own folder is not on every machine's PATH."""
    usual = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(usual) if usual.exists() else None)


def nvcc_version() -> str | None:
    nvcc = program("nvcc")
    if nvcc is None:
        return None
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+\.\d+)", said.stdout)
    return found[1] if found else None


def notes(machine: Machine) -> list[str]:
    """One line for each thing that is missing or other than expected."""
    lines = []
    name, capability = machine.gpu, machine.capability
    if name is None or capability is None:
        lines.append("no NVIDIA GPU: nothing here is a measurement of one")
    else:
        generation = f"{name} has compute capability {capability[0]}.{capability[1]}"
        if capability < LEAST:
            lines.append(f"{generation}: the CUDA kernels want 8.0 or newer, Triton's are tried")
        elif capability != GOALS_FOR:
            lines.append(f"{generation}: the goals are stated for 9.0, the H100 and H200")
        if machine.memory_gib < MEMORY_GIB:
            lines.append(
                f"{name} has {machine.memory_gib:.0f} GiB of memory: the largest batches want "
                f"{MEMORY_GIB}, and fail alone where they do not fit"
            )
    if machine.nvcc is None:
        lines.append("no nvcc: the CUDA kernels run only from a library made by make gpu-bundle")
    if "triton" not in machine.packages:
        lines.append("triton is not installed: its kernels are left out")
    if "diffusers" not in machine.packages:
        lines.append("diffusers is not installed: its phases are left out (make gpu-bundle)")
    if "pytest" not in machine.packages:
        lines.append("pytest is not installed: the phases that run tests are left out")
    missing = [name for name in PROGRAMS if name not in machine.programs]
    if missing:
        lines.append(f"{' and '.join(missing)}: not found, and left out")
    return lines
