"""What nvcc makes of the CUDA kernels for each architecture, on a machine without a GPU: registers
that leave room for the blocks a launch counts on, no spills, and accesses as wide as promised."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow
SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
REGISTERS = 65536  # of a multiprocessor
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME')}/bin")


class Limit(NamedTuple):
    """What a kernel may take: ``blocks`` of ``threads`` are to fit on a multiprocessor."""

    source: str
    kernels: str  # a pattern of their mangled names
    threads: int
    blocks: int
    shared: int = 0  # bytes, static


# Every kernel has its line; threads and blocks are those of its __launch_bounds__.
LIMITS = [
    Limit("normal.cu", "normal_kernel|philox_kernel", 256, 6),
    Limit("posterior_step.cu", "flat_kernel|strided_kernel", 128, 5),
    Limit("q_sample.cu", "flat_kernel|strided_kernel", 128, 8),
]


class Wide(NamedTuple):
    """Kernels that move their operands 16 bytes at a time, and nothing else to memory."""

    source: str
    kernels: str
    loads: int  # 128-bit ones in the code, at least
    stores: int


# Two of each for every operand: a float32 one takes both, a narrower one the first.
WIDE = [
    Wide("posterior_step.cu", "flat_kernel", 12, 4),
    Wide("q_sample.cu", "flat_kernel", 4, 4),
]


class Report(NamedTuple):
    kernel: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int
    code: str

    def __str__(self) -> str:
        return (
            f"{self.architecture:7} {self.registers:3} registers, {self.stack} bytes of stack, "
            f"{self.spills} spilled, {self.shared} shared: {self.kernel}"
        )


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=Path(NVCC or "").parent)
    try:
        from triton.backends.nvidia import compiler
    except ImportError:
        return found
    return found or str(Path(compiler.__file__).parent / "bin" / "cuobjdump")


def compiled(source: str, architecture: str, folder: Path) -> list[Report]:
    cubin = folder / f"{source}.{architecture}.cubin"
    command = [NVCC, "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-std=c++17"]
    command += ["-Wno-deprecated-gpu-targets", "-o", cubin, SOURCES / source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sass = subprocess.run(
        [cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", sass, re.DOTALL))
    reports = []
    for part in done.stderr.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]

        def number(pattern: str, part=part) -> int:
            return int(found[1]) if (found := re.search(pattern, part)) else 0

        reports.append(
            Report(
                name,
                architecture,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                number(r"(\d+) bytes smem"),
                code[name],
            )
        )
    return reports


@pytest.fixture(scope="session")
def reports(tmp_path_factory) -> dict[str, list[Report]]:
    """Of each source's kernels, for every architecture that this nvcc knows."""
    if NVCC is None or cuobjdump() is None:
        pytest.skip("needs nvcc and cuobjdump")
    listed = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = [name for name in ARCHITECTURES if name.rstrip("a") in listed.stdout.split()]
    folder = tmp_path_factory.mktemp("cubins")
    jobs = [(source.name, name) for source in sorted(SOURCES.glob("*.cu")) for name in known]
    made: dict[str, list[Report]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, _), found in zip(
            jobs, pool.map(lambda job: compiled(*job, folder), jobs), strict=True
        ):
            made.setdefault(source, []).extend(found)
    return made


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: f"{limit.source} {limit.kernels}")
def test_kernels_leave_room_for_the_blocks_their_launch_counts_on(reports, limit):
    found = [r for r in reports[limit.source] if re.search(limit.kernels, r.kernel)]
    assert {r.architecture for r in found} == {r.architecture for r in reports["normal.cu"]}
    for report in found:
        print(report)
    # Registers are handed out to a warp 256 at a time.
    most = REGISTERS // (limit.threads * limit.blocks) // 8 * 8
    wrong = [r for r in found if r.stack or r.spills or r.registers > most]
    assert not wrong, "\n".join(map(str, wrong))
    assert all(r.shared <= limit.shared for r in found)


def test_every_kernel_has_a_limit(reports):
    for source, found in reports.items():
        patterns = [limit.kernels for limit in LIMITS if limit.source == source]
        for report in found:
            assert any(re.search(p, report.kernel) for p in patterns), str(report)


@pytest.mark.parametrize("wide", WIDE, ids=lambda wide: f"{wide.source} {wide.kernels}")
def test_operands_are_moved_16_bytes_at_a_time(reports, wide):
    for report in reports[wide.source]:
        if re.search(wide.kernels, report.kernel):
            loads = re.findall(r"\bLDG\.\S+", report.code)
            stores = re.findall(r"\bSTG\.\S+", report.code)
            assert sum(".128" in load for load in loads) >= wide.loads, f"{report}: {loads}"
            assert len(stores) >= wide.stores, f"{report}: {stores}"
            assert all(".128" in store for store in stores), f"{report}: {stores}"
