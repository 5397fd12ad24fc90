"""ImageNet's downsampled batches as they are distributed."""

import pickle

import numpy as np
import pytest
import torch

from fastdiff.data import load_dataset
from fastdiff.errors import InputError


def batch(count, seed, side=8, labels=None):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3 * side**2), np.uint8)
    labels = rng.integers(1, 1001, count).tolist() if labels is None else labels
    return {"data": pixels, "labels": labels, "mean": pixels.mean(axis=0)}


def write(file, content):
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".npz":
        np.savez(file, **content)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    return content


@pytest.mark.parametrize("suffix", ["", ".npz"])
@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_batches(side, suffix, tmp_path):
    folder = tmp_path / "imagenet"
    parts = [
        write(folder / f"train_data_batch_{number}{suffix}", batch(number % 3 + 1, number, side))
        for number in range(1, 11)
    ]
    write(folder / f"val_data{suffix}", batch(4, 0, side))
    dataset = load_dataset(folder, class_cond=True)
    pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, side, side)
    assert dataset.image_size == (side, side) and dataset.channels == 3
    assert torch.equal(dataset.gather(np.arange(len(dataset))), torch.from_numpy(pixels))
    assert dataset.labels.tolist() == [n - 1 for part in parts for n in part["labels"]]
    assert dataset.num_classes == 1000 and dataset.numbered
    assert len(load_dataset(folder / f"val_data{suffix}")) == 4
    one = load_dataset(folder / f"train_data_batch_10{suffix}", image_size=4)
    assert len(one) == 2 and one.image_size == (4, 4) and one.num_classes is None


def test_the_images_are_not_copied_once_more(tmp_path):
    write(tmp_path / "train_data_batch_1", batch(20, 0, 64))
    write(tmp_path / "train_data_batch_2", batch(20, 1, 64))
    images = load_dataset(tmp_path).images
    assert images.untyped_storage().nbytes() < 1.1 * images.nbytes + 10_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (batch(2, 0, labels=[0, 5]), "labels run from 0 to 5, expected 1 to 1000"),
        (batch(2, 0, labels=[1, 1001]), "labels run from 1 to 1001"),
        (batch(2, 0, labels=[1]), "data is uint8 (2, 192) with 1 labels, expected uint8"),
        (batch(2, 0, side=9), "data is uint8 (2, 243) with 2 labels, expected uint8 (N, 192 or"),
        ({"data": np.zeros((1, 192), np.uint8)}, "is not a readable batch of ImageNet"),
        ([1, 2], "is not a readable batch of ImageNet"),
    ],
)
def test_bad_batches(content, words, tmp_path):
    write(tmp_path / "train_data_batch_1", content)
    with pytest.raises(InputError) as caught:
        load_dataset(tmp_path, class_cond=True)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_batches_that_were_cut_or_are_missing(suffix, tmp_path):
    for number in (1, 2, 3):
        write(tmp_path / f"train_data_batch_{number}{suffix}", batch(2, number))
    second = tmp_path / f"train_data_batch_2{suffix}"
    second.write_bytes(second.read_bytes()[:-50])
    with pytest.raises(InputError, match="train_data_batch_2.* is not a readable batch"):
        load_dataset(tmp_path)
    rest = load_dataset(tmp_path, class_cond=True, skip_broken=True)
    assert len(rest) == 4 and "1, left out: " in rest.describe()
    with pytest.raises(InputError, match="train_data_batch_2.* is not a readable batch"):
        load_dataset(second, skip_broken=True)
    write(second, batch(2, 0, side=16))
    with pytest.raises(InputError, match="has 768 bytes for each image.*has 192"):
        load_dataset(tmp_path)
    second.unlink()
    with pytest.raises(InputError, match=f"lacks train_data_batch_2{suffix}: it has train_data"):
        load_dataset(tmp_path)
