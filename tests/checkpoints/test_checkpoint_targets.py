"""Folders that a save may replace, and those of others, which it may not."""

import json
from pathlib import Path

import pytest

from fastdiff import UNet, load, save
from fastdiff.checkpoints.diffusers_unet import load_unet, save_unet
from fastdiff.errors import InputError


def network(**options) -> UNet:
    return UNet(1, 8, 1, 1, (), channel_mult=(1,), norm_num_groups=8, **options)


def hugging_face(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "format": "pt"}))
    (folder / "model.safetensors").write_text("a language model")


def a_run(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"train": {}, "model": {}, "diffusion": {}}))
    save(folder / "checkpoints" / "step_00000001", network())


def autoencoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (folder / "diffusion_pytorch_model.safetensors").write_text("an autoencoder")


def notes_beside(folder: Path) -> None:
    save(folder, network())
    (folder / "notes.txt").write_text("what I learned")


def folder_inside(folder: Path) -> None:
    save(folder, network())
    (folder / "samples").mkdir()


def damaged(folder: Path) -> None:
    save(folder, network())
    (folder / "config.json").write_text("{")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("fill", "named"),
    [
        (hugging_face, "config.json"),
        (a_run, "checkpoints"),
        (autoencoder, "config.json"),
        (notes_beside, "notes.txt"),
        (folder_inside, "samples"),
        (damaged, "config.json"),
    ],
)
def test_folders_of_others_are_not_replaced(tmp_path, fill, named):
    folder = tmp_path / "folder"
    folder.mkdir()
    fill(folder)
    before = contents(tmp_path)
    for write, words in ((save, f"such as {named}"), (save_unet, "such as")):
        with pytest.raises(InputError, match=f"it holds other files, {words}"):
            write(folder, network())
        assert contents(tmp_path) == before


def test_the_two_formats_do_not_replace_each_other(tmp_path):
    save(tmp_path / "ours", network())
    save_unet(tmp_path / "theirs", network())
    before = contents(tmp_path)
    for write, name in ((save_unet, "ours"), (save, "theirs")):
        with pytest.raises(InputError, match="it holds other files"):
            write(tmp_path / name, network())
    assert contents(tmp_path) == before


def test_an_older_save_is_replaced(tmp_path):
    save(tmp_path / "ours", network(), step=1, extra_json={"more": 1})
    assert load(save(tmp_path / "ours", network(num_classes=2), step=2)).step == 2
    save_unet(tmp_path / "theirs", network())
    path = save_unet(tmp_path / "theirs", network(num_classes=2))
    assert load_unet(path).num_classes == 2
