"""IDX files, as MNIST has them."""

import gzip
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.data import load_dataset
from fastdiff.data.formats.idx import read_idx
from fastdiff.errors import InputError


def idx(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write(file, array):
    content = idx(np.asarray(array, np.uint8))
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_mnists_folder(packed, tmp_path):
    train, test = images(5, 28, 28), images(3, 28, 28, seed=1)
    write(tmp_path / f"train-images-idx3-ubyte{packed}", train)
    write(tmp_path / f"train-labels-idx1-ubyte{packed}", [5, 0, 4, 1, 9])
    test_file = write(tmp_path / f"t10k-images-idx3-ubyte{packed}", test)
    write(tmp_path / f"t10k-labels-idx1-ubyte{packed}", [7, 2, 1])
    dataset = load_dataset(tmp_path, class_cond=True)
    assert dataset.image_size == (28, 28) and dataset.channels == 1 and dataset.num_classes == 10
    assert dataset.labels.tolist() == [5, 0, 4, 1, 9] and dataset.numbered
    assert torch.equal(dataset.images[:, 0], torch.from_numpy(train))
    dataset = load_dataset(test_file, class_cond=True)
    assert dataset.labels.tolist() == [7, 2, 1] and "28x28 3" in dataset.describe()
    assert torch.equal(dataset.images[:, 0], torch.from_numpy(test))


def test_unpacked_beside_packed_is_one_set(tmp_path):
    for suffix in ("", ".gz"):
        write(tmp_path / f"train-images.idx3-ubyte{suffix}", images(2, 4, 4))
    write(tmp_path / "train-labels.idx1-ubyte.gz", [1, 0])
    assert load_dataset(tmp_path, class_cond=True).labels.tolist() == [1, 0]


def test_without_labels(tmp_path):
    file = write(tmp_path / "train-images-idx3-ubyte", images(2, 4, 4))
    assert load_dataset(file, class_cond=None).num_classes is None
    with pytest.raises(
        InputError, match="has no labels, .*: expected the file train-labels-idx1-ubyte beside"
    ):
        load_dataset(file, class_cond=True)


@pytest.mark.parametrize("channels_first", [False, True])
def test_four_axes_are_colour(channels_first, tmp_path):
    pixels = images(2, 5, 6, 3)
    stored = pixels.transpose(0, 3, 1, 2) if channels_first else pixels
    file = write(tmp_path / "x-images-idx4-ubyte", np.ascontiguousarray(stored))
    dataset = load_dataset(file)
    assert dataset.image_size == (5, 6)
    assert np.array_equal(dataset[1][0].permute(1, 2, 0).numpy(), pixels[1])


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(1, 30))
def test_reading_undoes_writing_and_a_cut_file_is_refused(tmp_path_factory, shape, cut):
    array = images(*shape)
    file = tmp_path_factory.mktemp("idx") / "a-images-idx3-ubyte"
    assert np.array_equal(read_idx(write(file, array)), array)
    file.write_bytes(idx(array)[:-cut])
    with pytest.raises(InputError, match="truncated|begins with the bytes"):
        read_idx(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "begins with the bytes none, expected an IDX file"),
        (b"\0\0\x0d\3" + bytes(12), "begins with the bytes 00 00 0d 03"),
        (b"\x89PNG\r\n", "begins with the bytes 89 50 4e 47"),
        (idx(images(2, 4, 4)) + b"\0", "has 33 bytes after its header, expected 32 for the shape"),
        (idx(images(2, 4)), r"has the shape (2, 4), expected images (N, H, W)"),
        (idx(images(0, 4, 4)), "holds no images"),
    ],
)
def test_other_content(content, words, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_dataset(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_do_not_fit_together(tmp_path):
    write(tmp_path / "train-images-idx3-ubyte", images(2, 4, 4))
    write(tmp_path / "train-labels-idx1-ubyte", [1, 0, 1])
    with pytest.raises(InputError, match=r"train-labels.* \(3,\), expected \(2,\): a label for"):
        load_dataset(tmp_path, class_cond=True)
    write(tmp_path / "other-train-images-idx3-ubyte", images(2, 4, 4))
    with pytest.raises(InputError, match="several sets: other-train-images.*give one by its path"):
        load_dataset(tmp_path)
    packed = write(tmp_path / "t10k-images-idx3-ubyte.gz", images(2, 4, 4))
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(InputError, match="t10k.* is not a readable .gz file"):
        load_dataset(packed)
