"""The native library: loading, instruction sets, one OpenMP runtime, CUDA sources without a GPU."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff import native, rng
from fastdiff.errors import InputError

HERE = Path(__file__).parent
ISAS = native.library().supported_isas()
PRINT_ISA = """
import json
from fastdiff import native
print(json.dumps(native.library().current_isa()))
"""


def in_fresh_process(code, **environment):
    """Run ``code`` and return what it prints as JSON; its stderr when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


# --- Loading ----------------------------------------------------------------------------------


@pytest.fixture
def unloaded():
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_a_missing_library_is_one_clear_line(unloaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdiff._native", None)
    with pytest.raises(native.NativeLibraryError, match="reinstall fastdiff") as caught:
        rng.normal((1, 4), seed=0)
    assert isinstance(caught.value, OSError)  # the command line prints these as one line
    assert "\n" not in str(caught.value)


def test_a_library_of_other_sources_is_refused(unloaded, monkeypatch):
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    with pytest.raises(native.NativeLibraryError, match="built from other sources"):
        native.library()


@pytest.mark.parametrize("name", ISAS)
def test_the_environment_forces_an_instruction_set(name):
    assert in_fresh_process(PRINT_ISA, FASTDIFF_ISA=name) == name


def test_the_fastest_instruction_set_is_the_default():
    assert in_fresh_process(PRINT_ISA, FASTDIFF_ISA="") == ISAS[-1]


@pytest.mark.parametrize("forced", ["avx512", "sse9"])
def test_an_instruction_set_that_cannot_run_is_refused(forced):
    with pytest.raises(InputError, match=f"FASTDIFF_ISA is '{forced}'.* baseline, avx2: name"):
        native.choose_isa(forced, ["baseline", "avx2"])


def test_the_library_itself_refuses_an_unknown_instruction_set():
    before = native.library().current_isa()
    with pytest.raises(ValueError, match="sse9"):
        native.library().set_isa("sse9")
    assert native.library().current_isa() == before


def test_wide_instructions_stay_in_their_own_namespaces():
    """A -march=native, or a function merged across namespaces, would end an older CPU's process."""
    if shutil.which("objdump") is None or "avx2" not in native.build_info()["isas"]:
        pytest.skip("needs objdump and an x86 build")
    path = native.library().__file__
    text = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    wide = {"ymm": set(), "zmm": set()}
    function = ""
    for line in text.splitlines():
        if line.endswith(">:"):
            function = line
        for register, functions in wide.items():
            if f"%{register}" in line:
                functions.add(function)
    assert len(wide["ymm"]) > 1 and len(wide["zmm"]) > 1  # the test sees what it looks for
    assert all("cpu::avx2::" in name or "cpu::avx512::" in name for name in wide["ymm"])
    assert all("cpu::avx512::" in name for name in wide["zmm"])


# --- OpenMP -----------------------------------------------------------------------------------


def test_one_openmp_runtime_is_loaded():
    code = """
import json
from fastdiff import native
library = native.library()
assert native.build_info()["openmp"]
library.team_size(2)
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
names = ("libgomp", "libiomp", "libomp")
print(json.dumps(sorted(p for p in paths if p.rsplit("/", 1)[-1].startswith(names))))
"""
    runtimes = in_fresh_process(code)
    assert len(runtimes) == 1, runtimes


def test_torch_set_num_threads_is_obeyed():
    code = """
import json, os
import torch
from fastdiff import native, rng
def threads():
    return len(os.listdir("/proc/self/task"))
native.library()
counts = {}
for wanted in (1, 3):
    torch.set_num_threads(wanted)
    before = threads()
    rng.normal((1, 1 << 20), seed=0)
    counts[wanted] = threads() - before
print(json.dumps(counts))
"""
    # The pool keeps the two helpers of a team of three; a team of one has none.
    assert in_fresh_process(code) == {"1": 0, "3": 2}


def test_a_team_has_the_asked_size():
    assert native.build_info()["openmp"] is not None
    assert [native.library().team_size(n) for n in (1, 2, 3)] == [1, 2, 3]


def test_threads_draw_at_the_same_time():
    expected = rng.normal((4, 3, 64, 64), seed=1)
    draws = [None] * 4

    def draw(index):
        for _ in range(10):
            draws[index] = rng.normal((4, 3, 64, 64), seed=1)

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(drawn, expected) for drawn in draws)


# --- CUDA without a GPU -----------------------------------------------------------------------


def test_the_module_imports_without_a_driver():
    if native.build_info()["cuda"] is None:
        pytest.skip("built without CUDA kernels")
    code = """
import json
from fastdiff import native
native.library()
shared_cudart = "libcudart" in open("/proc/self/maps").read()
print(json.dumps([native.cuda_driver_version(), shared_cudart]))
"""
    version, shared_cudart = in_fresh_process(code)
    assert version == 0 if not torch.cuda.is_available() else version > 0
    assert torch.version.cuda is not None or not shared_cudart  # linked statically


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), True),
        ((10, 3), True),
        ((12, 0), True),
    ],
)
def test_architectures_that_the_build_serves(capability, expected):
    assert native.archs_serve(["80-real", "90a-real", "100"], capability) is expected


def test_machine_code_of_an_a_architecture_serves_only_its_own():
    assert native.archs_serve(["90a-real"], (9, 0))
    assert not native.archs_serve(["90a-real"], (10, 0))
    assert not native.archs_serve(["80-real"], (9, 0))
    assert native.archs_serve(["90-virtual"], (10, 0))
    assert not native.archs_serve(["90-virtual"], (8, 9))
    assert not native.archs_serve([], (9, 0))


@pytest.mark.parametrize(
    ("runtime", "driver", "expected"),
    [(13000, 13010, True), (13020, 13000, True), (12080, 13000, True), (13000, 12080, False)],
)
def test_drivers_that_the_runtime_accepts(runtime, driver, expected):
    assert native.driver_serves(runtime, driver) is expected
    assert not native.driver_serves(runtime, 0)


def test_a_cpu_device_is_not_served():
    assert not native.cuda_serves(torch.device("cpu"))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """csrc/cuda/normal.cu as a host library: tests/cuda_emulation stands in for CUDA."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("emulation") / "normal.so"
    folder = HERE / "cuda_emulation"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
        + ["-Werror", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
        + ["-shared", "-fPIC", f"-I{folder}", str(folder / "normal.cpp"), "-o", str(path)],
        check=True,
    )
    return ctypes.CDLL(str(path))


def emulated_normal(emulation, out, *, seed, step, first_sample, addresses=(None, None)):
    layout = rng.sample_layout(out)
    int64, uint64 = ctypes.c_int64, ctypes.c_uint64
    result = emulation.emulated_normal(
        ctypes.c_void_p(out.data_ptr()),
        native.DTYPE_CODES[out.dtype],
        int64(out.shape[0]),
        *(int64(value) for value in layout),
        uint64(seed),
        ctypes.c_uint32(step),
        uint64(first_sample),
        *(ctypes.c_void_p(address) for address in addresses),
    )
    assert result == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid_limit", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 5, 17, 19), (2, 3, 32, 32), (5, 4), (2, 6001)])
def test_the_cuda_kernel_agrees_with_the_cpu_bit_for_bit(emulation, shape, grid_limit, dtype):
    emulation.limit_grid(grid_limit)
    counters = dict(seed=2**63 + 1, step=2**31 + 5, first_sample=2**40)
    expected = rng.normal(shape, dtype=dtype, **counters)

    nan = float("nan")
    wider = torch.full((*shape[:-1], shape[-1] + 8), nan, dtype=dtype)
    outs = {
        "contiguous": torch.full(shape, nan, dtype=dtype),
        "misaligned": torch.full((expected.numel() + 1,), nan, dtype=dtype)[1:].view(shape),
        "guarded": wider[..., 4:-4] if len(shape) == 2 else torch.full(shape, nan, dtype=dtype),
    }
    if len(shape) == 4:
        last = torch.full(shape, nan, dtype=dtype).to(memory_format=torch.channels_last)
        outs["channels_last"] = last
    for name, out in outs.items():
        emulated_normal(emulation, out, **counters)
        assert torch.equal(out, expected), name
    if len(shape) == 2:
        assert wider[:, :4].isnan().all() and wider[:, -4:].isnan().all()


def test_the_cuda_kernel_reads_seed_and_step_from_memory(emulation):
    emulation.limit_grid(0)
    seed, step = torch.tensor(-3), torch.tensor(2**32 - 2)
    out = torch.empty(2, 9)
    addresses = (seed.data_ptr(), step.data_ptr())
    emulated_normal(emulation, out, seed=1, step=1, first_sample=4, addresses=addresses)
    assert torch.equal(out, rng.normal((2, 9), seed=2**64 - 3, step=2**32 - 2, first_sample=4))


def test_the_cuda_kernel_gives_the_published_words(emulation):
    emulation.limit_grid(1)
    words = np.empty((700, 4), np.uint32)
    result = emulation.emulated_philox(
        ctypes.c_void_p(words.ctypes.data),
        ctypes.c_int64(700),
        ctypes.c_uint64(0xA4093822 | 0x299F31D0 << 32),
        ctypes.c_uint32(0x85A308D3),
        ctypes.c_uint64(0x13198A2E | 0x03707344 << 32),
        ctypes.c_uint32(0x243F6A88 - 600),
    )
    assert result == 0
    assert words[600].tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_box_muller_at_the_edges_of_its_words(emulation):
    edges = [0, 1, 2, 127, 128, 2**24 - 1, 2**24, 2**24 + 1]
    edges += [quarter * 2**30 + d for quarter in (1, 2, 3) for d in (-129, -1, 0, 1, 64, 128)]
    edges += [0xB504F333 + d for d in (-300, 0, 300)]  # u about √½, where the logarithm's f jumps
    edges += [2**32 - 1, 2**32 - 128, 2**32 - 129, 2**32 - 2**10]
    words = np.array([(a, b) for a in edges for b in edges], np.uint32)
    normals = np.empty(words.shape, np.float32)
    emulation.box_muller(
        ctypes.c_void_p(words.ctypes.data),
        ctypes.c_void_p(normals.ctypes.data),
        ctypes.c_int64(len(words)),
    )
    u = (words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    assert (u > 0).all() and (u <= 1).all()
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * np.pi * u[:, 1]
    exact = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)
    # Beside four ulps: float64's own cos(π/2) is 6e-17, where the exact zero is right.
    assert np.all(np.abs(normals - exact) <= 4 * np.spacing(np.abs(normals)) + 1e-14)
    assert np.isfinite(normals).all()


def test_sources_include_no_torch_header():
    for path in (HERE.parent / "csrc").rglob("*"):
        if path.suffix in {".h", ".cpp", ".cu"}:
            assert not re.search(r"#include\s*<(torch|ATen|c10)/", path.read_text()), path
