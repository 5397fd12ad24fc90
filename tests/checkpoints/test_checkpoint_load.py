"""What load takes besides a checkpoint's own folder, and what it says of everything else."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastdiff import UNet, cli, load, save
from fastdiff.checkpoints.run_directory import RUN_KIND
from fastdiff.errors import InputError
from fastdiff.process.create import create_diffusion


def network() -> UNet:
    return UNet(1, 8, 1, 1, (), channel_mult=(1,))


def refused(path: Path, *words: object) -> None:
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(str(word) in message for word in words), message


@pytest.fixture
def run(tmp_path) -> Path:
    """As the trainer leaves it: newest is 100, not the one that was written last."""
    folder = tmp_path / "run"
    for step in (100, 20):
        path = folder / "checkpoints" / f"step_{step:08d}"
        save(path, network(), step=step, diffusion=create_diffusion(steps=50))
    (folder / "checkpoints" / ".step_00000200.saving-host-1").mkdir()
    settings = {"kind": RUN_KIND, "train": {}, "model": {}, "diffusion": {}, "info": {}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step_00000100"])
def test_a_runs_newest_checkpoint_is_loaded(run, inside, monkeypatch):
    found = load(run / inside)
    assert found.step == 100 and found.path == run / "checkpoints" / "step_00000100"
    assert load(run / "checkpoints" / "step_00000020").step == 20
    monkeypatch.chdir(run / inside)
    assert load(".").path == found.path


def test_commands_read_the_same_checkpoint(run, capsys, tmp_path):
    flags = ["--num", "1", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main(["sample", "--checkpoint", str(run), *flags]) == 2
    assert "step_00000100 does not say its image size" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_a_run_without_checkpoints_says_so(run, inside):
    for path in (run / "checkpoints").glob("step_*"):
        path.rename(path.with_name(f".{path.name}.deleting"))
    with pytest.raises(InputError, match="run is a training run that has saved no checkpoint yet"):
        load(run / inside)
    if not inside:
        for path in sorted((run / "checkpoints").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (run / "checkpoints").rmdir()
        refused(run, "has saved no checkpoint yet")


def test_a_checkpoint_is_itself_whatever_lies_in_it(run, tmp_path):
    save(tmp_path / "own", network(), step=3)
    (run / "checkpoints").rename(tmp_path / "own" / "checkpoints")
    assert load(tmp_path / "own").step == 3


# What is none


def test_a_file_is_no_directory(tmp_path):
    path = save(tmp_path / "c", network())
    refused(path / "model.safetensors", "is a file", f"give the directory it lies in, {path}")
    for name in ("model.pt", "x.safetensors"):
        (tmp_path / name).write_text("")
        refused(tmp_path / name, "is a file", f"fastdiff convert --model {tmp_path / name}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "net.pth"])
def test_a_directory_of_weights(tmp_path, name):
    (tmp_path / name).write_text("")
    refused(tmp_path, "has no config.json", f"fastdiff convert --model {tmp_path / name}")


def test_models_of_other_libraries(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    refused(tmp_path, "has no config.json, nor a unet/")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused(tmp_path, "config.json is not a fastdiff checkpoint's", "its model_type is 'bert'")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_a_prefix_of_all_names_is_named(tmp_path, prefix):
    path = save(tmp_path / "c", network())
    file = path / "model.safetensors"
    state = safetensors.torch.load_file(file)
    safetensors.torch.save_file({prefix + name: value for name, value in state.items()}, file)
    refused(path, f"its names begin with {prefix}", f"--model {file} --strip {prefix} reads it")


def test_numbers_that_are_no_weights(tmp_path):
    path = save(tmp_path / "c", network())
    file = path / "model.safetensors"
    state = safetensors.torch.load_file(file)
    for dtype in (torch.int8, torch.bool, torch.complex64):
        quantized = {name: value.to(dtype) for name, value in state.items()}
        safetensors.torch.save_file(quantized, file)
        refused(path, str(file), f"is {dtype}; expected floating-point numbers")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rounded = {name: value.to(dtype) for name, value in state.items()}
        safetensors.torch.save_file(rounded, file)
        found = load(path).model.state_dict()
        assert all(torch.equal(found[name], rounded[name].float()) for name in state)


def test_checkpoints_of_another_program_are_no_run(tmp_path):
    folder = tmp_path / "lightning" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "epoch=1.ckpt").write_bytes(b"x")
    refused(folder.parent, "it has no config.json")
    refused(folder, "fastdiff convert --model", "epoch=1.ckpt makes one of weights")
