"""An error in mid-run costs nothing: the steps before it are saved, and the resumed run is the one
that would have been, bit for bit."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.data import BatchStream
from fastdiff.errors import InputError, TrainingError
from fastdiff.evaluation.threads import one_thread
from fastdiff.training import Trainer
from training_tools import at_step, make_dataset, make_trainer, read_lines, resume_trainer

FILES = ["model", "ema_0.9", "ema_0.99", "trainer"]
QUICK = {"steps": 12, "save_every": 0, "log_every": 4}


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted")
    make_trainer(run, **QUICK).fit()
    return run


def assert_same_run(run: Path, expected: Path) -> None:
    last = [list_checkpoints(r)[-1] for r in (run, expected)]
    assert last[0].name == last[1].name == "step_00000012"
    for stem in FILES:
        mine, theirs = (safetensors.torch.load_file(p / f"{stem}.safetensors") for p in last)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), stem
    mine, theirs = (json.loads((p / "trainer.json").read_text()) for p in last)
    assert mine == theirs
    assert read_lines(run) == read_lines(expected)


def fail(error: BaseException):
    def failing(*args, **kwargs):
        raise error

    return failing


def failing_once(function, error: BaseException, when):
    """``function``, but for one call for which ``when()`` holds."""
    left = [error]

    def wrapped(*args, **kwargs):
        if left and when():
            raise left.pop()
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("error", "workers"),
    [(InputError("'a.png' is damaged"), 0), (OSError(errno.EIO, "I/O"), 2), (MemoryError(), 0)],
)
def test_a_picture_that_cannot_be_read(tmp_path, uninterrupted, error, workers):
    trainer = make_trainer(tmp_path, **QUICK, workers=workers)
    seventh = BatchStream(trainer.data, 8, seed=0)._order(6)[0]
    gather = trainer.data.gather

    def broken(indices):
        if np.array_equal(indices, seventh):
            raise error
        return gather(indices)

    trainer.data.gather = broken
    with pytest.raises(type(error)) as caught:
        trainer.fit()
    (path,) = list_checkpoints(tmp_path)
    assert path.name == "step_00000006"
    told = str(caught.value) + " ".join(getattr(caught.value, "__notes__", []))
    assert f"is saved in {path}" in told
    resume_trainer(tmp_path, workers=0).fit()
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.seconds
@pytest.mark.parametrize("place", ["timesteps.sample", "_predict", "optimizer.zero_grad"])
def test_an_error_inside_a_step_before_the_update(tmp_path, uninterrupted, place):
    """The random numbers of the step that failed are drawn again."""
    trainer = make_trainer(tmp_path, **QUICK)
    owner, _, name = place.rpartition(".")
    target = getattr(trainer, owner) if owner else trainer
    function = getattr(target, name)
    error = RuntimeError("no memory left on the device")
    setattr(target, name, failing_once(function, error, lambda: trainer.step == 7))
    with pytest.raises(RuntimeError, match="no memory left") as caught:
        trainer.fit()
    assert "step 7 is saved in" in " ".join(caught.value.__notes__)
    assert trainer.fit() == 12  # in the same process too
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.seconds
@pytest.mark.parametrize("place", ["write", "after the line", "nll", "grid", "bar"])
def test_an_error_in_the_report(tmp_path, uninterrupted, place, monkeypatch):
    """The report is made up for: no line is lost, none is there twice."""
    from fastdiff.training import metrics, preview

    settings = {**QUICK}
    error = OSError(errno.ENOSPC, "No space left on device")
    if place == "nll":
        settings |= {"nll_every": 8, "nll_images": 2}
        monkeypatch.setattr(preview, "measure_nll", fail(error))
    if place == "grid":
        settings |= {"sample_every": 8, "sample_count": 2, "sample_steps": 2}
        monkeypatch.setattr("fastdiff.training.reports.save_grid", fail(error))
    trainer = make_trainer(tmp_path, **settings)
    if place in ("write", "after the line"):
        write = metrics.MetricsWriter.write

        def failing(self, step, values):
            if place == "after the line":
                write(self, step, values)
            if step == 8:
                raise error

        monkeypatch.setattr(metrics.MetricsWriter, "write", failing)
    if place == "bar":
        from fastdiff.training.progress import NoBar

        update = failing_once(NoBar.update, error, lambda: trainer.step == 8)
        monkeypatch.setattr(NoBar, "update", update)
    with pytest.raises(OSError, match=r"No space left.*step 8 is saved in .*step_00000008"):
        trainer.fit()
    monkeypatch.undo()
    resume_trainer(tmp_path, nll_every=0, sample_every=0).fit()
    if place == "write":  # the lines of step 4 went nowhere too
        lines = [line["step"] for line in read_lines(tmp_path)]
        assert lines == [8, 12]
        shutil.copy(uninterrupted / "metrics.jsonl", tmp_path / "metrics.jsonl")
    records = list_checkpoints(tmp_path)[-1] / "trainer.json"
    expected = json.loads((list_checkpoints(uninterrupted)[-1] / "trainer.json").read_text())
    found = json.loads(records.read_text())
    found["config"] = expected["config"]  # the intervals are others
    records.write_text(json.dumps(found))
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.seconds
def test_at_the_very_last_report(tmp_path, uninterrupted, monkeypatch):
    from fastdiff.training import metrics

    trainer = make_trainer(tmp_path, **QUICK)
    write = metrics.MetricsWriter.write
    failing = failing_once(write, OSError("full"), lambda: trainer.step == 12)
    monkeypatch.setattr(metrics.MetricsWriter, "write", failing)
    with pytest.raises(OSError, match="full; step 12 is saved"):
        trainer.fit()
    assert resume_trainer(tmp_path).fit() == 12
    assert_same_run(tmp_path, uninterrupted)


def test_what_is_not_good_is_not_saved(tmp_path):
    trainer = make_trainer(tmp_path / "a", **QUICK)
    update = trainer.timesteps.update_with_losses
    trainer.timesteps.update_with_losses = failing_once(
        update, MemoryError(), lambda: trainer.step == 5
    )
    with pytest.raises(MemoryError) as caught:
        trainer.fit()
    assert "step 6 was half done; no checkpoint had been saved yet" in caught.value.__notes__
    assert not list_checkpoints(tmp_path / "a")

    # An error after the weights went bad, before the guard has looked, as on a GPU.
    trainer = make_trainer(tmp_path / "b", **QUICK)
    trainer.check_every = 100

    def spoil() -> None:
        trainer.parameters[3].data.view(-1)[0] = np.nan
        raise InputError("'a.png' is damaged")

    at_step(trainer, 4, spoil)
    with pytest.raises(
        InputError, match=r"'a.png' is damaged; step 3 could not be saved \(the wei"
    ):
        trainer.fit()
    assert not list_checkpoints(tmp_path / "b")


def test_a_save_that_fails_does_not_hide_the_error(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **{**QUICK, "save_every": 2})
    at_step(trainer, 4, fail(InputError("'a.png' is damaged")))
    write = checkpoint.write_files
    full = failing_once(write, OSError("disk full"), lambda: trainer.step == 3)
    monkeypatch.setattr(checkpoint, "write_files", full)
    path = tmp_path / "checkpoints" / "step_00000002"
    with pytest.raises(InputError) as caught:
        trainer.fit()
    assert str(caught.value) == (
        "'a.png' is damaged; step 3 could not be saved (disk full); "
        f"the last good checkpoint is {path}"
    )


def test_a_diverged_run_says_only_that(tmp_path):
    trainer = make_trainer(tmp_path, **QUICK)
    at_step(trainer, 4, fail(TrainingError("the loss is not finite")))
    with pytest.raises(TrainingError, match="^the loss is not finite$"):
        trainer.fit()
    assert not list_checkpoints(tmp_path)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    trainer = make_trainer(tmp_path, **QUICK)
    at_step(trainer, 1, fail(InputError("'a.png' is damaged")))
    with pytest.raises(InputError, match="damaged; no step had been finished"):
        trainer.fit()
    assert not list_checkpoints(tmp_path)


# Other images


@pytest.mark.seconds
def test_a_changed_data_set_says_how_to_go_on(tmp_path):
    make_trainer(tmp_path, steps=2).fit()
    with pytest.raises(InputError, match=r"has 23 images, .* on 24: .*--data-changed"):
        Trainer.resume(tmp_path, make_dataset(23), progress=False)
    options = {"device": "cpu", "progress": False}
    changes = {"steps": 5}
    trainer = Trainer.resume(
        tmp_path, make_dataset(23), changes=changes, data_changed=True, **options
    )
    assert trainer.stream.position == 0  # the order of the new images begins
    at_step(trainer, 5, fail(InputError("cut")))
    with pytest.raises(InputError, match="cut"):
        trainer.fit()
    loaded = checkpoint.load(list_checkpoints(tmp_path)[-1])
    assert loaded.info["data_changes"] == [{"step": 2, "images": 23, "before": 24}]
    # From here on these are the run's images.
    with pytest.raises(InputError, match=r"has 24 images, .* on 23"):
        Trainer.resume(tmp_path, make_dataset(), progress=False)
    resumed = Trainer.resume(tmp_path, make_dataset(23), **options)
    assert resumed.stream.position == 2
    assert resumed.fit() == 5


@pytest.mark.seconds
def test_a_run_of_an_older_version_keeps_its_constant_rates(tmp_path):
    make_trainer(tmp_path, steps=2, ema_warmup=False).fit()
    path = list_checkpoints(tmp_path)[-1]
    record = json.loads((path / "trainer.json").read_text())
    del record["config"]["ema_warmup"], record["reported"]
    (path / "trainer.json").write_text(json.dumps(record))
    config = json.loads((path / "config.json").read_text())
    del config["averages"]
    (path / "config.json").write_text(json.dumps(config))
    trainer = resume_trainer(tmp_path, steps=3)
    assert trainer.config.ema_warmup is False and trainer.ema.warmup is False
    before = {n: t.clone() for n, t in trainer.ema.state_dict(0.9).items()}
    trainer.fit()
    for (name, average), parameter in zip(
        trainer.ema.state_dict(0.9).items(), trainer.parameters, strict=True
    ):
        expected = 0.9 * before[name] + 0.1 * parameter.detach()
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="ema_warmup is True but .* cannot change"):
        resume_trainer(tmp_path, ema_warmup=True)
