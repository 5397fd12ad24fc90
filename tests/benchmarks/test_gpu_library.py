"""Which library the GPU runs take, and what they say of a machine: other machines' facts, faked."""

import json
import subprocess
from pathlib import Path

import pytest

from gpu import bundle, caches, first, library
from gpu.library import Library
from gpu.machine import Machine, notes
from gpu.places import State

PYTHON = ".cpython-312-x86_64-linux-gnu.so"
OTHER = ".cpython-311-x86_64-linux-gnu.so"
H200 = Machine(
    PYTHON, "NVIDIA H200", (9, 0), 139.8, "13.0",
    frozenset(("triton", "diffusers", "pytest")), frozenset(("ncu", "compute-sanitizer")),
)  # fmt: skip
NOW = "these sources"
FITS = Library(Path("fits"), ("90a-real",), NOW)


def changed(machine=H200, **facts):
    return Machine(**{**vars(machine), **facts})


A100 = changed(gpu="NVIDIA A100", capability=(8, 0), memory_gib=39.6)
V100 = changed(gpu="Tesla V100", capability=(7, 0), memory_gib=15.8)
NONE = changed(gpu=None, capability=None, memory_gib=0.0)


def test_a_machine_as_expected_needs_no_words():
    assert notes(H200) == []


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (NONE, ["no NVIDIA GPU"]),
        (A100, ["has compute capability 8.0: the goals are", "40 GiB of memory: the largest"]),
        (V100, ["capability 7.0: the CUDA kernels want 8.0", "16 GiB of memory"]),
        (changed(nvcc=None), ["no nvcc: the CUDA kernels run only from a library made by make"]),
        (changed(packages=H200.packages - {"diffusers"}), ["diffusers is not installed"]),
        (changed(packages=H200.packages - {"triton"}), ["triton is not installed"]),
        (changed(packages=H200.packages - {"pytest"}), ["pytest is not installed"]),
        (changed(programs=frozenset()), ["ncu and compute-sanitizer: not found"]),
    ],
)
def test_what_is_missing_is_one_line_each(machine, expected):
    said = notes(machine)
    assert len(said) == len(expected)
    for line, part in zip(said, expected, strict=True):
        assert part in line and "\n" not in line


@pytest.mark.parametrize(
    ("other", "machine", "why"),
    [
        (Library(Path("x"), broken="it is for cpython-311-x86_64-linux-gnu"), H200, "cpython-311"),
        (Library(Path("x"), ("90a-real",), "older"), H200, "from other sources"),
        (Library(Path("x"), (), NOW), H200, "no CUDA kernels"),
        (Library(Path("x"), ("80-real",), NOW), H200, "for 80-real, and NVIDIA H200 is 9.0"),
        (FITS, A100, "built for 90a-real, and NVIDIA A100 is 8.0"),
    ],
)
def test_a_library_that_does_not_fit_is_passed_over_with_a_line(other, machine, why):
    assert why in library.problem(other, machine, NOW)
    served = Library(Path("served"), ("80-real", "90a-real"), NOW)
    chosen, lines = library.choose([other, served], machine, NOW)
    assert chosen is served and len(lines) == 1 and why in lines[0]


def test_without_a_gpu_of_use_any_library_of_these_sources_fits():
    plain = Library(Path("plain"), (), None)
    for machine in (NONE, V100):
        assert library.problem(plain, machine, NOW) == ""


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (H200, [("1", "90a-real"), ("0", None)]),
        (A100, [("1", "80-real"), ("0", None)]),
        (V100, [("0", None)]),
        (changed(nvcc=None), [("0", None)]),
    ],
)
def test_what_is_built_where_none_fits(machine, expected):
    builds = library.builds(machine)
    assert [(b["FASTDIFF_CUDA"], b.get("FASTDIFF_CUDA_ARCHS")) for b in builds] == expected


@pytest.fixture
def found(tmp_path, monkeypatch):
    """found(library, …): what lies in the folders is examined as these."""
    monkeypatch.setattr(library, "sources", lambda: NOW)

    def install(*libraries):
        by_path = {}
        for index, given in enumerate(libraries):
            path = tmp_path / str(index) / f"_native{PYTHON}"
            path.parent.mkdir()
            path.write_text(str(index))
            by_path[path] = Library(path, given.archs, given.sources, given.broken)
        monkeypatch.setattr(library, "examine", lambda path, machine: by_path[path])
        return [path.parent for path in by_path]

    return install


def obtain(machine, folders, tmp_path, monkeypatch, builds=()):
    """The content of the library that was placed, and the lines; ``builds``: content, or None for
    a build that fails."""
    results = list(builds)
    target = tmp_path / "state" / "library" / f"_native{PYTHON}"
    there = library.examine
    monkeypatch.setattr(
        library, "examine", lambda path, m: Library(path) if path == target else there(path, m)
    )

    def build(options, folder, limit_s):
        content = results.pop(0)
        if content is None:
            raise subprocess.CalledProcessError(1, "setup.py")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"_native{PYTHON}"
        path.write_text(f"{content} {options['FASTDIFF_CUDA']}")
        return path

    monkeypatch.setattr(library, "build", build)
    taken, lines = library.obtain(machine, folders, target, 60)
    assert not results
    return target.read_text() if taken else None, lines


def test_the_first_library_that_fits_is_taken_and_nothing_is_built(found, tmp_path, monkeypatch):
    folders = found(Library(Path(), ("80-real",), NOW), FITS, FITS)
    content, lines = obtain(H200, folders, tmp_path, monkeypatch)
    assert content == "1" and len(lines) == 1


def test_where_none_fits_one_is_built_for_this_gpu(found, tmp_path, monkeypatch):
    content, lines = obtain(H200, found(), tmp_path, monkeypatch, ["new"])
    assert content == "new 1"
    assert lines == ["built here with FASTDIFF_CUDA=1 FASTDIFF_CUDA_ARCHS=90a-real"]


def test_a_build_that_fails_falls_back_to_one_without_kernels(found, tmp_path, monkeypatch):
    content, lines = obtain(H200, found(), tmp_path, monkeypatch, [None, "plain"])
    assert content == "plain 0" and "FASTDIFF_CUDA_ARCHS=90a-real failed" in lines[0]
    assert lines[1] == "built here with FASTDIFF_CUDA=0"


def test_without_nvcc_a_library_for_another_gpu_serves_all_the_same(found, tmp_path, monkeypatch):
    broken = Library(Path(), broken="it is for cpython-311")
    folders = found(broken, Library(Path(), ("80-real",), NOW))
    content, lines = obtain(changed(nvcc=None), folders, tmp_path, monkeypatch)
    assert content == "1" and "serves all the same, without CUDA kernels" in lines[-1]
    content, lines = obtain(changed(nvcc=None), folders[:1], tmp_path, monkeypatch, ["plain"])
    assert content == "plain 0"


def test_where_nothing_can_be_had_the_lines_say_so(found, tmp_path, monkeypatch):
    content, lines = obtain(H200, found(), tmp_path, monkeypatch, [None, None])
    assert content is None and len(lines) == 2


def test_a_library_of_another_python_is_known_by_its_name(tmp_path):
    path = tmp_path / f"_native{OTHER}"
    path.touch()
    path.with_name(library.NOTE).write_text(json.dumps({"sources": "older"}))
    known = library.examine(path, H200)
    assert known.sources == "older"
    assert known.broken == (
        "it is for cpython-311-x86_64-linux-gnu, and this Python is cpython-312-x86_64-linux-gnu"
    )


@pytest.mark.seconds
def test_a_file_that_is_no_library_is_broken_and_nothing_worse(tmp_path, monkeypatch):
    state = State(dry=True, root=tmp_path)
    state.library.parent.mkdir(parents=True)
    state.library.write_text("no machine code")
    monkeypatch.setattr("os.environ", state.environment(dry=True))
    here = changed(NONE, python=state.library.name.removeprefix("_native"))
    assert "NativeLibraryError" in library.examine(state.library, here).broken


def test_a_library_is_placed_with_its_note_or_without_one(tmp_path):
    module, target = tmp_path / "a" / "_native.so", tmp_path / "b" / "_native.so"
    module.parent.mkdir()
    module.write_text("one")
    module.with_name(library.NOTE).write_text("{}")
    library.place(module, target)
    assert target.read_text() == "one" and target.with_name(library.NOTE).exists()
    module.with_name(library.NOTE).unlink()
    library.place(module, target)
    assert not target.with_name(library.NOTE).exists()
    library.place(target, target)
    assert sorted(path.name for path in target.parent.iterdir()) == ["_native.so"]


def test_only_wheels_of_what_is_missing_are_installed(tmp_path, monkeypatch):
    url = f"file://{tmp_path}/no_such_thing-1.0-py3-none-any.whl"
    answers, commands = [], []

    def run(command, **_):
        commands.append(command)
        code, said = answers.pop(0)
        return subprocess.CompletedProcess(command, code, stdout=said, stderr=said)

    monkeypatch.setattr(subprocess, "run", run)

    def install(*given):
        answers[:] = given
        return first.install_peers(tmp_path, tmp_path / "peers")

    wanted = json.dumps({"install": [{"download_info": {"url": url}}]})
    assert install((0, json.dumps({"install": []}))) == []
    assert install((0, wanted), (0, "")) == [
        "installed beside the machine's packages: no_such_thing"
    ]
    assert commands[-1][-1] == url and "--dry-run" not in commands[-1]
    refused = "the wheels of diffusers were not installed: no such wheel"
    assert install((1, "why\nno such wheel\n")) == [refused]
    assert install((0, wanted), (1, "no such wheel")) == [refused]
    assert first.install_peers(tmp_path / "no folder", tmp_path) == []


def test_the_caches_travel_from_one_run_to_the_next(tmp_path):
    (tmp_path / "old" / "triton").mkdir(parents=True)
    (tmp_path / "old" / "triton" / "kernel.cubin").write_text("code")
    file = tmp_path / caches.FILE
    assert caches.pack(tmp_path / "old", file) > 0
    assert len(caches.unpack(tmp_path, tmp_path / "new")) == 1
    assert (tmp_path / "new" / "triton" / "kernel.cubin").read_text() == "code"
    assert caches.unpack(tmp_path, tmp_path / "new") == []  # what is there already is kept
    file.write_text("no archive")
    assert "cannot be read" in caches.unpack(tmp_path, tmp_path / "newer")[0]
    assert caches.pack(tmp_path / "old", file, most_bytes=10) == 0 and not file.exists()


def test_the_bundle_says_what_it_lacks(tmp_path):
    header = tmp_path / "Python.h"
    lacks = bundle.missing("3.12", header, None, False)
    assert len(lacks) == 3 and "PYTHON=/path/to/python3.12" in lacks[1]
    header.touch()
    assert bundle.missing("3.12", header, "13.0", True) == []
