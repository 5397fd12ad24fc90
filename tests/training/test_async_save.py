"""Checkpoints that are written while the training goes on."""

import errno
import os
import threading

import pytest
import safetensors.torch
import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.errors import InputError
from patience import WAIT
from training_tools import at_step, make_trainer, read_lines, resume_trainer

QUICK = {"steps": 7, "save_every": 3, "log_every": 1}


@pytest.fixture
def disk(monkeypatch):
    """A disk that writes nothing until its ``event`` is set."""
    write, event = checkpoint.write_files, threading.Event()

    def slow(folder, *args):
        assert event.wait(WAIT)
        write(folder, *args)

    monkeypatch.setattr(checkpoint, "write_files", slow)
    yield event
    event.set()


def fill(monkeypatch, step):
    """Let the checkpoint of this step find the disk full."""
    write = checkpoint.write_files

    def full(folder, *args):
        if f"step_{step:08d}" in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, *args)

    monkeypatch.setattr(checkpoint, "write_files", full)


@pytest.mark.seconds
def test_steps_go_on_while_one_is_written(tmp_path, disk):
    trainer, seen = make_trainer(tmp_path / "run", async_save=True, **QUICK), []
    trainer.callbacks.append(lambda trainer, values: seen.append(trainer.last_checkpoint))
    at_step(trainer, 6, disk.set)
    trainer.fit()
    assert seen[:5] == [None] * 5
    assert trainer.last_checkpoint == list_checkpoints(tmp_path / "run")[-1]
    disk.set()
    make_trainer(tmp_path / "sync", **QUICK).fit()
    # What is written is of the step it is named after, whatever came while it was written.
    for one, other in zip(
        *map(list_checkpoints, (tmp_path / "run", tmp_path / "sync")), strict=True
    ):
        assert one.name == other.name
        assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
        for path in one.glob("*.safetensors"):
            mine = safetensors.torch.load_file(path)
            theirs = safetensors.torch.load_file(other / path.name)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine), path
    assert read_lines(tmp_path / "run") == read_lines(tmp_path / "sync")


@pytest.mark.seconds
def test_a_full_disk_ends_the_run_after_a_step(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, async_save=True, **{**QUICK, "steps": 1000})
    fill(monkeypatch, 6)
    path = tmp_path / "checkpoints" / "step_00000003"
    with pytest.raises(OSError, match=f"checkpoint not saved: .*No space.*; the last .*{path}$"):
        trainer.fit()
    assert trainer.step < 1000 and list_checkpoints(tmp_path) == [path]
    resumed = resume_trainer(tmp_path, steps=5)
    assert resumed.step == 3 and resumed.config.async_save
    assert resumed.fit() == 5


@pytest.mark.seconds
def test_an_error_waits_for_what_is_written(tmp_path, disk):
    trainer = make_trainer(tmp_path, async_save=True, **QUICK)

    def fail():
        threading.Timer(0.2, disk.set).start()
        raise InputError("'a.png' is damaged")

    at_step(trainer, 5, fail)
    with pytest.raises(InputError, match="'a.png' is damaged; step 4 is saved in"):
        trainer.fit()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]
    assert trainer.last_checkpoint == list_checkpoints(tmp_path)[-1]


@pytest.mark.seconds
def test_a_step_is_rescued_after_one_that_could_not_be_saved(tmp_path, monkeypatch):
    write, event = checkpoint.write_files, threading.Event()

    def full_later(folder, *args):
        if "step_00000003" in folder.name:
            assert event.wait(WAIT)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, *args)

    monkeypatch.setattr(checkpoint, "write_files", full_later)
    trainer = make_trainer(tmp_path, async_save=True, **QUICK)

    def fail():
        event.set()
        raise InputError("'a.png' is damaged")

    at_step(trainer, 5, fail)
    with pytest.raises(InputError, match="'a.png' is damaged; step 4 is saved in"):
        trainer.fit()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000004"]
    assert resume_trainer(tmp_path).fit() == QUICK["steps"]


@pytest.mark.seconds
def test_what_has_arrived_is_named_before_the_next_one_begins(tmp_path):
    trainer, said = make_trainer(tmp_path, async_save=True, keep=1, **QUICK), []

    def look():
        trainer.saving._written.result(WAIT)
        said.append(trainer.saving.advice())

    at_step(trainer, 5, look)
    trainer.fit()
    assert said == [f"the last good checkpoint is {tmp_path / 'checkpoints' / 'step_00000003'}"]
