"""Zips of pictures: StyleGAN's and EDM's, and any other."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch

from fastdiff.data import BatchStream, load_dataset
from fastdiff.data.formats.zipped import read_directory
from fastdiff.errors import InputError
from picture_tools import encoded, shows

LABELS = [3, 0, 1, 3, 0]


def edm_name(number):
    return f"{number // 3:05d}/img{number:08d}.png"


def write_edm(path, labels=LABELS, count=5):
    """As dataset_tool.py writes it: stored, numbered, dataset.json at the end."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number in range(count):
            archive.writestr(edm_name(number), encoded(number))
        pairs = labels and [[edm_name(i), label] for i, label in enumerate(labels)]
        archive.writestr("dataset.json", json.dumps({"labels": pairs}))
    return path


def write_zip(path, names, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for number, name in enumerate(names):
            archive.writestr(name, encoded(number))
    return path


@pytest.mark.parametrize("unpacked", [False, True])
def test_an_edm_set(unpacked, tmp_path):
    place = write_edm(tmp_path / "set.zip")
    if unpacked:
        zipfile.ZipFile(place).extractall(place := tmp_path / "set")
    dataset = load_dataset(place, class_cond=True)
    assert len(dataset) == 5 and dataset.image_size == (8, 8) and dataset.channels == 3
    assert dataset.labels.tolist() == LABELS
    assert dataset.num_classes == 4 and dataset.numbered and dataset.class_names == list("0123")
    assert all(shows(dataset[i][0], i) for i in range(5))
    images, labels = next(BatchStream(dataset, 5, workers=2))
    assert sorted(labels.tolist()) == sorted(LABELS) and images.shape == (5, 3, 8, 8)
    assert "5 images" in dataset.describe()
    assert load_dataset(place, class_cond=True, labels="folders").class_names == ["00000", "00001"]
    assert load_dataset(place).num_classes is None


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "dataset.json holds no labels (null)"),
        ([[0.0, 1.0]] * 5, "label of '00000/img00000000.png' is a vector of 2 values, expected a"),
        ([0, 1.5, 0, 0, 0], "label of '00000/img00000001.png' is 1.5, expected a class number"),
        ([0, -1, 0, 0, 0], "is -1, expected a class number from 0"),
        ([0, 1, 2], "no label for '00001/img00000003.png'"),
    ],
)
def test_edm_labels_of_no_use(labels, words, tmp_path):
    place = write_edm(tmp_path / "set.zip", labels)
    with pytest.raises(InputError) as caught:
        load_dataset(place, class_cond=True)
    assert words in str(caught.value) and str(caught.value).startswith(f"'{place}': ")
    unlabelled = load_dataset(place, class_cond=None)
    assert unlabelled.num_classes is None and words in unlabelled.describe()


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "cannot be read"), ('{"labels": [1, 2]}', "labels are no pairs"), ("[]", None)],
)
def test_a_dataset_json_of_another_kind(content, words, tmp_path):
    for name in ("cat/0.png", "dog/0.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encoded(0))
    (tmp_path / "dataset.json").write_text(content)
    if words is None:
        assert load_dataset(tmp_path, class_cond=True).class_names == ["cat", "dog"]
    else:
        with pytest.raises(InputError, match=words):
            load_dataset(tmp_path, class_cond=True)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_any_zip_is_as_a_folder(compression, tmp_path):
    names = ["dog/b.png", "cat/ä.png", "cat/a.png", "__MACOSX/cat/._a.png", ".x.png", "notes.txt"]
    dataset = load_dataset(write_zip(tmp_path / "a.ZIP", names, compression), class_cond=True)
    assert dataset.class_names == ["cat", "dog"] and dataset.labels.tolist() == [0, 0, 1]
    assert all(shows(dataset[i][0], number) for i, number in enumerate((2, 1, 0)))
    assert "skipped  .txt 1 (no pictures); hidden 2" in dataset.describe()
    copied = pickle.loads(pickle.dumps(dataset))  # as a worker process gets it
    assert torch.equal(copied[2][0], dataset[2][0])


def test_a_large_zip_behind_other_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    path = write_zip(tmp_path / "a.zip", [f"{i}.png" for i in range(4)])
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    entries = list(read_directory(path))
    with zipfile.ZipFile(path) as archive:
        for entry, known in zip(entries, archive.infolist(), strict=True):
            assert (entry.name, entry.offset) == (known.filename, known.header_offset)
            assert (entry.stored, entry.method) == (known.compress_size, known.compress_type)
    dataset = load_dataset(path)
    assert all(shows(dataset[i][0], i) for i in range(4))


def test_broken_members_are_left_out_on_request(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/0.png", encoded(0))
        archive.writestr("cat/1.png", encoded(1)[:-30])
        archive.writestr("dog/2.png", b"no picture")
    with pytest.raises(InputError, match=r"a\.zip/dog/2\.png' is not a readable.*\(1 of 3 files\)"):
        load_dataset(path)
    dataset = load_dataset(path, class_cond=True, skip_broken=True)
    assert dataset.class_names == ["cat"] and shows(dataset[0][0], 0) and len(dataset) == 1
    assert "broken   2, left out: 'cat/1.png' is" in dataset.describe()
    edm = write_edm(tmp_path / "edm.zip")
    content = bytearray(edm.read_bytes())
    content[content.index(b"IDAT", content.index(b"IDAT") + 4) + 6] ^= 255  # the second picture
    edm.write_bytes(content)
    dataset = load_dataset(edm, class_cond=True, skip_broken=True)
    assert dataset.labels.tolist() == [3, 1, 3, 0] and shows(dataset[1][0], 2)


def test_mixed_sizes_in_a_zip(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", encoded(0, 8))
        archive.writestr("1.png", encoded(0, 9))
    with pytest.raises(InputError, match=r"a\.zip/0\.png' is 8x8 and .*1\.png' is 9x9"):
        load_dataset(path)


@pytest.mark.parametrize("keep", [0, 10, -5, -60])
def test_a_zip_that_was_cut(keep, tmp_path):
    path = write_edm(tmp_path / "a.zip")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.zip' is no whole zip file .*: is it cut short"):
        load_dataset(path)


def test_zips_that_cannot_be_read_in_place(tmp_path):
    path = write_zip(tmp_path / "a.zip", ["0.png"], zipfile.ZIP_LZMA)
    with pytest.raises(InputError, match=r"0\.png' is packed by method 14, expected .* unpack"):
        load_dataset(path)
    content = bytearray(write_zip(path, ["0.png"]).read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="is encrypted"):
        load_dataset(path)
    write_zip(path, [])
    with pytest.raises(InputError, match="holds no image files"):
        load_dataset(path)


def test_random_damage_is_one_line(tmp_path):
    whole = write_edm(tmp_path / "a.zip").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(whole)
        for place in rng.integers(len(whole) - 600, len(whole), 2):  # the directory and the labels
            content[place] = rng.integers(256)
        (tmp_path / "a.zip").write_bytes(content)
        try:
            dataset = load_dataset(tmp_path / "a.zip", class_cond=None)
            [dataset[i] for i in range(len(dataset))]
        except InputError as error:
            assert "\n" not in str(error)
