"""Tensors in parts: a folder that says when one of its files is missing or damaged.

What several ranks write and other numbers of them read is in tests/training/test_ranks.py.
"""

import pytest
import torch

from fastdiff.checkpoints.config import foreign_entries
from fastdiff.checkpoints.parts import INDEX, copied, read_parts, write_parts
from fastdiff.errors import InputError
from fastdiff.ranks import ALONE

TENSORS = {
    "w.exp_avg": torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),
    "w.step": torch.tensor(3.0),
    "b.exp_avg": torch.arange(3.0).bfloat16(),
    "b.count": torch.tensor([1, 2]),
    "none": torch.empty(2, 0),
    "last": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "mask": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def empty(name, shape, dtype):
    return torch.empty(shape, dtype=dtype)


@pytest.fixture
def folder(tmp_path):
    write_parts(tmp_path / "optimizer", TENSORS, ALONE)
    return tmp_path / "optimizer"


def test_what_is_written_is_read(folder):
    found = read_parts(folder, empty)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_it_is_read_into_what_is_given(folder):
    place = torch.empty(6, 5)
    found = read_parts(folder, lambda name, *of: place if name == "w.exp_avg" else empty(name, *of))
    assert found["w.exp_avg"] is place and torch.equal(place, TENSORS["w.exp_avg"])


def test_a_copy_keeps_its_values():
    given = {name: tensor.clone() for name, tensor in TENSORS.items()}
    taken = copied(given)
    for tensor in given.values():
        tensor.zero_()
    assert all(torch.equal(taken[name], tensor) for name, tensor in TENSORS.items())


def test_a_missing_file_is_named(folder):
    (part,) = folder.glob("*.safetensors")
    part.unlink()
    with pytest.raises(InputError, match=f"{part} is missing from the checkpoint"):
        read_parts(folder, empty)


@pytest.mark.parametrize("length", [0, 100, -10])
def test_a_cut_file_is_damaged(folder, length):
    (part,) = folder.glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:length])
    with pytest.raises(InputError, match=f"{folder} is damaged: .+") as caught:
        read_parts(folder, empty)
    assert "\n" not in str(caught.value)


def test_no_index_is_no_folder_of_parts(folder):
    (folder / f"{INDEX}.json").unlink()
    with pytest.raises(InputError, match=r"files.json is missing"):
        read_parts(folder, empty)


def test_what_cannot_be_written_is_said_in_a_line(tmp_path):
    (tmp_path / "optimizer").write_text("a file")
    with pytest.raises(OSError, match="^rank 0 could not write its part: ") as caught:
        write_parts(tmp_path / "optimizer", TENSORS, ALONE)
    assert "\n" not in str(caught.value)
    assert foreign_entries(tmp_path) == ["optimizer"]
