"""What goes wrong in a run is said in one line, and costs nothing that was saved."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.errors import InputError, TrainingError
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.training import TrainConfig, Trainer
from fastdiff.training.guard import FiniteGuard
from paths import TOOLS
from small_disk import small_disk
from training_tools import (
    SETTINGS,
    make_dataset,
    make_diffusion,
    make_model,
    make_trainer,
    resume_trainer,
)


def spoil_loss(trainer: Trainer, number: int, value: float) -> None:
    """The loss of step ``number`` becomes ``value``."""
    compute = trainer.diffusion.training_losses

    def spoiled(*args, **kwargs):
        losses = compute(*args, **kwargs)
        if trainer.step + 1 == number:
            losses["loss"] = losses["loss"] * value
        return losses

    trainer.diffusion.training_losses = spoiled  # type: ignore[method-assign]


def snapshot(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}


def assert_finite(run: Path) -> None:
    for path in (run / "checkpoints").rglob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(path).items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), (path, name)


@pytest.mark.seconds
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, value):
    trainer = make_trainer(tmp_path)
    spoil_loss(trainer, 13, value)
    with pytest.raises(TrainingError, match=r"not finite at step 13; .*step_00000010$"):
        trainer.fit()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010"]
    assert_finite(tmp_path)
    # Found before the update: what is in memory is good too.
    assert trainer.step == 12 and all(p.isfinite().all() for p in trainer.parameters)
    assert resume_trainer(tmp_path).fit() == 25


@pytest.mark.seconds
def test_the_same_where_the_loss_is_looked_at_only_now_and_then(tmp_path):
    """As on a GPU, where looking at every step would cost time: here, before the next save."""
    trainer = make_trainer(tmp_path, log_every=100, save_every=5)
    trainer.check_every = 100
    spoil_loss(trainer, 13, math.nan)
    with pytest.raises(TrainingError, match=r"not finite at step 13; .*step_00000010$"):
        trainer.fit()
    assert trainer.step == 15
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000005", "step_00000010"]
    assert_finite(tmp_path)


def test_no_line_is_logged_of_an_interval_with_nan(tmp_path):
    trainer = make_trainer(tmp_path, save_every=0)
    trainer.check_every = 4
    spoil_loss(trainer, 6, math.nan)
    with pytest.raises(TrainingError, match="step 6; no checkpoint had been saved yet"):
        trainer.fit()
    assert trainer.step == 8
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    assert not list_checkpoints(tmp_path)


def test_weights_that_an_update_spoiled_are_not_saved(tmp_path):
    trainer = make_trainer(tmp_path, save_every=5)
    update = trainer.optimizer.step

    def spoiled_update():
        update()
        if trainer.step + 1 == 10:
            trainer.parameters[3].data.view(-1)[0] = math.inf

    trainer.optimizer.step = spoiled_update
    with pytest.raises(TrainingError, match=r"weights .* after step 10; .*step_00000005$"):
        trainer.fit()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000005"]


def test_the_guard_names_the_first_of_several_bad_steps():
    guard = FiniteGuard(torch.device("cpu"))
    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    for step, values in enumerate([(good, good), (good, bad), (good, good), (bad, good)], 1):
        guard.record(step, *values)
    with pytest.raises(TrainingError, match="step 2;"):
        guard.check("")


@pytest.mark.seconds
@pytest.mark.parametrize("stem", ["model", "ema_0.99", "trainer"])
def test_a_truncated_file_is_named(tmp_path, stem):
    make_trainer(tmp_path, steps=2, save_every=1).fit()
    path = tmp_path / "checkpoints" / "step_00000002" / f"{stem}.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = f"{path}.*damaged.*delete {path.parent} to resume from the checkpoint before it"
    with pytest.raises(InputError, match=message):
        resume_trainer(tmp_path)
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    trainer = resume_trainer(tmp_path, steps=2)  # the advice works
    assert trainer.step == 1 and trainer.fit() == 2


@pytest.mark.parametrize("name", ["trainer.safetensors", "trainer.json", "ema_0.9.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    make_trainer(tmp_path, steps=1).fit()
    path = tmp_path / "checkpoints" / "step_00000001" / name
    path.unlink()
    with pytest.raises(InputError, match=re.escape(str(path))):
        resume_trainer(tmp_path)


def test_a_checkpoint_without_training_state_is_refused(tmp_path):
    trainer = make_trainer(tmp_path / "a")
    path = tmp_path / "b" / "checkpoints" / "step_00000007"
    checkpoint.save(path, trainer.model, diffusion=trainer.diffusion)
    with pytest.raises(InputError, match="trainer.json is missing"):
        resume_trainer(tmp_path / "b")


def test_resuming_needs_the_same_images(tmp_path):
    make_trainer(tmp_path, steps=1).fit()
    with pytest.raises(InputError, match="has 23 images, .* trained on 24"):
        Trainer.resume(tmp_path, make_dataset(23), progress=False)


def test_resuming_needs_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        resume_trainer(tmp_path)


def test_a_new_run_does_not_overwrite_checkpoints(tmp_path):
    make_trainer(tmp_path, steps=1).fit()
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="holds checkpoints of an earlier run"):
        make_trainer(tmp_path, steps=1).fit()
    assert snapshot(tmp_path) == before


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from training_tools import make_trainer, resume_trainer
run = Path(sys.argv[2])
try:
    if sys.argv[3] == "limit":
        make_trainer(run, steps=5).fit()
        size = max(f.stat().st_size for f in run.rglob("model.safetensors"))
        # No file may grow beyond this: writing fails in the middle, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        resume_trainer(run, steps=10).fit()
    else:
        make_trainer(run, save_every=5, keep=0, tensorboard=True).fit()
except OSError as error:
    print(error)
    sys.exit(2)
"""


def fill_disk(run: Path, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(TOOLS), str(run), how],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.seconds
def test_a_write_that_fails_keeps_the_earlier_checkpoint(tmp_path):
    done = fill_disk(tmp_path, "limit")
    assert done.returncode == 2, done.stderr
    path = tmp_path / "checkpoints" / "step_00000005"
    assert "checkpoint not saved" in done.stdout
    assert f"the last good checkpoint is {path}" in done.stdout
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [path.name]
    assert resume_trainer(tmp_path, steps=7).fit() == 7


@pytest.mark.seconds
def test_a_full_disk_keeps_the_earlier_checkpoints(tmp_path):
    size = 4 * sum(p.numel() for p in make_model().parameters())
    # Weights, two averages and two moments: two checkpoints of five sizes fit, a third does not.
    with small_disk(tmp_path, 14 * size):
        done = fill_disk(tmp_path, "mount")
        assert done.returncode == 2, done.stderr
        found = list_checkpoints(tmp_path)
        assert [path.name for path in found] == ["step_00000005", "step_00000010"]
        assert "No space left on device" in done.stdout
        assert f"the last good checkpoint is {found[-1]}" in done.stdout
        assert sorted((tmp_path / "checkpoints").iterdir()) == found
        assert resume_trainer(tmp_path).step == checkpoint.load(found[-1]).step


# What is refused


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"steps": 0},
        {"microbatch": -1},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr_schedule": "step"},
        {"weight_decay": -1.0},
        {"betas": (0.9,)},
        {"betas": (0.9, 1.0)},
        {"grad_clip": -1.0},
        {"ema": (1.0,)},
        {"ema": (0.9, 0.9)},
        {"label_dropout": 1.0},
        {"timestep_sampler": "best"},
        {"dtype": "float64"},
        {"nll_images": 1},
        {"max_minutes": -1.0},
        {"keep": -1},
    ],
)
def test_settings_that_make_no_sense(settings):
    name = next(iter(settings))
    with pytest.raises(InputError, match=f"^{name} is .*, expected"):
        TrainConfig(**settings)


def test_unknown_setting():
    with pytest.raises(InputError, match="unknown training setting 'batchsize'"):
        TrainConfig.from_dict({"batchsize": 3})


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"in_channels": 3}, {}, "training images have 1 channels, the network takes 3"),
        ({"out_channels": 1}, {}, "1 output channels; 1-channel images .* need 2"),
        ({"num_classes": 4}, {}, "network has 4 classes, the training images have 3"),
        ({"null_class": False}, {}, "label_dropout is 0.2, which needs .* null_class=True"),
        ({"channel_mult": (1, 1, 1, 1, 1)}, {}, "images of 8x8 are too small .* halves them 4"),
        ({"dims": 1}, {}, "the network is 1-dimensional; x of the data has shape"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, model, settings, message):
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, model=model, **settings)


def test_only_processes_a_checkpoint_can_describe(tmp_path):
    class Other:
        num_timesteps = 8

    with pytest.raises(
        InputError,
        match="needs a process such as GaussianDiffusion; a Other has no training_losses",
    ):
        Trainer(make_model(), Other(), make_dataset(), TrainConfig(), tmp_path)  # type: ignore


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no device 'cuda:77' here"):
        Trainer(
            make_model(),
            make_diffusion(),
            make_dataset(),
            TrainConfig(**SETTINGS),
            tmp_path,
            device="cuda:77",
        )


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    trainer = make_trainer(tmp_path, steps=1, tensorboard=True)
    with pytest.raises(InputError, match=r"'tensorboard'.*fastdiff\[train\]"):
        trainer.fit()


@pytest.mark.seconds
def test_any_betas_can_be_trained_and_resumed(tmp_path):
    diffusion = GaussianDiffusion(np.linspace(0.01, 0.2, 8), var_type="fixed_small")
    trainer = Trainer(
        make_model(out_channels=1),
        diffusion,
        make_dataset(),
        TrainConfig(**{**SETTINGS, "steps": 2}),
        tmp_path,
        device="cpu",
        progress=False,
    )
    trainer.fit()
    resumed = Trainer.resume(tmp_path, make_dataset(), changes={"steps": 3}, progress=False)
    assert np.array_equal(resumed.diffusion.betas, diffusion.betas)
    assert resumed.fit() == 3
