"""``fastdiff sample`` in several processes."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

from fastdiff import ranks
from fastdiff.errors import InputError
from parts_tools import (
    SMALL,
    STARTS,
    arguments,
    children,
    error_line,
    files,
    interrupt,
    part,
    sample,
    torchrun,
)
from paths import ROOT
from patience import WAIT


@pytest.mark.parametrize("count", [2, 3])
def test_processes_leave_what_one_leaves(checkpoint, whole, start, tmp_path, count):
    out = tmp_path / "out"
    codes, log = start(count, arguments(checkpoint, out, *SMALL, "--trajectory", "6")).finish()
    assert codes == [0] * count, log
    assert files(out) == files(whole)
    assert log.count("22 images, 3 steps each") == 1
    assert log.count(str(out / "grid.png")) == 1
    share = len(STARTS) // count * 3  # steps of the first process, the only one with a bar
    assert f"{share}/{share}" in log and len(re.findall("sampling: +0%", log)) == 1


def test_fewer_batches_than_processes(checkpoint, start, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "out"
    options = ["--num", "1", "--steps", "3"]
    assert sample(checkpoint, alone, *options) == 0
    codes, log = start(3, arguments(checkpoint, out, *options)).finish()
    assert codes == [0] * 3, log
    assert files(out) == files(alone)


def test_bad_options_are_said_once(checkpoint, start, tmp_path):
    out = tmp_path / "out"
    codes, log = start(3, arguments(checkpoint, out, "--classes", "dog")).finish()
    assert codes == [2] * 3
    assert log.count("\n") == 1 and "'dog' is no class" in error_line(log)
    assert not out.exists()


def test_several_processes_on_one_gpu_are_refused(checkpoint, start, tmp_path):
    options = ["--device", "cuda:0"]
    codes, log = start(2, arguments(checkpoint, tmp_path / "out", *options)).finish()
    assert codes == [2, 2] and log.count("\n") == 1
    assert "--device cuda:0 is one GPU for 2 processes" in error_line(log)


@pytest.mark.parametrize(
    "device, gpus, backend, refusal",
    [
        (None, 4, "nccl", None),
        ("cuda", 4, "nccl", None),
        (None, 0, "gloo", None),
        ("cpu", 4, "gloo", None),
        (None, 2, None, "4 processes on this machine and 2 GPUs"),
        ("cuda:1", 4, None, "--device cuda:1 is one GPU for 4 processes"),
    ],
)
@pytest.mark.parametrize("local_rank", [0, 2])
def test_each_process_takes_its_gpu(monkeypatch, device, gpus, backend, refusal, local_rank):
    # No machine with four GPUs needed: what would be asked of torch is written down.
    asked = {}
    numbers = {"RANK": 6, "WORLD_SIZE": 8, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 4}
    for name, value in {**numbers, "MASTER_ADDR": "::1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(ranks, "choose_device", lambda device: device)
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda name, **given: asked.update(backend=name)
    )
    monkeypatch.setattr("torch.distributed.rendezvous", lambda *_, **__: iter([("store", 6, 8)]))
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *_, **__: "store")
    monkeypatch.setattr("torch.distributed.PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr("torch.distributed.new_group", lambda backend, timeout: "group")
    monkeypatch.setattr(ranks, "_begin_pulse", lambda store, rank: None)  # a thread of its own
    if refusal is not None:
        # One line a machine: from its first process.
        with pytest.raises((SystemExit, InputError)) as ended:
            ranks.join(device)
        if local_rank == 0:
            assert refusal in str(ended.value)
        else:
            assert ended.type is SystemExit and ended.value.code == 2
        return
    met = ranks.join(device)
    assert asked["backend"] == backend and (met.rank, met.count) == (6, 8)
    if backend == "nccl":
        assert met.device == asked["device"] == f"cuda:{local_rank}"
    else:
        assert met.device == device


def test_other_settings_are_refused_once(checkpoint, start, tmp_path):
    out = tmp_path / "out"
    interrupt(checkpoint, out, 9)
    codes, log = start(2, arguments(checkpoint, out, *SMALL, "--seed", "3")).finish()
    assert codes == [2, 2]
    assert "seed is 0 there and 3 here" in error_line(log)


def test_processes_with_other_settings_are_refused_once(checkpoint, start, tmp_path):
    out = tmp_path / "out"
    each = [arguments(checkpoint, out, *SMALL, "--seed", seed) for seed in ("3", "4")]
    codes, log = start(2, each).finish()
    assert codes == [2, 2]
    assert "the ranks disagree: seed is 4 on rank 1 and 3 on rank 0" in error_line(log)
    assert not list(out.glob("parts/part_*"))


@pytest.mark.seconds
def test_an_error_of_one_process_ends_all(checkpoint, whole, start, tmp_path, drawn):
    # Nobody ends the first process when the second fails, as torchrun would; it finds out when its
    # own work is done, and has nothing to add to what the second has said.
    out = tmp_path / "out"
    options = [*SMALL, "--trajectory", "6", "--no-pngs"]
    codes, log = start(2, arguments(checkpoint, out, *options), disk_full=1).finish()
    assert codes == [2, 2], log
    (said,) = [line for line in log.splitlines() if "fastdiff sample: error: " in line]
    assert "No space left on device; the finished batches are kept in" in said
    assert [number for number in STARTS if part(out, number).exists()] == [5, 13, 21]
    assert sample(checkpoint, out, *SMALL, "--trajectory", "6") == 0
    assert drawn == [9, 17, 25] and files(out) == files(whole)


# torchrun itself


def wait_for_parts(out: Path, count: int) -> list[Path]:
    end = time.monotonic() + WAIT
    while len(found := list((out / "parts").glob("part_*.npz"))) < count:
        assert time.monotonic() < end, "no parts"
        time.sleep(0.005)
    return found


@pytest.mark.seconds
def test_a_process_killed_under_torchrun_and_the_restart(checkpoint, tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    options = ["--num", "79", "--batch-size", "2", "--steps", "3", "--no-pngs"]
    command = torchrun(arguments(checkpoint, out, *options))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment) as killed,
    ):
        wait_for_parts(out, 4)
        workers = children(killed.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)  # as the kernel does when memory runs out
        assert killed.wait(WAIT) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "fastdiff sample: error" not in (tmp_path / "log").read_text()
    there = len(list((out / "parts").glob("part_*.npz")))
    assert 4 <= there < 40

    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert f"{there} of 40 batches were already there\n" in done.stdout
    drawn = re.search(r"^(\d+) images, 3 steps each", done.stdout, re.MULTILINE)
    assert 79 - 2 * there <= int(drawn[1]) <= 80 - 2 * there  # the last batch has one image
    assert sample(checkpoint, alone, *options) == 0
    assert files(out) == files(alone)
    assert Image.open(out / "grid.png").size[0] > 600
