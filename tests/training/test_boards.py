"""Weights & Biases, offline: what a run logs there, and that a resumed run is the same one."""

import pytest

from fastdiff.errors import InputError
from fastdiff.training import boards
from training_tools import make_trainer, read_lines, resume_trainer, without_clock

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.seconds
def test_what_a_run_logs(tmp_path, monkeypatch):
    opened, logged = [], []

    class Listening(boards.WeightsAndBiases):
        def __init__(self, *args):
            super().__init__(*args)
            opened.append(self.run)

        def write(self, step, values):
            super().write(step, values)
            logged.append({"step": step, **values})

    monkeypatch.setattr(boards, "WeightsAndBiases", Listening)
    settings = {"wandb": "digits", "log_every": 1, "sample_every": 2, "sample_count": 2}
    run = tmp_path / "run"
    make_trainer(run, **settings, sample_steps=2, steps=2).fit()
    resume_trainer(run, steps=3).fit()
    assert [one.project for one in opened] == ["digits"] * 2 and opened[0].name == "run"
    assert opened[0].id == opened[1].id
    assert [without_clock(line) for line in logged] == read_lines(run)
    folders = list((run / "wandb").glob("offline-run-*"))
    assert folders and all(list(folder.glob("*.wandb")) for folder in folders)
    assert list((run / "wandb").rglob("*.png"))


def test_what_it_refuses_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot log to the project 'a/b': .*'/'"):
        make_trainer(tmp_path, wandb="a/b", steps=1).fit()


def test_without_the_package_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'fastdiff\[wandb\]'"):
        make_trainer(tmp_path, wandb="digits", steps=1).fit()
