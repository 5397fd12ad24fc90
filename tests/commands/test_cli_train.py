"""``fastdiff train``: flags, presets, resuming, and what it says when something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.models import presets
from fastdiff.training import TrainConfig
from patience import WAIT
from train_command import QUICK, last_config, refused, train


@pytest.mark.seconds
def test_flags_reach_network_process_and_trainer(tmp_path, images, capsys):
    run = tmp_path / "run"
    flags = (
        "--class-cond --label-dropout 0.1 --predict v --variance fixed_small --min-snr 4 "
        "--dropout 0.25 --no-use-scale-shift-norm --num-heads 2 --ema 0.5,0.75 "
        "--lr-schedule cosine --steps 3 "
        "--timestep-sampler loss-second-moment --flip --betas 0.8,0.9 --grad-clip 0 --seed 7 "
        "--microbatch 4 --dtype bfloat16 --workers 1 --noise-schedule linear --diffusion-steps 30 "
        "--sample-every 3 --sample-count 4 --sample-steps 2 --nll-every 3 --nll-images 2 "
        "--graph auto"
    )
    assert train(QUICK, flags, "--data", images, "--out", run, "--device cpu") == 0
    said = capsys.readouterr().out
    assert f"newest checkpoint: {run}/checkpoints/step_00000003" in said
    assert said.count("the step runs eagerly: CUDA graphs need a CUDA device, and it is on") == 1

    loaded = checkpoint.load(list_checkpoints(run)[-1])
    model, diffusion = loaded.config["model"], loaded.diffusion
    assert (model["in_channels"], model["out_channels"]) == (3, 3)
    assert (model["num_classes"], model["null_class"]) == (3, True)
    assert (model["dropout"], model["num_heads"], model["model_channels"]) == (0.25, 2, 32)
    assert (model["use_scale_shift_norm"], model["image_size"]) == (False, 8)
    assert (diffusion.mean_type, diffusion.var_type) == ("v", "fixed_small")
    assert (diffusion.loss_weighting, diffusion.min_snr_gamma) == ("min_snr", 4.0)
    assert diffusion.num_timesteps == 30 and diffusion.betas[0] == pytest.approx(1e-4 * 1000 / 30)
    assert diffusion.rescale_timesteps  # the preset's, which no flag overruled
    assert loaded.ema_rates == ["0.5", "0.75"]
    config = TrainConfig.from_dict(json.loads((run / "config.json").read_text())["train"])
    assert config == TrainConfig(
        batch_size=8,
        microbatch=4,
        steps=3,
        lr=presets.get("digits").train["lr"],
        lr_schedule="cosine",
        betas=(0.8, 0.9),
        grad_clip=0.0,
        ema=(0.5, 0.75),
        label_dropout=0.1,
        timestep_sampler="loss-second-moment",
        dtype="bfloat16",
        seed=7,
        flip=True,
        log_every=2,
        sample_every=3,
        sample_count=4,
        sample_steps=2,
        nll_every=3,
        nll_images=2,
        workers=1,
        graph="auto",
        tensorboard=False,
    )
    names = {path.name for path in run.iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "config.json",
        "loss_curve.png",
        "metrics.jsonl",
        "run.toml",
        "samples",
    }


def test_a_preset_fits_itself_to_the_images(tmp_path, images):
    run = tmp_path / "run"
    flags = "--preset iddpm-imagenet64-cond --steps 1 --num-res-blocks 1 --device cpu --out"
    train(QUICK, flags, run, "--data", images)
    model = last_config(run)["model"]
    assert model["num_classes"] == 3  # class-conditional as the preset, with the images' classes
    assert (model["in_channels"], model["out_channels"]) == (3, 6)
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["lr"] == 3e-4 and config["train"]["grad_clip"] == 0.0
    assert config["info"]["preset"] == "iddpm-imagenet64-cond"


@pytest.mark.seconds
def test_the_digits_are_the_default(tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--data digits --steps 1 --batch-size 2 --device cpu --out", run) == 0
    config, preset = last_config(run), presets.get("digits")
    assert config["model"] | json.loads(json.dumps(preset.model)) == config["model"]
    assert config["diffusion"] | preset.diffusion == config["diffusion"]
    assert list((run / "tensorboard").iterdir())
    assert re.search(r"1/1 .*(step/s|s/step).*loss=", capsys.readouterr().err)


@pytest.mark.seconds
def test_resuming_through_the_command_line_is_exact(tmp_path, images):
    settings = f"{QUICK} --learn-sigma --save-every 2 --data {images} --device cpu --dropout 0.1"
    settings += " --ema 0.9 --lr-schedule constant"  # another schedule would follow --steps
    train(settings, "--steps 6 --out", tmp_path / "whole")
    train(settings, "--steps 4 --out", tmp_path / "parts", "--resume")
    assert train("--quiet --resume --steps 6 --device cpu --out", tmp_path / "parts") == 0
    for stem in ("model", "ema_0.9", "trainer"):
        file = f"checkpoints/step_00000006/{stem}.safetensors"
        whole, parts = (
            safetensors.torch.load_file(tmp_path / run / file) for run in ("whole", "parts")
        )
        assert whole.keys() == parts.keys()
        assert all((whole[name] == parts[name]).all() for name in whole)


def test_a_run_that_never_saved_is_started_again(tmp_path, images):
    run = tmp_path / "run"
    (run / "checkpoints" / ".step_00000002.saving-elsewhere-1").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    settings = f"{QUICK} --steps 2 --data {images} --device cpu --out {run}"
    assert train(settings, "--resume") == 0
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["loss"] != 1.0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model-channels 64", "--model-channels is 64, but .* trained with 32"),
        ("--channel-mult 1,2", "--channel-mult is .*1.*2.* trained with"),
        ("--attention-resolutions 1", "--attention-resolutions"),
        ("--predict v", "--predict is 'v', but .* trained with 'epsilon'"),
        ("--loss kl", "--loss is 'kl'"),
        ("--noise-schedule linear --diffusion-steps 30", "--diffusion-steps is 30"),
        ("--min-snr 5", "--min-snr is 'min_snr', but"),
        ("--zero-terminal-snr --predict v", "--predict is 'v'"),
        ("--preset iddpm-cifar10", "--preset is 'iddpm-cifar10', but .* trained with 'digits'"),
        ("--class-cond", "--class-cond is True"),
        ("--image-size 16", "--image-size is 16"),
        ("--batch-size 4", "batch_size is 4 .* started with 8, .* cannot change"),
        ("--label-dropout 0.5", "label_dropout is 0.5"),
        ("--data digits", "training images have 1 channels, the network takes 3"),
    ],
)
def test_a_resumed_run_keeps_what_it_is(small_run, capsys, flags, words):
    message = refused(capsys, "--resume --device cpu --out", small_run, flags)
    assert re.search(words, message), message


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", rng.integers(0, 256, (24, 8, 8, 3), np.uint8))
    train(QUICK, "--steps 1 --device cpu --data", folder / "images.npz", "--out", folder / "run")
    return folder / "run"


def test_the_same_flags_again_are_no_conflict(small_run):
    flags = f"{QUICK} --preset digits --learn-sigma --loss rescaled_mse --noise-schedule cosine"
    assert train(flags, "--resume --steps 2 --device cpu --out", small_run) == 0
    assert list_checkpoints(small_run)[-1].name == "step_00000002"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--data is missing"),
        ("--data nowhere", "nowhere"),
        ("--data {images} --preset resnet", "no preset named 'resnet'; there are "),
        ("--data {images} --noise-schedule square", "square"),
        ("--data {images} --lr 0", "lr is 0.0, expected a positive number"),
        ("--data {images} --label-dropout 0.1", "label_dropout is 0.1, which needs"),
        ("--data {images} --channel-mult 1,1,1,1,1", "images of 8x8 are too small"),
        ("--data {images} --attention-resolutions 8", "attention_resolutions=.*8"),
        ("--data {images} --diffusion-steps 0", "0"),
        ("--data {images} --loss kl --min-snr 5", "loss_weighting applies to the mse losses"),
        ("--data {images} --learn-sigma --variance fixed_small", "--learn-sigma contradicts"),
        ("--data {images} --device tpu", "no device 'tpu' here"),
        ("--data digits --eval-data {images}", "evaluation images have 3 channels"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, images, capsys, flags, words):
    run = tmp_path / "run"
    message = refused(capsys, "--steps 1 --device cpu --out", run, flags.format(images=images))
    assert re.search(words, message), message
    assert not run.exists()


def test_a_directory_in_use_is_refused(tmp_path, images, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    message = refused(capsys, "--data", images, "--out", tmp_path / "run")
    assert "is not empty: add --resume" in message
    assert "is a file" in refused(capsys, "--data", images, "--out", images)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_a_damaged_checkpoint_is_one_line(small_run, tmp_path, capsys):
    run = tmp_path / "run"
    path = run / "checkpoints" / "step_00000009"
    path.mkdir(parents=True)
    for file in list_checkpoints(small_run)[0].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refused(capsys, "--resume --out", run)
    assert str(weights) in message and f"delete {path}" in message


@pytest.mark.seconds
@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_saves_and_exits(tmp_path, images, number, code):
    run = tmp_path / "run"
    command = f"-m fastdiff train {QUICK} --steps 100000 --data {images} --device cpu --out {run}"
    process = subprocess.Popen(
        [sys.executable, *command.split()],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + WAIT
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=WAIT)
    assert process.returncode == code, stderr
    (path,) = list_checkpoints(run)
    assert f"stopped; continue with --resume from {path}" in stderr
    assert "Traceback" not in stderr
    assert checkpoint.load(path).step == int(path.name.removeprefix("step_")) >= 2


# Beginning with weights, and going on with other images


@pytest.mark.seconds
def test_a_run_begins_with_a_checkpoint(small_run, tmp_path, capsys):
    images, run = small_run.parent / "images.npz", tmp_path / "run"
    begin = f"--init {small_run} --data {images} --batch-size 8 --device cpu --quiet --out {run}"
    capsys.readouterr()
    assert train(begin, "--no-tensorboard --steps 2 --dropout 0.2 --predict v") == 0
    printed = capsys.readouterr().out
    first = list_checkpoints(small_run)[-1]
    assert f"init from {first}\n" in printed
    assert re.search(r"carried over .*network .*parameters\), its weights of step", printed)
    assert re.search("starts anew .*step 0, the optimizer, .*the diffusion process", printed)
    config = last_config(run)
    assert config["model"] == last_config(small_run)["model"] | {"dropout": 0.2}
    assert config["diffusion"]["mean_type"] == "v" and config["info"]["preset"] == "digits"

    # Given again, it is the run's own start; another one is none.
    assert train(begin, "--resume --steps 3") == 0
    assert "resuming at step 2: --init was the start" in capsys.readouterr().out
    message = refused(capsys, f"--resume --init {run} --out {run}")
    assert f"--init asks for the checkpoint {run}, but the run of" in message
    message = refused(capsys, f"--resume --init {small_run} --init-weights 0.995 --out {run}")
    assert "--init asks for the weights 0.995, but" in message
    message = refused(capsys, f"--resume --init {run} --out {small_run}")
    assert "is of a run that began without it; leave --init out" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model-channels 64", "--model-channels is 64, but .* trained with 32; leave the flag"),
        ("--class-cond", "has no labels|have .* classes, the network of .* has none"),
        ("--image-size 16", "images are 16x16, .* trained on 8x8: load them with --image-size 8"),
        ("--channels 1", "have 1 channels, the network of .* takes 3: load them with --channels 3"),
        ("--no-learn-sigma", "6 output channels; .* need 3"),
        ("--process edm", "6 output channels; .* need 3"),
        ("--init-weights 0.5", "has no weights '0.5'; there are model, 0.995"),
        ("--label-dropout 0.1", "label_dropout is 0.1, which needs"),
        ("--data-changed", "--data-changed is for a run with checkpoints to resume"),
    ],
)
def test_what_does_not_fit_the_weights(small_run, tmp_path, capsys, flags, words):
    images, run = small_run.parent / "images.npz", tmp_path / "run"
    message = refused(capsys, f"--init {small_run} --data {images} --device cpu --out {run}", flags)
    assert re.search(words, message), message
    assert not run.exists()


def test_init_needs_a_checkpoint(tmp_path, images, capsys):
    (tmp_path / "empty").mkdir()
    for source in ("nowhere", "empty", "images.npz"):
        message = refused(
            capsys, f"--init {tmp_path / source} --data {images} --out {tmp_path / 'run'}"
        )
        assert source in message
    message = refused(capsys, f"--init-weights model --data {images} --out {tmp_path / 'run'}")
    assert "--init-weights chooses among the weights of --init" in message


@pytest.mark.seconds
def test_a_resumed_run_goes_on_with_other_images(tmp_path, images, capsys):
    run, fewer = tmp_path / "run", tmp_path / "fewer.npz"
    train(QUICK, "--steps 1 --device cpu --data", images, "--out", run)
    np.savez(fewer, np.load(images)["arr_0"][:20])
    message = refused(capsys, f"--resume --data {fewer} --device cpu --quiet --out {run}")
    assert "has 20 images" in message and "trained on 24" in message and "--data-changed" in message
    flags = f"--resume --data-changed --data {fewer} --steps 2 --device cpu --quiet --out {run}"
    assert train(flags) == 0
    assert last_config(run)["info"]["data_changes"] == [{"step": 1, "images": 20, "before": 24}]
    assert train(f"--resume --steps 3 --device cpu --quiet --out {run}") == 0  # as it was left


# Averages


@pytest.mark.seconds
def test_a_young_average_is_said_to_be_one(tmp_path, images, capsys):
    def told(run: Path, *options: str) -> str:
        capsys.readouterr()
        flags = ["--num", "2", "--steps", "2", "--device", "cpu", *options]
        out = tmp_path / f"samples{len(list(tmp_path.iterdir()))}"
        assert cli.main(["sample", "--checkpoint", str(run), "--out", str(out), *flags]) == 0
        return capsys.readouterr().out

    settings = f"{QUICK} --steps 4 --ema 0.5,0.9999 --device cpu --data {images} --out"
    train(settings, tmp_path / "warm")
    assert "EMA 0.9999 of step 4" in told(tmp_path / "warm")
    assert "warning" not in told(tmp_path / "warm")
    train(settings, tmp_path / "constant", "--no-ema-warmup")
    chosen = told(tmp_path / "constant")
    assert ": weights of step 4, on cpu" in chosen and "warning" not in chosen
    assert "still hold untrained weights: EMA 0.5 (6.25 %), EMA 0.9999 (100 %)" in chosen
    warning = "warning: EMA 0.9999 is too young: after 4 steps it still holds 100 % of the weights"
    assert warning in told(tmp_path / "constant", "--weights", "0.9999")
    assert "EMA 0.5 is too young: after 4 steps it still holds 6.25 %" in told(
        tmp_path / "constant", "--weights", "0.5"
    )
    assert "warning" not in told(tmp_path / "constant", "--weights", "model")
    # Older checkpoints do not say how they averaged: at constant rates.
    path = list_checkpoints(tmp_path / "constant")[-1]
    config = json.loads((path / "config.json").read_text())
    del config["averages"]
    (path / "config.json").write_text(json.dumps(config))
    assert warning in told(tmp_path / "constant", "--weights", "0.9999")
