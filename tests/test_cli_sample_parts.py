"""``fastdiff sample`` in several processes, killed, restarted, and on disks that fill."""

import errno
import fcntl
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributed import TCPStore

from fastdiff.cli import COMMANDS, main
from fastdiff.commands import _processes
from fastdiff.commands import sample as command
from fastdiff.commands._parts import Parts, split
from fastdiff.create import create_diffusion
from fastdiff.errors import InputError
from fastdiff.images import load_samples_npz
from fastdiff.models.checkpoint import save
from fastdiff.models.ema import EMA
from fastdiff.models.unet import UNet
from fastdiff.sampler import Sampler

ROOT = Path(__file__).parent.parent
WAIT = 300  # seconds for what takes a few, on machines that are busy
# Six batches: numbers 5 … 8, 9 … 12, and so on; the last has two images.
SMALL = ["--num", "22", "--batch-size", "4", "--first-sample", "5", "--steps", "3"]
STARTS = [5, 9, 13, 17, 21, 25]


def save_network(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = UNet(1, 32, 1, 1, (), channel_mult=(1, 1), num_classes=3, null_class=True, image_size=8)
    for parameter in model.parameters():  # the last layer starts at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    diffusion = create_diffusion(steps=100, noise_schedule="cosine")
    info = {"image_size": [8, 8], "class_names": ["ant", "bee", "cat"]}
    return save(folder, model, diffusion=diffusion, ema=EMA(model, (0.9,)), info=info)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("network") / "ckpt", seed=0)


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """What one undisturbed run leaves, with a trajectory that reaches into the second batch."""
    out = tmp_path_factory.mktemp("whole")
    assert sample(checkpoint, out, *SMALL, "--trajectory", "6") == 0
    return out


def arguments(checkpoint: Path, out: Path, *options: str) -> list[str]:
    places = ["--checkpoint", str(checkpoint), "--out", str(out)]
    return ["sample", *places, "--device", "cpu", *options]


def sample(checkpoint: Path, out: Path, *options: str) -> int:
    return main(arguments(checkpoint, out, *options))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def part(out: Path, number: int, kind: str = "part") -> Path:
    return out / "parts" / f"{kind}_{number:08d}.npz"


def error_line(printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith("fastdiff sample: error: ")]
    return line


@pytest.fixture
def drawn(monkeypatch):
    """The numbers of the first images of the batches that were drawn, in turn."""
    numbers = []
    draw = Sampler.sample

    def counted(self, shape, **options):
        numbers.append(options["first_sample"])
        return draw(self, shape, **options)

    monkeypatch.setattr(Sampler, "sample", counted)
    return numbers


def interrupt(checkpoint, out, number, *options):
    """Run until the batch that starts with this number, and end there as Ctrl-C does."""
    draw = Sampler.sample

    def interrupted(self, shape, **arguments):
        if arguments["first_sample"] == number:
            raise KeyboardInterrupt
        return draw(self, shape, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", interrupted)
        assert sample(checkpoint, out, *SMALL, *options) == 130


# One process


def test_nothing_of_the_parts_is_left(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {"samples_22x8x8x1.npz", "png", "grid.png", "trajectory.png"}
    images, labels = load_samples_npz(whole / "samples_22x8x8x1.npz")
    assert images.shape == (22, 8, 8, 1) and len(np.unique(images)) > 50
    assert labels.tolist() == [number % 3 for number in range(5, 27)]


def test_a_restart_draws_what_is_missing(checkpoint, whole, tmp_path, drawn, capsys):
    interrupt(checkpoint, tmp_path, 13, "--trajectory", "6")
    assert drawn == [5, 9]
    # A part is a file of samples, readable as it stands.
    images, labels = load_samples_npz(part(tmp_path, 9))
    assert images.shape == (4, 8, 8, 1) and labels.tolist() == [0, 1, 2, 0]
    drawn.clear()
    capsys.readouterr()
    assert sample(checkpoint, tmp_path, *SMALL, "--trajectory", "6") == 0
    assert drawn == STARTS[2:]
    printed = capsys.readouterr().out
    assert "2 of 6 batches were already there\n" in printed and "\n14 images, 3 steps" in printed
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "empty", "frames", "other"])
def test_damaged_parts_are_drawn_again(checkpoint, whole, tmp_path, drawn, damage):
    interrupt(checkpoint, tmp_path, 21, "--trajectory", "6")
    path = part(tmp_path, 9, "frames" if damage == "frames" else "part")
    content = bytearray(path.read_bytes())
    if damage in ("cut", "frames"):
        path.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    elif damage == "gone":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        np.savez(path, np.zeros((3, 8, 8, 1), np.uint8))
    drawn.clear()
    assert sample(checkpoint, tmp_path, *SMALL, "--trajectory", "6") == 0
    assert drawn == [9, 21, 25]
    assert files(tmp_path) == files(whole)


def test_the_trajectory_redraws_only_what_it_shows(checkpoint, whole, tmp_path, drawn):
    interrupt(checkpoint, tmp_path, 21, "--trajectory", "1")
    drawn.clear()
    assert sample(checkpoint, tmp_path, *SMALL, "--trajectory", "6") == 0
    assert drawn == [5, 9, 21, 25]
    assert files(tmp_path) == files(whole)


def test_a_shorter_trajectory_redraws_nothing(checkpoint, whole, tmp_path, drawn):
    interrupt(checkpoint, tmp_path, 21, "--trajectory", "8")
    drawn.clear()
    assert sample(checkpoint, tmp_path, *SMALL, "--trajectory", "6") == 0
    assert drawn == [21, 25]
    assert files(tmp_path) == files(whole)


def test_pngs_may_be_wanted_only_after_the_restart(checkpoint, whole, tmp_path):
    interrupt(checkpoint, tmp_path, 21, "--trajectory", "6", "--no-pngs")
    assert not (tmp_path / "png").exists()
    assert sample(checkpoint, tmp_path, *SMALL, "--trajectory", "6") == 0
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize(
    "options, difference",
    [
        (["--seed", "1"], "seed is 0 there and 1 here"),
        (["--steps", "2"], "steps is '3' there and '2' here"),
        (["--method", "ddim"], "method is 'ddpm' there and 'ddim' here"),
        (["--classes", "1"], "classes is [0, 1, 2] there and [1] here"),
        (["--guidance-scale", "2"], "guidance_scale is None there and 2.0 here"),
        (["--dtype", "bfloat16"], "dtype is 'float32' there and 'bfloat16' here"),
        (["--truncate"], "truncate is False there and True here"),
        (["--num", "21"], "num is 22 there and 21 here"),
        (["--batch-size", "5"], "batch_size is 4 there and 5 here"),
        (["--first-sample", "6"], "first_sample is 5 there and 6 here"),
        (["--weights", "model"], "checkpoint is 'EMA 0.9, sha256"),
    ],
)
def test_other_settings_are_refused(checkpoint, whole, tmp_path, capsys, options, difference):
    interrupt(checkpoint, tmp_path, 9)
    before = files(tmp_path)
    capsys.readouterr()
    assert sample(checkpoint, tmp_path, *SMALL, *options) == 2
    printed = capsys.readouterr()
    line = error_line(printed.err)
    assert f"{tmp_path / 'parts'} holds the unfinished samples of another run: {difference}" in line
    assert line.endswith(f"give another --out, or delete {tmp_path / 'parts'} to start over")
    assert files(tmp_path) == before


def test_another_checkpoint_is_refused_wherever_it_lies(checkpoint, tmp_path, capsys):
    interrupt(checkpoint, tmp_path / "out", 9)
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    interrupt(moved, tmp_path / "out", 13)  # the same network
    save_network(moved, seed=1)
    assert sample(moved, tmp_path / "out", *SMALL) == 2
    assert "another run: checkpoint is 'EMA 0.9, sha256" in capsys.readouterr().err
    assert part(tmp_path / "out", 9).exists()


def test_the_same_command_once_more_draws_nothing(checkpoint, tmp_path, drawn, capsys):
    assert sample(checkpoint, tmp_path, *SMALL) == 0
    before = files(tmp_path)
    drawn.clear()
    (tmp_path / "grid.png").unlink()
    (tmp_path / "png" / "sample_000007.png").unlink()
    assert sample(checkpoint, tmp_path, *SMALL, "--trajectory", "2") == 0
    printed = capsys.readouterr().out
    assert "samples_22x8x8x1.npz holds these images already; delete it to draw" in printed
    assert "no new trajectory" in printed
    assert drawn == [] and files(tmp_path) == before
    # Another run's samples of the same shape are replaced, as ever.
    assert sample(checkpoint, tmp_path, *SMALL, "--seed", "1", "--no-pngs") == 0
    assert drawn == STARTS
    name = "samples_22x8x8x1.npz"
    assert files(tmp_path)[name] != before[name]


def test_killed_between_the_final_file_and_the_end(checkpoint, whole, tmp_path, drawn, monkeypatch):
    def killed(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "save_grid", killed)
        assert sample(checkpoint, tmp_path, *SMALL, "--trajectory", "6") == 130
    assert (tmp_path / "samples_22x8x8x1.npz").exists()
    drawn.clear()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, **options: path.exists() and killed())
        assert sample(checkpoint, tmp_path, *SMALL, "--trajectory", "6") == 130
    assert (tmp_path / ".parts.removed").exists()
    assert sample(checkpoint, tmp_path, *SMALL) == 0
    assert drawn == []
    assert files(tmp_path).keys() == files(whole).keys()


@pytest.mark.parametrize("there", ["thesis.tex", "run.json"])
def test_a_folder_of_that_name_that_is_not_ours(checkpoint, tmp_path, capsys, there):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / there).write_text("ten years of work")
    assert sample(checkpoint, tmp_path, *SMALL) == 2
    expected = {"thesis.tex": "holds files of something else", "run.json": "run.json is damaged"}
    assert expected[there] in error_line(capsys.readouterr().err)
    assert files(tmp_path) == {f"parts/{there}": b"ten years of work"}


def test_two_runs_do_not_share_a_folder(checkpoint, tmp_path, capsys):
    interrupt(checkpoint, tmp_path, 9)
    folder = os.open(tmp_path / "parts", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)  # even that keeps others out
    capsys.readouterr()
    assert sample(checkpoint, tmp_path, *SMALL) == 2
    assert "another process draws into" in error_line(capsys.readouterr().err)
    os.close(folder)
    assert sample(checkpoint, tmp_path, *SMALL) == 0


def test_rubbish_of_a_killed_write_goes(checkpoint, whole, tmp_path):
    interrupt(checkpoint, tmp_path, 9, "--trajectory", "6")
    (tmp_path / "parts" / ".part_00000009.npz.1.tmp").write_bytes(b"PK")
    interrupt(checkpoint, tmp_path, 13, "--trajectory", "6")
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert [name.partition("_")[0] for name in names] == ["frames"] * 2 + ["part"] * 2 + [
        "run.json"
    ]


def test_a_part_that_is_on_another_machine(tmp_path):
    parts = Parts(tmp_path, split(0, 5, 3, 0), (2, 2, 1))
    assert parts.open({}) == parts.batches == [(0, 3, 0), (3, 2, 0)]
    parts.write(parts.batches[0], np.zeros((3, 2, 2, 1), np.uint8))
    with pytest.raises(InputError, match="part_00000003.npz'; the same command draws it again"):
        parts.merge()
    parts.close()


def test_without_torchrun_there_is_no_group(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "distributed", None)
    monkeypatch.setenv("RANK", "1")  # left over from something else
    assert sample(checkpoint, tmp_path, "--num", "1", "--steps", "2", "--no-pngs") == 0


def test_spacing_reaches_the_sampler(checkpoint, tmp_path, monkeypatch):
    taken = []

    def kept(*args, **options):
        sampler = Sampler(*args, **options)
        taken.append(tuple(sampler.diffusion.timestep_map))
        return sampler

    monkeypatch.setattr(command, "Sampler", kept)
    for name in ("uniform", "quadratic", "trailing", "logsnr"):
        options = ("--num", "1", "--steps", "5", "--spacing", name, "--no-pngs")
        assert sample(checkpoint, tmp_path / name, *options) == 0
    assert len(set(taken)) == 4 and all(len(steps) == 5 for steps in taken)


# Disks that fill


def test_a_full_disk_keeps_the_finished_batches(checkpoint, tmp_path, drawn, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        options = ["--num", "30", "--batch-size", "1", "--steps", "1", "--no-pngs"]
        assert sample(checkpoint, disk, *options) == 2
        line = error_line(capsys.readouterr().err)
        assert "No space left on device; the finished batches are kept in" in line
        kept = sorted((disk / "parts").glob("part_*.npz"))
        assert 3 < len(kept) < 30 and len(drawn) == len(kept) + 1
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert sample(checkpoint, disk, *options) == 0
        assert f"{len(kept)} of 30 batches were already there" in capsys.readouterr().out
        # The batch for which there was no room, once more, and the rest.
        assert drawn[len(kept) :] == [len(kept), *range(len(kept), 30)]
        assert load_samples_npz(disk / "samples_30x8x8x1.npz")[0].shape == (30, 8, 8, 1)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_no_room_for_the_final_file(checkpoint, whole, tmp_path, drawn, capsys):
    # Of all files the final one is the largest: 2,300 bytes, a part has 900.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        assert sample(checkpoint, tmp_path, *SMALL, "--trajectory", "6") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large; the finished batches are kept" in error_line(capsys.readouterr().err)
    assert drawn == STARTS and not list(tmp_path.glob("samples_*"))
    assert sample(checkpoint, tmp_path, *SMALL, "--trajectory", "6") == 0
    assert drawn == STARTS and files(tmp_path) == files(whole)


# Several processes


@pytest.fixture(scope="module")
def forks():
    """Processes that need not import everything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"fastdiff.commands.{name}" for name in COMMANDS])
    return context


def process(argv, log, environment, disk_full=False, dies_at=None):
    """What a process of its own runs: the command line."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    if disk_full:

        def no_room(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        np.savez = no_room
    if dies_at is not None:
        replace, calls = os.replace, itertools.count(1)

        def counted(*args):
            if next(calls) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)

        os.replace = counted
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)


class Group:
    """Processes with the environment torchrun makes, and its store, but started in no time."""

    def __init__(self, context, folder, count, argv, disk_full=None):
        self.log = folder / "log"
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = []
        for rank in range(count):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            target = (argv, str(self.log), environment, rank == disk_full)
            self.processes.append(context.Process(target=process, args=target))
            self.processes[-1].start()

    def finish(self):
        """(exit codes, what all printed)"""
        for one in self.processes:
            one.join(WAIT)
            assert one.exitcode is not None, "a process hangs"
        return [one.exitcode for one in self.processes], self.log.read_text()

    def kill(self):
        for one in self.processes:
            one.kill()
            one.join()


@pytest.fixture
def start(forks, tmp_path):
    groups = []

    def start_group(*args, **options):
        groups.append(Group(forks, tmp_path, *args, **options))
        return groups[-1]

    yield start_group
    for group in groups:
        group.kill()


# Every file is renamed into place: run.json is the first; the first batch's frames, part and PNGs
# are 2, 3 and 4 … 7, the second's 8 … 13, the others have no frames; the merged file is the 32nd,
# and becomes the final one in the 33rd; grid and trajectory are the last.
@pytest.mark.parametrize(
    "dies_at, there", [(1, 0), (3, 0), (5, 1), (14, 2), (31, 6), (32, 6), (33, 6), (34, 6), (35, 6)]
)
def test_killed_anywhere_it_goes_on(
    checkpoint, whole, forks, tmp_path, drawn, capsys, dies_at, there
):
    out = tmp_path / "out"
    argv = arguments(checkpoint, out, *SMALL, "--trajectory", "6")
    killed = forks.Process(target=process, args=(argv, tmp_path / "log", {}, False, dies_at))
    killed.start()
    killed.join(WAIT)
    assert killed.exitcode == -signal.SIGKILL
    assert len(list((out / "parts").glob("part_*.npz"))) == there
    assert sample(checkpoint, out, *SMALL, "--trajectory", "6") == 0
    assert drawn == STARTS[there:]
    said = f"{there} of 6 batches were already there" in capsys.readouterr().out
    assert said == (there > 0 and dies_at < 34)
    assert files(out) == files(whole)


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
    monkeypatch.setattr(_processes, "choose_device", lambda device: device)
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda name, timeout: asked.update(backend=name)
    )
    monkeypatch.setattr("torch.distributed.new_group", lambda timeout: "group")
    if refusal is not None:
        # One line a machine: from its first process.
        with pytest.raises((SystemExit, InputError)) as ended:
            _processes.join(device)
        if local_rank == 0:
            assert refusal in str(ended.value)
        else:
            assert ended.type is SystemExit and ended.value.code == 2
        return
    processes = _processes.join(device)
    assert asked["backend"] == backend and (processes.rank, processes.count) == (6, 8)
    if backend == "nccl":
        assert processes.device == asked["device"] == f"cuda:{local_rank}"
    else:
        assert processes.device == device


def test_other_settings_are_refused_once(checkpoint, start, tmp_path):
    out = tmp_path / "out"
    interrupt(checkpoint, out, 9)
    codes, log = start(2, arguments(checkpoint, out, *SMALL, "--seed", "3")).finish()
    assert codes == [2, 2]
    assert "seed is 0 there and 3 here" in error_line(log)


def test_an_error_of_one_process_ends_all(checkpoint, whole, start, tmp_path, drawn):
    # Nobody ends the first process when the second fails, as torchrun would; it finds out when its
    # own work is done.
    out = tmp_path / "out"
    options = [*SMALL, "--trajectory", "6", "--no-pngs"]
    codes, log = start(2, arguments(checkpoint, out, *options), disk_full=1).finish()
    assert codes == [2, 2], log
    own, lost = sorted(
        (line for line in log.splitlines() if "fastdiff sample: error: " in line),
        key=lambda line: "lost the others" in line,
    )
    assert "No space left on device; the finished batches are kept in" in own
    assert "process 0 of 2 lost the others" in lost
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


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for text in lists for child in text.read_text().split()]


def torchrun(argv: list[str]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", "2", "-m", "--", "fastdiff", *argv]


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
