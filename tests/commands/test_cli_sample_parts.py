"""``fastdiff sample`` killed, restarted, and on disks that fill."""

import resource
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from filelock import FileLock

from fastdiff.commands import sample as command
from fastdiff.commands.sample_parts import Parts, split
from fastdiff.errors import InputError
from fastdiff.images import load_samples_npz
from fastdiff.sampling.sampler import Sampler
from parts_tools import (
    SMALL,
    STARTS,
    arguments,
    error_line,
    files,
    forkserver,
    interrupt,
    part,
    process,
    sample,
    save_network,
)
from patience import WAIT
from small_disk import small_disk


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


def test_a_trajectory_of_another_kind_redraws_what_it_shows(checkpoint, whole, tmp_path, drawn):
    interrupt(checkpoint, tmp_path, 21, "--trajectory", "6")
    drawn.clear()
    assert sample(checkpoint, tmp_path, *SMALL, "--trajectory", "6", "--trajectory-of", "x0") == 0
    assert drawn == [5, 9, *STARTS[4:]]  # the six lie in the first two batches
    left, expected = files(tmp_path), files(whole)
    x0, xt = left.pop("trajectory_x0.png"), expected.pop("trajectory.png")
    assert left == expected and x0 != xt


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


@pytest.mark.seconds
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


@pytest.mark.seconds
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
    with FileLock(tmp_path / "parts" / ".lock"):
        capsys.readouterr()
        assert sample(checkpoint, tmp_path, *SMALL) == 2
        assert "another process draws into" in error_line(capsys.readouterr().err)
    assert sample(checkpoint, tmp_path, *SMALL) == 0


def test_rubbish_of_a_killed_write_goes(checkpoint, whole, tmp_path):
    interrupt(checkpoint, tmp_path, 9, "--trajectory", "6")
    (tmp_path / "parts" / ".part_00000009.npz.1.tmp").write_bytes(b"PK")
    interrupt(checkpoint, tmp_path, 13, "--trajectory", "6")
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    kinds = [name.partition("_")[0] for name in names]
    assert kinds == [".lock", "frames", "frames", "part", "part", "run.json"]


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


@pytest.mark.seconds
def test_a_full_disk_keeps_the_finished_batches(checkpoint, tmp_path, drawn, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, "64k"):
        options = ["--num", "30", "--batch-size", "1", "--steps", "2", "--no-pngs"]
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


# Killed


# Every file is renamed into place: run.json is the first; the first batch's frames, part and PNGs
# are 2, 3 and 4 … 7, the second's 8 … 13, the others have no frames; the merged file is the 32nd,
# and becomes the final one in the 33rd; grid and trajectory are the last.
@pytest.mark.parametrize(
    "dies_at, there", [(1, 0), (3, 0), (5, 1), (14, 2), (31, 6), (32, 6), (33, 6), (34, 6), (35, 6)]
)
def test_killed_anywhere_it_goes_on(checkpoint, whole, tmp_path, drawn, capsys, dies_at, there):
    out = tmp_path / "out"
    argv = arguments(checkpoint, out, *SMALL, "--trajectory", "6")
    killed = forkserver().Process(target=process, args=(argv, tmp_path / "log", {}, False, dies_at))
    killed.start()
    killed.join(WAIT)
    assert killed.exitcode == -signal.SIGKILL
    assert len(list((out / "parts").glob("part_*.npz"))) == there
    assert sample(checkpoint, out, *SMALL, "--trajectory", "6") == 0
    assert drawn == STARTS[there:]
    said = f"{there} of 6 batches were already there" in capsys.readouterr().out
    assert said == (there > 0 and dies_at < 34)
    assert files(out) == files(whole)
