"""What nvcc makes of the CUDA kernels for each architecture, on a machine without a GPU: registers
that leave room for the blocks a launch counts on, no spills, and accesses as wide as promised.

`make test` compiles, where the installed module has no CUDA, for Hopper alone and leaves out
group_norm_silu, which takes minutes."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from fastdiff.ops import native
from machine_code import shortest_round
from paths import ROOT

SOURCES = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("sm_90a", "sm_80", "sm_100")
REGISTERS = 65536  # of a multiprocessor
RESERVED = 1024  # bytes of every block that Hopper and later ones keep for themselves
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME')}/bin")


class Limit(NamedTuple):
    """What a kernel may take: ``blocks`` of ``threads`` are to fit on a multiprocessor."""

    source: str
    kernels: str  # a pattern of their mangled names
    threads: int
    blocks: int
    shared: int = 0  # bytes, static


# Every kernel has its line; threads and blocks are those of its __launch_bounds__.
FORWARD, BACKWARD = "group_norm_silu.cu", "group_norm_silu_backward.cu"
LIMITS = [
    Limit("device_limits.cu", "probe_kernel", 256, 8),
    Limit(FORWARD, "group_norm_silu_kernel", 256, 2),
    Limit(BACKWARD, "group_norm_silu_backward_kernel", 256, 2),
    Limit(BACKWARD, "slopes_kernel", 32, 16),
    Limit(BACKWARD, "coefficients_kernel", 256, 2),
    Limit("normal.cu", "normal_kernel|philox_kernel", 256, 6),
    Limit("posterior_step.cu", "PosteriorOpILb0", 128, 5),
    Limit("posterior_step.cu", "PosteriorOpILb1", 128, 4),  # keeps memory
    Limit("q_sample.cu", "flat_kernel|strided_kernel", 128, 8),
]


class Wide(NamedTuple):
    """Kernels that move their operands 16 bytes at a time."""

    source: str
    kernels: str
    loads: int  # 128-bit ones in the code, at least
    stores: int
    and_small: bool = False  # they store small things too: statistics, sums


# Of a template's instances those for accesses of 16 bytes: four float32, eight of 16 bits. The
# last is the pass: all at once or the second of two.
WIDE_ACCESS = r"Access(If|I13__nv_bfloat16|I6__half)Lb[01]ELi[48]E.*PassE[02]E"
# Elementwise, two of each for every operand; a narrow one among wider ones takes the first.
WIDE = [
    Wide(FORWARD, WIDE_ACCESS, 1, 1, and_small=True),
    Wide(BACKWARD, WIDE_ACCESS, 2, 1, and_small=True),
    Wide("posterior_step.cu", "flat_kernel.*OpILb0", 12, 4),
    Wide("posterior_step.cu", "flat_kernel.*OpILb1", 16, 10),
    Wide("q_sample.cu", "flat_kernel", 4, 4),
]


class Arithmetic(NamedTuple):
    """Instructions of a kernel that draws, on Hopper: the ``budget`` of an element is what an H200
    does in the time that its bytes take (16.5 bytes and 128 instructions a clock and SM)."""

    source: str
    kernels: str
    what: str
    round: dict[str, int]  # what a round of its loop meets
    elements: int  # of a round
    most: float  # instructions an element
    budget: float


def contiguous(loads: int, stores: int, octets: int, halves: int) -> dict[str, int]:
    """A round of flat_kernel: all counters drawn, 128-bit accesses, pairs rounded to bfloat16."""
    drawn = {"MUFU.LG2": 4 * octets, r"LDG\S*\.128": loads, r"STG\S*\.128": stores}
    return drawn | {"F2FP.BF16": halves, "F2FP.F16|HADD2": 0}


Q, P = "q_sample.cu", "posterior_step.cu"
STORED = ("f", "13__nv_bfloat16")
F32, BF16 = (f"flat_kernel.*OpE{stored}Lb0" for stored in STORED)
PLAIN_F32, PLAIN_BF16 = (f"flat_kernel.*OpILb0EEE{stored}Lb0" for stored in STORED)
KEEPS_F32, KEEPS_BF16 = (f"flat_kernel.*OpILb1EEE{stored}Lb0" for stored in STORED)
# One operand's upper halves taken.
MIXED, UPPER = "flat_kernel.*OpILb0.*MixedELb0", {"0xffff0000": 4}
DRAWING = [
    Arithmetic(Q, F32, "float32, x_t", contiguous(2, 2, 1, 0), 8, 33, 62),
    Arithmetic(Q, F32, "float32, x_t and noise", contiguous(2, 4, 1, 0), 8, 34, 93),
    Arithmetic(Q, BF16, "bfloat16, x_t", contiguous(2, 2, 2, 16), 16, 31, 31),
    Arithmetic(Q, BF16, "bfloat16, x_t and noise", contiguous(2, 4, 2, 24), 16, 32, 47),
    Arithmetic(P, PLAIN_F32, "float32, x_prev", contiguous(4, 2, 1, 0), 8, 46, 93),
    Arithmetic(P, PLAIN_F32, "float32, and x_0", contiguous(4, 4, 1, 0), 8, 47, 124),
    Arithmetic(P, PLAIN_BF16, "bfloat16, x_prev", contiguous(4, 2, 2, 8), 16, 42, 47),
    Arithmetic(P, PLAIN_BF16, "bfloat16, and x_0", contiguous(4, 4, 2, 16), 16, 43, 62),
    Arithmetic(P, KEEPS_F32, "float32, reads and keeps", contiguous(6, 4, 1, 0), 8, 62, 155),
    Arithmetic(P, KEEPS_BF16, "bfloat16, reads and keeps", contiguous(6, 4, 2, 16), 16, 58, 78),
    Arithmetic(P, MIXED, "float32, output bfloat16", contiguous(4, 2, 1, 0) | UPPER, 8, 51, 77),
    Arithmetic("normal.cu", "normal_kernelIfLb1ELb0", "fast", {"STG": 1}, 4, 32, 31),
    Arithmetic("normal.cu", "normal_kernelIfLb1ELb1", "exact", {"STG": 1}, 4, 60, 31),
]


class Report(NamedTuple):
    source: str
    kernel: str
    architecture: str
    registers: int
    stack: int  # bytes, what is spilled included
    shared: int  # bytes, static
    code: str

    def __str__(self) -> str:
        return (
            f"{self.architecture:7} {self.registers:3} registers, {self.stack} bytes of stack, "
            f"{self.shared} shared: {self.kernel}"
        )


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=Path(NVCC or "").parent)
    try:
        from triton.backends.nvidia import compiler
    except ImportError:
        return found
    return found or str(Path(compiler.__file__).parent / "bin" / "cuobjdump")


def read(binary: Path) -> list[Report]:
    """What a cubin or a module with several takes, as cuobjdump reads it off the machine code."""

    def sections(option: str) -> dict[tuple[str, str], str]:
        text = subprocess.run(
            [cuobjdump(), option, binary], capture_output=True, text=True, check=True
        ).stdout
        found, architecture = {}, binary.suffixes[-2:][0].lstrip(".")  # of a cubin, by its name
        for part in re.split(r"(?=arch = sm_\w+|Function ?:? \S+)", text):
            if named := re.match(r"arch = (sm_\w+)", part):
                architecture = named[1]
            elif named := re.match(r"Function ?:? (\w+)", part):
                found[named[1], architecture] = part
        return found

    code = sections("-sass")
    reports = []
    for (kernel, architecture), usage in sections("-res-usage").items():
        registers, stack, shared, local = (
            int(re.search(rf"{name}:(\d+)", usage)[1])
            for name in ("REG", "STACK", "SHARED", "LOCAL")
        )
        # The anonymous namespace is named after the file.
        source = next(p.name for p in SOURCES.glob("*.cu") if f"_{p.stem}_cu_" in kernel)
        reports.append(
            Report(
                source, kernel, architecture, registers, stack + local, shared,
                code[kernel, architecture],
            )
        )  # fmt: skip
    return reports


def compiled(source: Path, architecture: str, folder: Path) -> Path:
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    subprocess.run(
        [NVCC, "-cubin", f"-arch={architecture}", "-std=c++17", "-Wno-deprecated-gpu-targets"]
        + ["-o", cubin, source],
        check=True,
    )
    return cubin


def cases(table: list) -> list:
    return [
        pytest.param(
            row,
            marks=pytest.mark.long if row.source in (FORWARD, BACKWARD) else (),
            id=f"{row.source} {row.kernels}",
        )
        for row in table
    ]


@pytest.fixture(scope="session")
def reports(request, tmp_path_factory) -> list[Report]:
    """Of every kernel for every architecture: of the installed module, or compiled here."""
    if cuobjdump() is None:
        pytest.skip("needs cuobjdump, of CUDA's toolkit or of Triton")
    if native.build_info()["cuda"] and not native.emulates_cuda():
        return read(Path(native.library().__file__))
    if NVCC is None:
        pytest.skip("needs a module with CUDA kernels, or nvcc")
    folder = tmp_path_factory.mktemp("cubins")
    sources, architectures = sorted(SOURCES.glob("*.cu")), ARCHITECTURES
    if not request.config.getoption("--all"):
        sources = [path for path in sources if path.name not in (FORWARD, BACKWARD)]
        architectures = ARCHITECTURES[:1]
    jobs = [(path, name) for path in sources for name in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = pool.map(lambda job: compiled(*job, folder), jobs)
        return [report for cubin in cubins for report in read(cubin)]


@pytest.mark.seconds
@pytest.mark.parametrize("limit", cases(LIMITS))
def test_kernels_leave_room_for_the_blocks_their_launch_counts_on(reports, limit):
    found = [r for r in reports if r.source == limit.source and re.search(limit.kernels, r.kernel)]
    assert {r.architecture for r in found} == {r.architecture for r in reports}
    for report in found:
        print(report)
    # Registers are handed out to a warp 256 at a time.
    most = REGISTERS // (limit.threads * limit.blocks) // 8 * 8
    wrong = [r for r in found if r.stack or r.registers > most]
    assert not wrong, "\n".join(map(str, wrong))
    assert all(r.shared <= limit.shared + RESERVED for r in found)


@pytest.mark.seconds
@pytest.mark.parametrize("drawing", DRAWING, ids=lambda row: f"{row.source} {row.what}")
def test_drawing_takes_few_instructions(reports, drawing):
    found = [
        r
        for r in reports
        if r.architecture == "sm_90a"
        and r.source == drawing.source
        and re.search(drawing.kernels, r.kernel)
    ]
    if not found:
        pytest.skip("needs the kernels for sm_90a")
    (report,) = found
    count = shortest_round(report.code, once=drawing.round) / drawing.elements
    print(f"{drawing.source} {drawing.what}: {count:.1f} of {drawing.budget}")
    assert count <= drawing.most


def test_every_source_has_a_limit():
    assert {limit.source for limit in LIMITS} == {path.name for path in SOURCES.glob("*.cu")}


@pytest.mark.long
def test_every_kernel_was_compiled(reports):
    assert {r.source for r in reports} == {path.name for path in SOURCES.glob("*.cu")}


@pytest.mark.seconds
def test_every_kernel_has_a_limit(reports):
    for report in reports:
        patterns = [limit.kernels for limit in LIMITS if limit.source == report.source]
        assert any(re.search(p, report.kernel) for p in patterns), str(report)


@pytest.mark.seconds
@pytest.mark.parametrize("wide", cases(WIDE))
def test_operands_are_moved_16_bytes_at_a_time(reports, wide):
    found = [r for r in reports if r.source == wide.source and re.search(wide.kernels, r.kernel)]
    assert found
    for report in found:
        loads = re.findall(r"\bLDG\.\S+", report.code)
        stores = re.findall(r"\bSTG\.\S+", report.code)
        assert sum(".128" in load for load in loads) >= wide.loads, f"{report}: {loads}"
        assert sum(".128" in store for store in stores) >= wide.stores, f"{report}: {stores}"
        if not wide.and_small:
            assert all(".128" in store for store in stores), f"{report}: {stores}"
