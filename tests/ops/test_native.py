"""The native library: loading, instruction sets, one OpenMP runtime, CUDA sources without a GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from fastdiff.errors import InputError
from fastdiff.ops import native
from fastdiff.ops.normal import normal
from norm_cases import threads
from paths import ROOT

ISAS = native.library().supported_isas()
PRINT_ISA = """
import json
from fastdiff.ops import native
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
        normal((1, 4), seed=0)
    assert isinstance(caught.value, OSError)  # the command line prints these as one line
    assert "\n" not in str(caught.value)


def test_a_library_of_other_sources_is_refused(unloaded, monkeypatch):
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    with pytest.raises(native.NativeLibraryError, match="built from other sources"):
        native.library()


@pytest.mark.seconds
@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ISAS)
def test_the_environment_forces_an_instruction_set(name):
    assert in_fresh_process(PRINT_ISA, FASTDIFF_ISA=name) == name


@pytest.mark.seconds
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


@pytest.mark.seconds
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


@pytest.mark.seconds
def test_one_openmp_runtime_is_loaded():
    code = """
import json
from fastdiff.ops import native
library = native.library()
assert native.build_info()["openmp"]
library.team_size(2)
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
names = ("libgomp", "libiomp", "libomp")
print(json.dumps(sorted(p for p in paths if p.rsplit("/", 1)[-1].startswith(names))))
"""
    runtimes = in_fresh_process(code)
    assert len(runtimes) == 1, runtimes


@pytest.mark.seconds
def test_torch_set_num_threads_is_obeyed():
    code = """
import json, os
import torch
from fastdiff.ops import native
from fastdiff.ops.normal import normal
def threads():
    return len(os.listdir("/proc/self/task"))
native.library()
counts = {}
for wanted in (1, 3):
    torch.set_num_threads(wanted)
    before = threads()
    normal((1, 1 << 20), seed=0)
    counts[wanted] = threads() - before
print(json.dumps(counts))
"""
    # The pool keeps the two helpers of a team of three; a team of one has none.
    assert in_fresh_process(code) == {"1": 0, "3": 2}


def test_a_team_has_the_asked_size():
    assert native.build_info()["openmp"] is not None
    assert [native.library().team_size(n) for n in (1, 2, 3)] == [1, 2, 3]


def test_a_workspace_is_as_large_as_the_threads_of_each_run_need(monkeypatch):
    monkeypatch.setattr(native, "_IDLE", [])
    borrowed, ran, asked = [], [], []

    def lent(floats):
        borrowed.append(torch.empty(floats))
        return borrowed[-1]

    def floats(threads):
        asked.append(threads)
        return 100 * threads

    monkeypatch.setattr(native, "borrow", lent)
    run = native.in_threads(lambda *given: ran.append(given), floats)
    for count in (1, 1, 3, 2):
        with threads(count):
            run()
    assert asked == [1, 3, 2]
    assert [len(workspace) for workspace in borrowed] == [100, 100, 300, 200]
    places = [workspace.data_ptr() for workspace in borrowed]
    assert ran == list(zip(places, [1, 1, 3, 2], strict=True))
    assert [id(v) for v in native._IDLE] == [id(v) for v in borrowed]


def test_threads_draw_at_the_same_time():
    expected = normal((4, 3, 64, 64), seed=1)
    draws = [None] * 4

    def draw(index):
        for _ in range(10):
            draws[index] = normal((4, 3, 64, 64), seed=1)

    drawing = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in drawing:
        thread.start()
    for thread in drawing:
        thread.join()
    assert all(torch.equal(drawn, expected) for drawn in draws)


# --- CUDA without a GPU -----------------------------------------------------------------------


def test_the_module_imports_without_a_driver():
    if native.build_info()["cuda"] is None:
        pytest.skip("built without CUDA kernels")
    code = """
import json
from fastdiff.ops import native
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


def test_sources_include_no_torch_header():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".h", ".cpp", ".cu"}:
            assert not re.search(r"#include\s*<(torch|ATen|c10)/", path.read_text()), path
