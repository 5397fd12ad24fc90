"""Any data through a Trainer: resumed bit for bit, stopped by signals, errors in one line."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.data import Items
from fastdiff.errors import InputError
from fastdiff.evaluation.threads import one_thread
from fastdiff.training import TrainConfig, Trainer
from paths import TOOLS
from training_tools import (
    SETTINGS,
    at_step,
    make_dataset,
    make_diffusion,
    make_model,
    make_trainer,
    read_lines,
)

CHANGES = {"steps": 13, "save_every": 5, "log_every": 4, "label_dropout": 0.0}
X = np.random.default_rng(0).uniform(-1, 1, (27, 1, 8, 8))  # float64, as NumPy draws


@pytest.fixture(autouse=True)
def single_thread():
    with one_thread():
        yield


class Pictures(Dataset):
    """(x, label), x in part random."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index] + np.random.rand() * random.random() + torch.rand(()).item(), index % 3


class Stream(IterableDataset):
    """The same in an order of each epoch's own; at item ``until``, ``last()`` instead."""

    def __init__(self, until=None, last=None):
        self.until, self.last = until, last

    def __iter__(self):
        for number, index in enumerate(random.sample(range(len(X)), len(X))):
            if number == self.until:
                yield self.last()
            yield Pictures()[index]


def stateful(seed=0):
    """One of another ``seed`` has another order, but for what a checkpoint tells it."""
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    torch.manual_seed(seed)
    return loaders.StatefulDataLoader(Pictures(), 8, shuffle=True)


KINDS = {
    "workers": (make_dataset, 2),
    "items": (Pictures, 0),
    "items in workers": (lambda: Items(Pictures(), random_flip=True), 1),
    "iterable": (Stream, 0),
    "iterable in a worker": (Stream, 1),
    "loader": (lambda: DataLoader(Pictures(), 8, shuffle=True), 0),
    "stateful": (stateful, 0),
}


def trainer_on(data, run, **changes):
    config = TrainConfig(**{**SETTINGS, **CHANGES, **changes})
    return Trainer(make_model(), make_diffusion(), data, config, run, device="cpu", progress=False)


def resume_on(data, run, **changes):
    return Trainer.resume(run, data, changes=changes, device="cpu", progress=False)


def assert_same_run(run, expected):
    for stem in ("model", "ema_0.99", "trainer"):
        mine, theirs = (
            safetensors.torch.load_file(r / f"checkpoints/step_00000013/{stem}.safetensors")
            for r in (run, expected)
        )
        for name, value in theirs.items():  # the reader's words are torchdata's to choose
            assert name.startswith("reader.") or torch.equal(mine[name], value), name
    assert read_lines(run) == read_lines(expected)


@pytest.mark.seconds
@pytest.mark.sample(5)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_as_if_it_had_never_stopped(tmp_path, kind):
    make, workers = KINDS[kind]
    trainer_on(make(), tmp_path / "whole", workers=workers).fit()

    def cut():
        raise ValueError("cut")

    trainer = trainer_on(make(), tmp_path / "cut", workers=workers)
    at_step(trainer, 8, cut)
    with pytest.raises(ValueError, match="cut"):
        trainer.fit()
    assert [p.name for p in list_checkpoints(tmp_path / "cut")] == [
        "step_00000005",
        "step_00000007",
    ]
    shutil.copytree(tmp_path / "cut", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/checkpoints/step_00000007")  # as if nothing could be rescued
    for name in ("cut", "killed"):
        data = stateful(seed=1) if kind == "stateful" else make()
        resume_on(data, tmp_path / name, workers=workers).fit()
        assert_same_run(tmp_path / name, tmp_path / "whole")


@pytest.mark.seconds
def test_workers_change_nothing_in_a_run(tmp_path):
    trainer_on(Pictures(), tmp_path / "0").fit()
    trainer_on(Pictures(), tmp_path / "2", workers=2).fit()
    assert_same_run(tmp_path / "2", tmp_path / "0")


@pytest.mark.seconds
def test_a_step_that_fails_after_its_batch_was_drawn(tmp_path):
    trainer_on(stateful(), tmp_path / "whole").fit()
    trainer = trainer_on(stateful(), tmp_path / "cut")
    predict = trainer._predict

    def failing(*args, **kwargs):
        if trainer.step == 8:
            raise ValueError("cut")
        return predict(*args, **kwargs)

    trainer._predict = failing
    with pytest.raises(ValueError, match="cut"):
        trainer.fit()
    assert list_checkpoints(tmp_path / "cut")[-1].name == "step_00000008"
    resume_on(stateful(seed=1), tmp_path / "cut").fit()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


class Unsendable:
    """A state that no checkpoint takes."""


class Odd(DataLoader):
    def state_dict(self):
        return {"state": Unsendable()}

    def load_state_dict(self, state):
        assert state == {}


@pytest.mark.seconds
def test_a_state_that_cannot_be_saved_is_said(tmp_path):
    constant = {"lr_schedule": "constant"}
    trainer_on(Odd(Pictures(), 8), tmp_path / "whole", **constant).fit()
    with pytest.warns(RuntimeWarning, match="state_dict holds more than .*read the data from the"):
        trainer_on(Odd(Pictures(), 8), tmp_path / "cut", steps=7, **constant).fit()
    resume_on(Odd(Pictures(), 8), tmp_path / "cut", steps=13).fit()  # by reading on
    path = "checkpoints/step_00000013/model.safetensors"
    mine, whole = (safetensors.torch.load_file(tmp_path / r / path) for r in ("cut", "whole"))
    assert all(torch.equal(mine[name], value) for name, value in whole.items())


def broken():
    raise KeyError("shard 3")


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("data", "workers", "message"),
    [
        (Stream(20, lambda: (X[0, :, :4], 0)), 1, r"x of item \d+ is \(1, 4, 8\)"),
        (Stream(24, broken), 1, "from item 24 of the data on cannot be read: KeyError: 'shard 3'"),
        (iter([(x, 0) for x in X]), 0, "ended before a batch of 8 in epoch 1: an iterator"),
        (
            [(x[None], 0) for x in [*np.zeros((24, 8, 8)), *np.zeros((8, 4, 4))]],
            0,
            r"x of item \d+ is \(1, [48], [48]\)",
        ),
        (
            iter([(x, 0) for x in [*X[:24], *np.zeros((8, 1, 4, 4))]]),
            0,
            r"x of a batch is \(8, 1, 4, 4\) .*, it was \(8, 1, 8, 8\) .* before",
        ),
    ],
)
def test_data_that_go_wrong_in_mid_run(tmp_path, data, workers, message):
    trainer = trainer_on(data, tmp_path, workers=workers, log_every=1, save_every=1, steps=40)
    with pytest.raises(InputError, match=message) as caught:
        trainer.fit()
    if trainer.step:
        path = list_checkpoints(tmp_path)[-1]
        assert path.name == f"step_{trainer.step:08d}"
        assert f"{path}: resume the run once that is mended" in str(caught.value)
    assert "\n" not in str(caught.value)


class Recorder(nn.Module):
    """Remembers what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.config, self.given = {}, None

    def forward(self, x, t, y=None, low_res=None):
        self.given = x, y, low_res
        return self.weight * x


def one_step(data, tmp_path, model=None):
    model = model or Recorder()
    config = TrainConfig(
        batch_size=4, steps=1, tensorboard=False, ema=(), timestep_sampler="uniform"
    )
    diffusion = make_diffusion(learn_sigma=False)
    trainer = Trainer(model, diffusion, data, config, tmp_path, device="cpu", progress=False)
    trainer.feed.seed(trainer.step)
    return (*trainer.feed.next_batch(trainer.step), trainer)


def test_what_the_network_is_given(tmp_path):
    deep = np.array([0, 65535], np.uint16).reshape(1, 1, 2)
    shallow = np.array([0, 255], np.uint8).reshape(1, 1, 2)
    expected = torch.tensor([[[-1.0, 1.0]]])
    item = {"x": deep, "label": np.uint8(3), "low_res": shallow, "scale": np.float64(0.5)}
    x, kwargs, _ = one_step([item] * 4, tmp_path)
    assert x.dtype == torch.float32 and torch.equal(x[0], expected)
    assert kwargs["y"].dtype == torch.int64 and kwargs["y"].tolist() == [3] * 4
    assert torch.equal(kwargs["low_res"][0], expected)
    assert kwargs["scale"].dtype == torch.float32
    x, kwargs, _ = one_step([X[0]] * 4, tmp_path)
    assert x.dtype == torch.float32 and kwargs == {}


@pytest.mark.parametrize(("scale", "name"), [(1, r"\[0, 1\]"), (255, r"\[0, 255\]")])
def test_floats_that_look_unscaled_are_said_once(tmp_path, scale, name):
    data = [np.abs(x) * scale for x in X]
    with pytest.warns(RuntimeWarning, match=f"floats in {name} and trained on as it is") as caught:
        *_, trainer = one_step(data, tmp_path)
        trainer.feed.next_batch(trainer.step)
    assert len([w for w in caught if "floats in" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(list(X), tmp_path)
        one_step([np.zeros((1, 8, 8))] * 4, tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((8, 6, 6, 3), np.uint8), r"\(4, 6, 6, 3\), channels last; expected \(n, C, H, W"),
        (np.zeros((8, 3, 6, 6), np.int64), "x of a batch is torch.int64 .*; expected uint8"),
        (np.zeros(8, np.float32), r"has shape \(4,\); expected \(n, C"),
        ("photos", "'photos' is a name: fastdiff.data.load_dataset reads it"),
        (3, "cannot train on a int"),
    ],
)
def test_data_that_cannot_be_trained_on(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        one_step(data, tmp_path)


# --- Processes --------------------------------------------------------------------------------

SCRIPT = """
import multiprocessing, sys
import training_tools as tools
trainer = tools.make_trainer(sys.argv[1], workers=2, steps=100000, save_every=0)
workers = multiprocessing.active_children
tools.at_step(trainer, 4, lambda: print(*[worker.pid for worker in workers()], flush=True))
trainer.fit()
"""


@pytest.fixture
def started(tmp_path):
    """A run with two workers, in a process group of its own, that has begun."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(TOOLS), environment.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path],
        env=environment | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        process.workers = [int(number) for number in process.stdout.readline().split()]
        assert len(process.workers) == 2, process.stderr.read()
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.seconds
@pytest.mark.sample(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_and_stops(tmp_path, started, number):
    os.killpg(started.pid, number)
    _, errors = started.communicate(timeout=60)  # the workers hold the pipes too
    assert started.returncode in (-number, 128 + number), errors
    assert "DataLoader worker" not in errors
    (path,) = list_checkpoints(tmp_path)
    assert int(path.name.removeprefix("step_")) >= 3


@pytest.mark.seconds
def test_workers_end_with_a_run_that_is_killed(started):
    started.kill()
    started.communicate(timeout=60)  # until no process has the pipes open


@pytest.mark.seconds
def test_a_worker_that_is_killed_costs_no_steps(tmp_path, started):
    os.kill(started.workers[0], signal.SIGKILL)  # as a machine does whose memory is full
    _, errors = started.communicate(timeout=60)
    last = errors.splitlines()[-1]
    (path,) = list_checkpoints(tmp_path)
    assert last.startswith("OSError: ") and f"is saved in {path}" in last, errors


@pytest.mark.seconds
def test_a_worker_that_dies_during_an_update_costs_no_step(tmp_path):
    trainer = make_trainer(tmp_path, workers=2, steps=100_000, save_every=0)
    update = trainer.update.step

    def outlived(number, *how):
        if number == 3:
            worker = multiprocessing.active_children()[0]
            os.kill(worker.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        update(number, *how)

    trainer.update.step = outlived
    with pytest.raises(OSError, match=r"step 4 is saved in .*step_00000004"):
        trainer.fit()
    assert trainer.step == 4
