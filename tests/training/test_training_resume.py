"""Stop-and-resume gives bit for bit what an uninterrupted run gives, however it was stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import training_tools
from fastdiff.checkpoints.parts import write_parts
from fastdiff.checkpoints.run_directory import held, list_checkpoints
from fastdiff.errors import InputError
from fastdiff.evaluation.threads import one_thread
from fastdiff.ranks import ALONE
from fastdiff.training import Trainer, saved
from fastdiff.training.metrics import truncate_metrics
from training_tools import at_step, make_dataset, make_trainer, read_lines, resume_trainer

FILES = ["model", "ema_0.9", "ema_0.99", "trainer"]


@pytest.fixture(autouse=True)
def single_thread():
    """Sums are split by threads: the processes compared must have equally many."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted")
    with one_thread():
        make_trainer(run).fit()
    return run


def assert_same_run(run: Path, expected: Path) -> None:
    last = list_checkpoints(expected)[-1].name
    assert list_checkpoints(run)[-1].name == last == "step_00000025"
    for stem in FILES:
        mine, theirs = (
            safetensors.torch.load_file(r / "checkpoints" / last / f"{stem}.safetensors")
            for r in (run, expected)
        )
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(mine[name], value), f"{stem}: {name}"
    records = [
        json.loads((r / "checkpoints" / last / "trainer.json").read_text()) for r in (run, expected)
    ]
    assert records[0] == records[1]
    assert read_lines(run) == read_lines(expected)


def run_until_killed(
    run: Path, event: str, pattern: str, count: int = 1, settings: dict | None = None
) -> None:
    arguments = [run, json.dumps(settings or {}), event, pattern, str(count)]
    done = subprocess.run(
        [sys.executable, training_tools.__file__, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.seconds
def test_the_compared_state_is_complete(uninterrupted):
    tensors = safetensors.torch.load_file(
        uninterrupted / "checkpoints/step_00000025/trainer.safetensors"
    )
    assert {name.split(".")[0] for name in tensors} == {"optimizer", "timesteps", "meter"}
    # Had these stayed as they began, comparing them would show nothing.
    assert tensors["timesteps.counts"].min() >= 10  # so timesteps are drawn by their losses
    moments = [t for name, t in tensors.items() if name.endswith(".exp_avg")]
    assert len(moments) > 10 and all(moment.any() for moment in moments)
    assert [line["step"] for line in read_lines(uninterrupted)] == [4, 8, 12, 16, 20, 24, 25]


@pytest.mark.seconds
def test_killed_in_mid_run(tmp_path, uninterrupted):
    run_until_killed(tmp_path, "step", "#19#")
    assert [line["step"] for line in read_lines(tmp_path)] == [4, 8, 12, 16]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010"]
    resume_trainer(tmp_path).fit()
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.seconds
@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("event", "pattern", "count"),
    [
        ("os.mkdir", r"step_00000020\.saving", 1),  # nothing is written yet
        ("open", r"step_00000020\.saving", 3),  # some files are there, others are missing
        ("os.rename", r"step_00000020\.saving", 1),  # all files are there under the wrong name
    ],
)
def test_killed_while_a_checkpoint_is_written(tmp_path, uninterrupted, event, pattern, count):
    run_until_killed(tmp_path, event, pattern, count)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010"]
    resume_trainer(tmp_path).fit()
    assert_same_run(tmp_path, uninterrupted)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")]


@pytest.mark.seconds
def test_killed_while_an_old_checkpoint_is_deleted(tmp_path, uninterrupted):
    # With keep=1, step 10 goes when step 20 is complete; the second of its files never does.
    run_until_killed(tmp_path, "os.remove", r"safetensors|json", 2, {"keep": 1})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000020"]
    resume_trainer(tmp_path, keep=3).fit()
    assert_same_run(tmp_path, uninterrupted)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_00000020", "step_00000025"]


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_stopped_by_a_signal(tmp_path, uninterrupted, number, raised):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    trainer = make_trainer(tmp_path)
    at_step(trainer, 7, lambda: os.kill(os.getpid(), number))
    with pytest.raises(raised) as caught:
        trainer.fit()
    if raised is SystemExit:
        assert caught.value.code == 128 + signal.SIGTERM
    assert trainer.step == 7  # the step it came in was finished
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000007"]
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    resume_trainer(tmp_path).fit()
    assert_same_run(tmp_path, uninterrupted)


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    trainer = make_trainer(tmp_path)
    at_step(trainer, 7, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == 6 and not list_checkpoints(tmp_path)


@pytest.mark.seconds
def test_stopped_by_the_clock(tmp_path, uninterrupted, monkeypatch):
    from fastdiff.training import stop

    trainer = make_trainer(tmp_path, max_minutes=5)
    now = stop.time.monotonic()
    at_step(trainer, 5, lambda: monkeypatch.setattr(stop.time, "monotonic", lambda: now + 301))
    assert trainer.fit() == 5
    monkeypatch.undo()
    resume_trainer(tmp_path, max_minutes=0.0).fit()
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.seconds
def test_previews_do_not_disturb_the_run(tmp_path, uninterrupted):
    settings = {"sample_every": 5, "sample_count": 4, "nll_every": 5, "nll_images": 3}
    make_trainer(tmp_path, **settings, sample_steps=3).fit()
    for stem in FILES[:3]:
        mine, theirs = (
            safetensors.torch.load_file(r / f"checkpoints/step_00000025/{stem}.safetensors")
            for r in (tmp_path, uninterrupted)
        )
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.seconds
def test_another_seed_gives_another_run(tmp_path, uninterrupted):
    make_trainer(tmp_path, seed=1).fit()
    assert read_lines(tmp_path)[-1]["loss"] != read_lines(uninterrupted)[-1]["loss"]


@pytest.mark.seconds
def test_resuming_a_finished_run_changes_nothing(tmp_path):
    make_trainer(tmp_path, steps=5).fit()
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*.safetensors")}
    assert resume_trainer(tmp_path).fit() == 5
    assert before == {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*.safetensors")}
    assert resume_trainer(tmp_path, steps=6).fit() == 6


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 4},
        {"seed": 3},
        {"ema": (0.9,)},
        {"flip": False},
        {"timestep_sampler": "uniform"},
    ],
)
def test_what_decides_the_batches_cannot_change(tmp_path, change):
    make_trainer(tmp_path, steps=1).fit()
    with pytest.raises(InputError, match=f"{next(iter(change))} .* cannot change"):
        resume_trainer(tmp_path, **change)


@pytest.mark.seconds
def test_other_settings_can_change(tmp_path):
    make_trainer(tmp_path, steps=1).fit()
    trainer = resume_trainer(tmp_path, steps=2, lr=5e-4, microbatch=4)
    trainer.fit()
    assert trainer.optimizer.param_groups[0]["lr"] != 0
    assert trainer.config.lr == 5e-4 and trainer.config.microbatch == 4


def test_lines_past_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4}\n{"step": 8}\n{"step": 12}\n{"step": 1')
    truncate_metrics(path, 8)
    assert path.read_text() == '{"step": 4}\n{"step": 8}\n'
    path.write_text('{"step": 4}\nrubbish\n{"step": 8}\n')
    with pytest.raises(InputError, match="metrics.jsonl, line 2"):
        truncate_metrics(path, 8)


@pytest.mark.seconds
def test_tensorboard_shows_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"tensorboard": True, "log_every": 2, "save_every": 4, "steps": 11, "keep": 0}
    make_trainer(tmp_path, **settings).fit()
    for path in list_checkpoints(tmp_path)[1:]:
        shutil.rmtree(path)  # as if it had been killed at step 11, before the second save
    resume_trainer(tmp_path).fit()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8, 10, 11]


@pytest.fixture
def in_parts(tmp_path):
    """A run of one step with the optimizer in a folder, as a sharded one leaves it."""
    trainer = make_trainer(tmp_path / "run", steps=1)
    trainer.fit()
    write_parts(trainer.last_checkpoint / "optimizer", trainer.update.tensors(), ALONE)
    return trainer.last_checkpoint


@pytest.mark.seconds
def test_parts_are_read_while_nobody_may_delete_them(in_parts, monkeypatch):
    run, read = in_parts.parents[1], saved.read_parts

    def read_parts(*args):
        with pytest.raises(InputError, match="another process trains into"), held(run):
            pass
        return read(*args)

    monkeypatch.setattr(saved, "read_parts", read_parts)
    resumed = resume_trainer(run)
    expected = safetensors.torch.load_file(in_parts / "trainer.safetensors")
    tensors = resumed.update.tensors()
    assert len(tensors) > 20
    assert all(torch.equal(expected[f"optimizer.{name}"], value) for name, value in tensors.items())
    with held(run):
        pass


@pytest.mark.seconds
def test_a_checkpoint_that_is_gone_once_it_was_read(in_parts):
    run = in_parts.parents[1]
    read = Trainer.read_run(run)
    shutil.rmtree(in_parts)
    with pytest.raises(InputError, match="step_00000001 is no longer there: .* resume again"):
        Trainer.from_saved(read, make_dataset(), run, device="cpu", progress=False)
