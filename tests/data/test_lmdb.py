"""LMDBs of pictures, as LSUN is distributed."""

import hashlib
import multiprocessing
import pickle
import threading

import lmdb
import numpy as np
import pytest
import torch

from fastdiff.data import BatchStream, load_dataset
from fastdiff.errors import InputError
from picture_tools import encoded, pixels, shows


def write_lmdb(path, pictures, **options):
    environment = lmdb.open(str(path), map_size=1 << 24, **options)
    with environment.begin(write=True) as transaction:
        for key, value in pictures.items():
            transaction.put(key, value)
    environment.close()
    return path


def lsun(count=6):
    """Keys as LSUN has them; its WebP would lose bits, and has a test of its own."""
    return {hashlib.sha1(bytes([i])).hexdigest().encode(): encoded(i) for i in range(count)}


@pytest.fixture
def bedrooms(tmp_path):
    return write_lmdb(tmp_path / "bedroom_train_lmdb", lsun())


def order(count=6):
    return sorted(range(count), key=lambda i: hashlib.sha1(bytes([i])).hexdigest())


def test_lsun(bedrooms):
    dataset = load_dataset(bedrooms)
    assert len(dataset) == 6 and dataset.image_size == (8, 8) and dataset.num_classes is None
    assert all(shows(dataset[row][0], i) for row, i in enumerate(order()))
    assert "6 images" in dataset.describe()
    again = load_dataset(bedrooms / "data.mdb", cache_bytes=0)  # the same one, open already
    assert torch.equal(again[3][0], dataset[3][0])


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_kinds_of_pictures(kind, tmp_path):
    path = write_lmdb(tmp_path / "a.lmdb", {b"0": encoded(0, kind=kind)}, subdir=False)
    dataset = load_dataset(path)
    assert dataset[0][0].shape == (3, 8, 8) and dataset.channels == 3


def test_keys_are_read_as_paths_are(tmp_path):
    keys = [b"cat/0", b"dog/1", b"cat/\xff", b"__len__"]
    path = write_lmdb(tmp_path / "a", {key: encoded(i) for i, key in enumerate(keys)})
    dataset = load_dataset(path, class_cond=True)
    assert dataset.class_names == ["cat", "dog"] and dataset.labels.tolist() == [0, 0, 1]
    assert shows(dataset[1][0], 2) and "skipped  __len__ 1" in dataset.describe()


def test_many_threads(bedrooms):
    dataset = load_dataset(bedrooms, cache_bytes=0)
    wrong = []

    def read():
        for _ in range(30):
            for row, i in enumerate(order()):
                if not shows(dataset[row][0], i):
                    wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong
    stream = BatchStream(dataset, 6, workers=3)
    assert next(stream)[0].shape == (6, 3, 8, 8)
    stream.close()


def read_all(dataset, inherited, results):
    images = [dataset[row][0].numpy() for row in range(len(dataset))]
    results.put((images, dataset.files[0].archive.environment() is inherited))


def test_forked_processes(bedrooms):
    dataset = load_dataset(bedrooms, cache_bytes=0)
    here = dataset.files[0].archive.environment()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=read_all, args=(dataset, here, results)) for _ in range(2)]
    [child.start() for child in children]
    for images, was_inherited in [results.get() for _ in children]:
        assert not was_inherited  # which LMDB forbids
        for row, i in enumerate(order()):
            assert np.array_equal(images[row].transpose(1, 2, 0), pixels(i))
    [child.join() for child in children]
    assert shows(dataset[5][0], order()[5])  # the parent's is as it was


def test_a_copy_in_a_spawned_process_opens_its_own(bedrooms):
    content = pickle.dumps(load_dataset(bedrooms, cache_bytes=0))
    assert shows(pickle.loads(content)[2][0], order()[2])


def test_broken_values(tmp_path):
    path = write_lmdb(tmp_path / "a", {b"0": encoded(0), b"1": encoded(1)[:-100], b"2": b"no"})
    with pytest.raises(InputError, match=r"a/2' is not a readable image.*\(1 of 3 files\)"):
        load_dataset(path)
    dataset = load_dataset(path, skip_broken=True)
    assert len(dataset) == 1 and "2, left out: '1' is" in dataset.describe()


def test_databases_that_cannot_be_read(tmp_path):
    empty = write_lmdb(tmp_path / "empty", {})
    with pytest.raises(InputError, match="empty' holds no image files"):
        load_dataset(empty)
    cut = write_lmdb(tmp_path / "cut", lsun()) / "data.mdb"
    cut.write_bytes(cut.read_bytes()[:-4096])
    with pytest.raises(InputError, match=r"cut/data\.mdb' has [\d,]+ bytes, expected .*cut short"):
        load_dataset(tmp_path / "cut")
    cut.write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="data.mdb' is not a readable LMDB: .*MDB_INVALID"):
        load_dataset(tmp_path / "cut")


def test_the_package_is_named_where_it_is_missing(bedrooms, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(InputError, match=r"'lmdb', which is not .*pip install 'fastdiff\[data\]'"):
        load_dataset(bedrooms)
