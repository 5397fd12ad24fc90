"""What a folder is, and that only a run's is written into; one process at a time."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.averages import start_share
from fastdiff.checkpoints.diffusers_unet import save_unet
from fastdiff.checkpoints.run_directory import identify, list_checkpoints
from fastdiff.errors import InputError
from fastdiff.models.ema import EMA
from fastdiff.training import TrainConfig, Trainer
from paths import TOOLS
from training_tools import (
    SETTINGS,
    at_step,
    make_dataset,
    make_diffusion,
    make_model,
    make_trainer,
    resume_trainer,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_trainer(folder, steps=2, ema=(0.9,)).fit()
    return folder


def make_checkpoint(folder: Path) -> None:
    checkpoint.save(folder, make_model(), diffusion=make_diffusion())


def make_diffusers(folder: Path) -> None:
    save_unet(folder, make_model(out_channels=1, num_classes=None, null_class=False, dropout=0.0))


def make_pipeline(folder: Path) -> None:
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    (folder / "unet").mkdir()


def holding(name: str, text: str):
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)

    return make


FOREIGN = {
    "checkpoint": (make_checkpoint, "is a checkpoint, not a training run.*--init"),
    "diffusers": (make_diffusers, "is a diffusers folder, not a training run.*--init"),
    "pipeline": (make_pipeline, "is a diffusers folder, not a training run.*--init"),
    "config": (holding("config.json", '{"model": {}, "train": {}}'), "config.json of something"),
    "list": (holding("config.json", "[1, 2]"), "config.json of something else"),
    "no json": (holding("config.json", "model: unet"), "config.json of something else"),
    "photos": (holding("beach.jpg", "ÿØ"), "holds 'beach.jpg' and nothing that shows"),
    "samples": (holding("samples/grid.png", "PNG"), "holds 'samples'"),
    "metrics": (holding("metrics.jsonl", '{"epoch": 1}\n'), "holds 'metrics.jsonl'"),
    "other checkpoints": (holding("checkpoints/epoch_1/model.pt", "PK"), "holds 'checkpoints'"),
    "hidden": (holding(".git/HEAD", "ref"), "holds '.git'"),
    "steps of another logger": (
        holding("metrics.jsonl", '{"step": 1, "val_acc": 0.1}\n'),
        "holds 'metrics.jsonl'",
    ),
    "steps of another program": (
        holding("checkpoints/step_00005000/weights.msgpack", "w"),
        "holds 'checkpoints'",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("how", ["cli", "cli --resume", "fit", "Trainer.resume"])
def test_what_shows_no_run_is_left_alone(tmp_path, capsys, kind, how):
    make, words = FOREIGN[kind]
    folder = tmp_path / "folder"
    make(folder)
    before = contents(folder)
    if how.startswith("cli"):
        flags = ["--data", "digits", "--out", str(folder), "--steps", "1", *how.split()[1:]]
        assert cli.main(["train", *flags]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        words = words if "--resume" in how else words.split(" and nothing")[0]
    else:
        with pytest.raises(InputError) as caught:
            make_trainer(folder).fit() if how == "fit" else resume_trainer(folder)
        message = str(caught.value)
    assert re.search(words, message), message
    assert contents(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]


@pytest.mark.sample(4)
@pytest.mark.seconds
@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda run: None, "run"),
        # As older versions wrote it.
        (lambda run: rewrite(run / "config.json", lambda c: c.pop("kind")), "run"),
        (lambda run: (run / "thesis.txt").write_text("notes"), "run"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "run"),
        (lambda run: (run / "config.json").unlink(), "run"),
        (lambda run: (run / "config.json").write_text('{"train"'), "run"),  # after a power cut
        (lambda run: (run / "config.json").write_text('{"name": "mine"}'), "other"),
        (lambda run: keep_only(run, "metrics.jsonl"), "run"),
        (lambda run: keep_only(run, "checkpoints"), "run"),
        (lambda run: keep_only(run), "empty"),
        (lambda run: (keep_only(run), (run / "config.json.new").write_text("{")), "empty"),
        (lambda run: (keep_only(run), leftover(run)), "run"),
    ],
)
def test_what_shows_a_run(tmp_path, run, spoil, kind):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    spoil(folder)
    assert identify(folder).kind == kind
    if kind != "other":
        if list_checkpoints(folder):
            assert resume_trainer(folder, steps=3).fit() == 3
        else:
            assert make_trainer(folder, steps=1).fit() == 1
        assert identify(folder).kind == "run"


def rewrite(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def keep_only(run: Path, *names: str) -> None:
    for entry in run.iterdir():
        if entry.name not in names:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def leftover(run: Path) -> None:
    (run / "checkpoints" / ".step_00000002.saving-host-1").mkdir(parents=True)


@pytest.mark.seconds
def test_a_checkpoint_of_a_run_names_its_run(run):
    path = list_checkpoints(run)[-1]
    with pytest.raises(InputError, match=f"to resume its run, name the run's folder, '{run}'"):
        resume_trainer(path)


def test_the_checkpoints_of_a_run_are_a_part_of_it(run):
    with pytest.raises(InputError, match="is a part of the run .*: name the run's folder"):
        Trainer.resume(run / "checkpoints", make_dataset())


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path):
    make_checkpoint(tmp_path / "one")
    (tmp_path / "link").symlink_to("one")
    checkpoint.save(tmp_path / "link", make_model(), step=7)
    assert (tmp_path / "link").is_symlink() and checkpoint.load(tmp_path / "one").step == 7


@pytest.mark.seconds
def test_a_young_average_to_begin_with_is_said(tmp_path):
    make_trainer(tmp_path / "run", steps=2, ema=(0.999,), ema_warmup=False).fit()
    given = (tmp_path / "run", make_dataset(), TrainConfig(**SETTINGS), tmp_path / "new")
    with pytest.warns(RuntimeWarning, match="after 2 steps it still holds 99.8 %.*--init-weights"):
        Trainer.from_checkpoint(*given, weights=0.999, progress=False)
    trainer = Trainer.from_checkpoint(*given, progress=False)  # takes the weights themselves
    assert trainer.info["init"]["weights"] == "model"


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (None, 0.0), (400, 0.999**400)])
def test_how_much_of_the_start_an_average_holds(tmp_path, step, share):
    """Without a step nobody knows how often averages that were made elsewhere were updated."""
    averages = EMA(make_model(), [0.999])
    averages.updates = step or 0
    checkpoint.save(tmp_path / "one", make_model(), ema=averages, step=step)
    loaded = checkpoint.load(tmp_path / "one")
    assert start_share(loaded.config, "0.999") == pytest.approx(share)
    assert start_share(loaded.config, "model") == 0
    assert loaded.weights == ("0.999" if share == 0 else "model")


def test_save_does_not_replace_another_library_s_model(tmp_path):
    """Whose files are called config.json and model.safetensors too."""
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    (tmp_path / "model.safetensors").write_bytes(b"months of training")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="holds other files"):
        make_checkpoint(tmp_path)
    assert contents(tmp_path) == before


# One process at a time

TRAIN = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from training_tools import make_trainer, at_step
trainer = make_trainer(Path(sys.argv[2]), save_every=1)
at_step(trainer, 3, lambda: (print("there", flush=True), time.sleep(300)))
trainer.fit()
"""


@pytest.fixture
def training(tmp_path):
    """A process that trains into tmp_path/run, after two saved steps."""
    command = [sys.executable, "-c", TRAIN, str(TOOLS)]
    process = subprocess.Popen(
        [*command, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.seconds
def test_a_second_process_is_refused_and_touches_nothing(tmp_path, training, capsys):
    run = tmp_path / "run"
    before = contents(run)
    flags = ["--resume", "--out", str(run), "--steps", "50", "--data", "digits"]
    assert cli.main(["train", *flags]) == 2
    message = capsys.readouterr().err
    assert "another process trains into" in message and message.count("\n") == 1
    with pytest.raises(InputError, match="another process trains into"):
        resume_trainer(run)
    with pytest.raises(InputError, match="another process trains into"):
        make_trainer(run).fit()
    assert contents(run) == before
    training.kill()  # the lock dies with it
    training.wait()
    assert resume_trainer(run, steps=4).fit() == 4


@pytest.mark.seconds
def test_a_run_that_went_on_after_it_was_read_is_not_taken_back(tmp_path):
    make_trainer(tmp_path, steps=2).fit()
    late = resume_trainer(tmp_path, steps=9)
    resume_trainer(tmp_path, steps=4).fit()
    before = contents(tmp_path)
    with pytest.raises(InputError, match="was trained on to step_00000004 after step_00000002"):
        late.fit()
    assert contents(tmp_path) == before


@pytest.mark.seconds
def test_two_trainers_of_one_process(tmp_path):
    trainer = make_trainer(tmp_path, steps=3)
    refused = []

    def second() -> None:
        with pytest.raises(InputError, match="another process") as caught:
            make_trainer(tmp_path).fit()
        refused.append(caught.value)

    at_step(trainer, 2, second)
    assert trainer.fit() == 3 and refused
    assert resume_trainer(tmp_path, steps=4).fit() == 4  # the lock is gone with the run


# Beginning with a checkpoint's weights


@pytest.mark.seconds
def test_a_run_from_a_checkpoint(tmp_path, run):
    options = {"device": "cpu", "progress": False}
    config = TrainConfig(**{**SETTINGS, "steps": 1, "warmup": 0, "lr": 1e-9})
    for weights, name in ((0.90, "0.9"), ("model", "model")):
        folder = tmp_path / name
        trainer = Trainer.from_checkpoint(
            run, make_dataset(), config, folder, weights=weights, **options
        )
        loaded = checkpoint.load(list_checkpoints(run)[-1], weights=weights)
        for mine, theirs in zip(trainer.parameters, loaded.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        averages = trainer.ema.state_dict(0.99).values()
        assert all(
            torch.equal(a, p) for a, p in zip(averages, loaded.model.parameters(), strict=True)
        )
        assert trainer.step == 0 and not trainer.optimizer.state
        assert trainer.fit() == 1
        saved = checkpoint.load(list_checkpoints(folder)[-1])
        assert saved.info["init"] == {
            "checkpoint": str(run),
            "path": str(list_checkpoints(run)[-1]),
            "weights": name,
            "step": 2,
        }


def test_a_run_from_a_diffusers_folder(tmp_path):
    make_diffusers(tmp_path / "unet")
    config = TrainConfig(**{**SETTINGS, "steps": 1, "label_dropout": 0.0})
    dataset = make_dataset()
    dataset.num_classes = dataset.class_names = dataset.labels = None
    arguments = (tmp_path / "unet", dataset, config, tmp_path / "run")
    with pytest.raises(InputError, match="network without its process: give diffusion="):
        Trainer.from_checkpoint(*arguments, progress=False)
    diffusion = make_diffusion(learn_sigma=False, rescale_learned_sigmas=False)
    trainer = Trainer.from_checkpoint(*arguments, diffusion=diffusion, progress=False)
    assert trainer.fit() == 1


def test_images_that_the_weights_do_not_know(tmp_path, run):
    config = TrainConfig(**SETTINGS)

    def refused(dataset, words: str) -> None:
        with pytest.raises(InputError, match=words):
            Trainer.from_checkpoint(run, dataset, config, tmp_path / "new", progress=False)

    refused(make_dataset(size=16), "images are 16x16, .* on 8x8: load them with --image-size 8")
    refused(
        make_dataset(classes=4), "classes that the network does not know: c3; the network has 3"
    )
    named = make_dataset()
    named.class_names = ["c0", "c2", "dog"]
    refused(named, "classes that the network does not know: dog")
    named.class_names = ["c0", "c2", "c1"]
    begun = Trainer.from_checkpoint(run, named, config, tmp_path / "new", progress=False)
    assert begun.data.class_names == ["c0", "c1", "c2"]
    assert begun.data.labels.tolist() == [[0, 2, 1][label] for label in named.labels]
    colour = make_dataset()
    colour.channels = 3
    refused(colour, "have 3 channels, the network of .* takes 1: load them with --channels 1")
    assert not (tmp_path / "new").exists()
