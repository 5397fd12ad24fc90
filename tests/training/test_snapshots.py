"""Power-function averages of a run: tracked, stored, resumed, and any width made of the stored."""

import errno
import json
import os
import shutil

import pytest
import safetensors.torch
import torch

from fastdiff import cli
from fastdiff.checkpoints import snapshots
from fastdiff.checkpoints.checkpoint import load
from fastdiff.checkpoints.run_directory import identify, list_checkpoints
from fastdiff.checkpoints.snapshots import reconstruct
from fastdiff.errors import InputError
from fastdiff.training import TrainConfig
from training_tools import make_trainer, resume_trainer

WIDTHS = (0.05, 0.1)
POWERS = {"ema": (0.9,), "ema_sigma_rel": WIDTHS, "ema_snapshot_every": 3}
STEPS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the folder, its trainer, the weights after each step)."""
    folder = tmp_path_factory.mktemp("snapshots") / "run"
    # 0.2 is tracked to compare with alone.
    settings = POWERS | {"ema_sigma_rel": (*WIDTHS, 0.2)}
    trainer = make_trainer(folder, steps=STEPS, **settings)
    history, update = [], trainer.ema.update

    def remembered() -> None:
        update()
        history.append([p.detach().double().clone() for p in trainer.parameters])

    trainer.ema.update = remembered
    trainer.fit()
    return folder, trainer, history


def files(folder) -> dict[str, bytes]:
    found = (folder / "averages").rglob("*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_run_stores_them_at_intervals(run):
    folder, trainer, history = run
    steps = sorted(path.name for path in (folder / "averages").iterdir())
    assert steps == [f"step_{step:08d}" for step in range(3, STEPS + 1, 3)]  # more than ``keep``
    names = {path.name for path in (folder / "averages" / steps[-1]).iterdir()}
    assert names == {f"power-{width}.safetensors" for width in (*WIDTHS, 0.2)}
    stored = safetensors.torch.load_file(folder / "averages" / steps[-1] / "power-0.05.safetensors")
    averages = trainer.ema.state_dict("power-0.05")
    assert all(torch.equal(stored[name], average) for name, average in averages.items())
    # The recurrence with the paper's beta, in float64.
    gamma = 16.97
    expected = [w.clone() for w in history[0]]
    for step, weights in enumerate(history[1:], start=2):
        beta = (1 - 1 / step) ** (gamma + 1)
        expected = [beta * e + (1 - beta) * w for e, w in zip(expected, weights, strict=True)]
    for mine, theirs in zip(averages.values(), expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


def test_checkpoints_have_them_beside_the_rates(run):
    loaded = load(run[0], weights="power-0.10")
    assert loaded.ema_rates == ["0.9", "power-0.05", "power-0.1", "power-0.2"]
    assert loaded.weights == "power-0.1"
    # The slowest: 0.9 is still warming up, to a width of 0.09.
    assert load(run[0]).weights == run[1].ema.best_suited == "power-0.2"
    average = run[1].ema.state_dict("power-0.1")
    assert all(torch.equal(w, average[name]) for name, w in loaded.model.named_parameters())


@pytest.mark.parametrize("step", [None, 18])
@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_a_stored_width_is_given_back_bit_for_bit(run, step, sigma_rel):
    made = reconstruct(run[0], sigma_rel, step)
    folder = run[0] / "averages" / f"step_{step or STEPS:08d}"
    stored = safetensors.torch.load_file(folder / f"power-{sigma_rel}.safetensors")
    state = made.checkpoint.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    assert (made.snapshots, made.checkpoint.step) == (1, step or STEPS) and made.off < 1e-7


def test_a_width_that_was_not_stored(run, tmp_path):
    """Against the one that was tracked: six times nearer to it than the nearest stored one."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    for path in folder.glob("averages/*/power-0.2.safetensors"):
        path.unlink()
    made = reconstruct(folder, 0.2)
    assert made.snapshots == 2 * STEPS // 3 and 0 < made.off < 0.1
    tracked = dict(run[1].ema.state_dict("power-0.2"))
    nearest = run[1].ema.state_dict("power-0.1")

    def apart(state) -> float:
        return float(sum((state[n] - w).square().sum() for n, w in tracked.items())) ** 0.5

    found = dict(made.checkpoint.model.named_parameters())
    assert apart({n: found[n].detach() for n in tracked}) < apart(nearest) / 6


def test_what_is_no_parameter_is_the_step_s(run):
    made = reconstruct(run[0], 0.07)
    buffers = dict(made.checkpoint.model.named_buffers())
    newest = dict(load(run[0], weights="model").model.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in newest.items())


# Resuming


@pytest.mark.seconds
def test_resumed_bit_for_bit(run, tmp_path):
    folder = tmp_path / "run"
    settings = POWERS | {"ema_sigma_rel": (*WIDTHS, 0.2)}
    trainer = make_trainer(folder, steps=STEPS, **settings)
    take = trainer._train_step

    def failing() -> None:
        if trainer.step == 16:
            raise KeyboardInterrupt
        take()

    trainer._train_step = failing
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    resumed = resume_trainer(folder)
    assert resumed.step == 16
    resumed.fit()
    assert files(folder) == files(run[0])
    for stem in ("ema_power-0.05", "ema_power-0.2", "model"):
        mine, theirs = (list_checkpoints(f)[-1] / f"{stem}.safetensors" for f in (folder, run[0]))
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.seconds
def test_a_snapshot_that_failed_is_made_up_for(tmp_path, monkeypatch):
    write = snapshots.write_directory

    def full(target, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshots, "write_directory", full)
    with pytest.raises(OSError, match="No space left.*; step 3 is saved in .*: resume the run"):
        make_trainer(tmp_path / "run", steps=4, **POWERS).fit()
    assert not (tmp_path / "run" / "averages").exists()
    monkeypatch.setattr(snapshots, "write_directory", write)
    resume_trainer(tmp_path / "run").fit()
    assert [p.name for p in (tmp_path / "run" / "averages").iterdir()] == ["step_00000003"]


def test_snapshots_after_the_newest_checkpoint_do_not_count(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    shutil.rmtree(list_checkpoints(folder)[-1])
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000010", "step_00000020"]
    assert reconstruct(folder, 0.07).checkpoint.step == 18


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ema_sigma_rel": (0.3,)}, "expected widths between 0 and 0.288"),
        ({"ema_sigma_rel": (0.1, 0.1)}, "expected widths that differ"),
        ({"ema_snapshot_every": 5}, "expected 0 where ema_sigma_rel is none"),
        ({"ema_snapshot_every": -1, "ema_sigma_rel": (0.1,)}, "expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense(changes, words):
    with pytest.raises(InputError, match=words):
        TrainConfig(**changes)


def test_widths_stay_and_intervals_may_change(run):
    config = run[1].config
    with pytest.raises(InputError, match="ema_sigma_rel is .* cannot change when a run is resumed"):
        config.resumed_with({"ema_sigma_rel": (0.05,)})
    assert config.resumed_with({"ema_snapshot_every": 6}).ema_snapshot_every == 6
    older = {k: v for k, v in config.to_dict().items() if not k.startswith(("ema_s",))}
    assert TrainConfig.from_dict(older).ema_sigma_rel == ()


def test_what_cannot_be_made(run, tmp_path):
    with pytest.raises(InputError, match="has no snapshots of step 17; there are 8 from step 3 to"):
        reconstruct(run[0], 0.07, 17)
    with pytest.raises(InputError, match="sigma_rel is 0.5, expected a number between 0 and 0.288"):
        reconstruct(run[0], 0.5)
    with pytest.raises(InputError, match="holds no checkpoint"):
        reconstruct(tmp_path, 0.07)
    make_trainer(tmp_path / "plain", steps=1).fit()
    with pytest.raises(InputError, match="no snapshots .*: train with --ema-sigma-rel"):
        reconstruct(tmp_path / "plain", 0.07)


def test_a_damaged_snapshot_is_named(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    file = folder / "averages" / "step_00000006" / "power-0.1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="step_00000006/power-0.1.safetensors is damaged"):
        reconstruct(folder, 0.07)


def test_a_run_of_snapshots_alone_shows_what_it_is(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / "config.json").unlink()
    assert identify(folder).kind == "run"


# The command


def test_the_command_writes_a_checkpoint(run, tmp_path, capsys):
    out = tmp_path / "average"
    asked = ["average", "--run", str(run[0]), "--sigma-rel", "0.15", "--out", str(out)]
    assert cli.main(asked) == 0
    printed = capsys.readouterr().out
    assert "power-0.15 of step 24, of 24 snapshots: its profile is off by " in printed
    assert str(out) in printed and "warning" not in printed
    loaded = load(out)
    assert loaded.weights == "model" and loaded.step == STEPS and loaded.diffusion is not None
    facts = loaded.info["average"]
    assert facts["sigma_rel"] == 0.15 and facts["snapshots"] == 24 and facts["off"] < 0.05
    expected = reconstruct(run[0], 0.15).checkpoint.model.state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in loaded.model.state_dict().items())

    assert cli.main(asked) == 2
    assert "is not empty: choose another directory" in capsys.readouterr().err
    narrow = ["average", "--run", str(run[0]), "--sigma-rel", "0.01", "--out", str(tmp_path / "n")]
    assert cli.main(narrow) == 0
    assert "warning: that is another average than was asked for" in capsys.readouterr().out


@pytest.mark.seconds
def test_sample_says_which_average(run, tmp_path, capsys):
    for step, sigma_rel in (("18", "0.1"), ("24", "0.2")):
        out = tmp_path / f"average{step}"
        flags = ["--run", str(run[0]), "--step", step, "--sigma-rel", sigma_rel, "--out", str(out)]
        assert cli.main(["average", *flags]) == 0
        capsys.readouterr()
        options = "--num 2 --steps 2 --device cpu --no-pngs --out".split()
        images = str(tmp_path / f"images{step}")
        assert cli.main(["sample", "--checkpoint", str(out), *options, images]) == 0
        assert f"{out}: EMA power-{sigma_rel} of step {step}, on cpu" in capsys.readouterr().out
        assert json.loads((out / "config.json").read_text())["ema"] == []
