"""Tars of pictures: webdataset's shards, and any other."""

import io
import json
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch

from fastdiff.data import BatchStream, load_dataset
from fastdiff.errors import InputError
from picture_tools import encoded, shows


def write_tar(path, members, mode="w"):
    """members: name -> content, in their order."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(number, label=None, kind="cls"):
    """As webdataset's writer has it: the parts of a sample in the order of their names."""
    key = f"{number:06d}"
    if label is None:
        return {f"{key}.png": encoded(number)}
    if kind == "cls":
        return {f"{key}.cls": str(label).encode(), f"{key}.png": encoded(number)}
    described = {"label": label, "caption": "a picture"}
    return {f"{key}.json": json.dumps(described).encode(), f"{key}.png": encoded(number)}


def write_shards(folder, kind="cls", labels=(3, 0, 1, 3, 0)):
    for shard in range(3):
        samples = {}
        for number in range(shard * 2, min(shard * 2 + 2, 5)):
            samples |= sample(number, labels[number], kind)
        write_tar(folder / f"shard-{shard:06d}.tar", samples)
    return folder


@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize("spec", ["", "shard-{000000..000002}.tar", "*-??????.tar"])
def test_shards(spec, kind, tmp_path):
    folder = write_shards(tmp_path / "shards", kind)
    dataset = load_dataset(folder / spec, class_cond=True)
    assert len(dataset) == 5 and dataset.image_size == (8, 8)
    assert dataset.labels.tolist() == [3, 0, 1, 3, 0] and dataset.numbered
    assert all(shows(dataset[i][0], i) for i in range(5))
    images, labels = next(BatchStream(dataset, 5, workers=2))
    assert sorted(labels.tolist()) == [0, 0, 1, 3, 3] and images.shape == (5, 3, 8, 8)
    assert "skipped" not in dataset.describe() and "5 images" in dataset.describe()
    assert load_dataset(folder / spec).num_classes is None
    copied = pickle.loads(pickle.dumps(dataset))  # as a worker process gets it
    assert torch.equal(copied[4][0], dataset[4][0])


def test_one_shard_and_a_range_of_some(tmp_path):
    folder = write_shards(tmp_path / "shards")
    assert load_dataset(folder / "shard-000001.tar", class_cond=True).labels.tolist() == [1, 3]
    some = load_dataset(folder / "shard-{000001..000002}.tar")
    assert len(some) == 3 and shows(some[2][0], 4)
    with pytest.raises(InputError, match=r"no file '.*shard-000003\.tar', which .*\{000002\.\.0"):
        load_dataset(folder / "shard-{000002..000004}.tar")
    with pytest.raises(InputError, match=r"no file is called like '.*x-\*\.tar'"):
        load_dataset(folder / "x-*.tar")
    with pytest.raises(InputError, match="no data at"):
        load_dataset(folder / "shard-000007.tar")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_any_tar_is_as_a_folder(format, tmp_path):
    names = ["./dog/b.png", f"./cat/{'long' * 40}.png", "./cat/a.v2.png", "./.x.png", "./a.txt"]
    names = [name for name in names if format != tarfile.USTAR_FORMAT or len(name) < 100]
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(encoded(number))
            tar.addfile(member, io.BytesIO(encoded(number)))
        link = tarfile.TarInfo("./cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    dataset = load_dataset(tmp_path / "a.tar", class_cond=True)
    assert dataset.class_names == ["cat", "dog"] and dataset.labels[0] == 1
    assert all(shows(dataset[i][0], i) for i in range(len(names) - 2))
    assert "skipped  .txt 1 (no pictures); hidden 1" in dataset.describe()


def test_pictures_beside_a_tar_are_a_folder_of_pictures(tmp_path):
    write_tar(tmp_path / "a.tar", sample(0))
    (tmp_path / "b.png").write_bytes(encoded(1))
    dataset = load_dataset(tmp_path)
    assert shows(dataset[0][0], 1) and ".tar 1 (no pictures)" in dataset.describe()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (sample(0, 1) | sample(1), "no '{}/000001.cls', or .json with a label, as other pictures"),
        (sample(0, "cat"), "'{}/000000.cls' holds b'cat', expected a class number from 0"),
        (sample(0, -2), "'{}/000000.cls' has the label -2, expected a number from 0"),
        (sample(0, [1, 0], "json"), "'{}/000000.json' has the label [1, 0], expected a number"),
        (sample(0, True, "json"), "has the label True"),
        (sample(0) | {"000000.json": b"{"}, "'{}/000000.json' holds b'{{', expected a class num"),
        (sample(0) | {"000000.json": b'{"caption": "x"}'}, "no labels for '000000.png': expected"),
    ],
)
def test_labels_of_no_use(members, words, tmp_path):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(InputError) as caught:
        load_dataset(path, class_cond=True)
    assert words.format(path) in str(caught.value) and "\n" not in str(caught.value)
    assert words.format(path) in load_dataset(path, class_cond=None).describe()


def test_broken_pictures_and_shards_are_left_out_on_request(tmp_path):
    folder = write_shards(tmp_path / "shards")
    write_tar(folder / "shard-000003.tar", sample(5, 2) | {"000006.png": encoded(6)[:-100]})
    cut = folder / "shard-000001.tar"
    cut.write_bytes(cut.read_bytes()[: 3 * 1024 + 600])  # within the last picture
    (folder / "shard-000004.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match=r"shard-000001\.tar' is no whole tar file: .*--skip-br"):
        load_dataset(folder)
    dataset = load_dataset(folder, class_cond=None, skip_broken=True)
    assert [i for i in range(7) if any(shows(image, i) for image, _ in dataset)] == [0, 1, 2, 4, 5]
    (line,) = [line for line in dataset.describe().splitlines() if "  broken" in line]
    assert "4, left out: 'shard-000001.tar' is no whole tar file" in line
    for name in folder.iterdir():
        name.write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match="no image file that is whole; the first is .*000000"):
        load_dataset(folder, skip_broken=True)


def test_a_packed_tar_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", sample(0), "w:gz")
    with pytest.raises(InputError, match=r"a\.tar\.gz' is packed as a whole.*unpack it to a \.tar"):
        load_dataset(path)
    with pytest.raises(InputError, match="no whole tar file"):
        load_dataset(path.rename(tmp_path / "a.tar"))


def test_what_is_kept_of_a_picture_is_small(tmp_path):
    picture = encoded(0, 2)
    members = {f"{number:08d}.{kind}": picture if kind == "png" else b"1"
               for number in range(1000) for kind in ("cls", "png")}  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    load_dataset(path, class_cond=True, cache_bytes=0)
    tracemalloc.start()
    dataset = load_dataset(path, class_cond=True, cache_bytes=0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == 1000 and held / 1000 < 150


def test_random_damage_is_one_line(tmp_path):
    whole = write_tar(tmp_path / "a.tar", sample(0, 1) | sample(1, 0)).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(whole)
        for place in rng.integers(0, 4096, 3):
            content[place] = rng.integers(256)
        (tmp_path / "a.tar").write_bytes(content)
        try:
            dataset = load_dataset(tmp_path / "a.tar", class_cond=None)
            [dataset[i] for i in range(len(dataset))]
        except InputError as error:
            assert "\n" not in str(error)
