"""Items of any map-style data set: what an item may be, and what is said of one that is none."""

import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from fastdiff.data import BatchStream, Items
from fastdiff.data.private_random import get_state
from fastdiff.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
FIRST = torch.from_numpy(PIXELS[0].transpose(2, 0, 1).copy())


class Pictures(Dataset):
    """As torchvision's sets: (a picture of Pillow's, a label)."""

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        return Image.fromarray(PIXELS[index]), 2 * index


class Drawn(Dataset):
    """What the three generators give, so that a batch shows which numbers a set has drawn."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        values = [index, torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor(values, dtype=torch.float64)


class Broken(Pictures):
    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        if index == 3:
            raise self.error
        return super().__getitem__(index)


class Unsendable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and\n{second}")
        self.kept = lambda: None  # no pickle takes it


def batch(data, *indices, **options):
    return Items(data, **options).batch(np.array(indices or [0], np.int64))


def test_what_an_item_may_be():
    for item in (FIRST, FIRST.numpy(), (FIRST,), [FIRST], {"image": FIRST}):
        x, given = batch([item])
        assert torch.equal(x[0], FIRST) and given == {}
    for item in ((FIRST, 3), (FIRST, np.uint8(3)), {"img": FIRST, "label": 3}):
        x, given = batch([item])
        assert given.keys() == {"y"} and given["y"].tolist() == [3]
        assert given["y"].dtype == torch.int64  # which an embedding takes
    x, given = batch([{"image": FIRST, "low_res": FIRST[:, :2], "label": 0.5}])
    assert given["low_res"].shape == (1, 3, 2, 4) and given["y"].tolist() == [0.5]
    assert batch([{"a": FIRST, "b": 1, "note": "text"}], x="a", label="b")[1]["y"] == 1


def test_torchs_own_sets():
    images = torch.arange(24, dtype=torch.uint8).reshape(6, 1, 2, 2)
    for data in (TensorDataset(images), Subset(TensorDataset(images), range(6)), images):
        assert torch.equal(batch(data, 4, 1)[0], images[[4, 1]])
    x, given = batch(Subset(TensorDataset(images, torch.arange(6)), [5, 3]), 1, 0)
    assert torch.equal(x, images[[3, 5]]) and given["y"].tolist() == [3, 5]


def test_sets_as_torchvisions():
    x, given = batch(Pictures(), 5, 0)
    assert torch.equal(x, torch.from_numpy(PIXELS[[5, 0]].transpose(0, 3, 1, 2).copy()))
    assert x.dtype == torch.uint8 and given["y"].tolist() == [10, 0]


@pytest.mark.parametrize(
    ("mode", "channels", "dtype"),
    [
        ("1", 1, torch.uint8),
        ("L", 1, torch.uint8),
        ("LA", 1, torch.uint8),
        ("P", 3, torch.uint8),
        ("RGBA", 3, torch.uint8),
        ("CMYK", 3, torch.uint8),
        ("I", 1, torch.uint16),
        ("F", 1, torch.float32),
    ],
)
def test_modes_of_pictures(mode, channels, dtype):
    (x,), _ = batch([Image.fromarray(PIXELS[0]).convert(mode)])
    assert x.shape == (channels, 5, 4) and x.dtype == dtype


def test_16_bits_keep_their_depth():
    deep = np.arange(20, dtype=np.uint16).reshape(5, 4) * 3277
    for picture in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        assert np.array_equal(batch([picture])[0][0, 0].numpy(), deep)
    stream = BatchStream(Items([deep[None]] * 8), 8, random_flip=True)
    x, _ = next(stream)
    turned = [np.array_equal(one[0], deep[:, ::-1]) for one in x.numpy()]
    assert any(turned) and not all(turned)
    with pytest.raises(InputError, match="values from -1 to 5; expected 8 or 16 bits"):
        batch([Image.fromarray(np.array([[-1, 5]], np.int32))])


@settings(deadline=None, max_examples=40)
@given(
    arrays.arrays(
        st.sampled_from([">f4", "<f8", ">i2", "u1", "?"]),
        arrays.array_shapes(min_dims=2, max_dims=3, max_side=4),
    ),
    st.booleans(),
)
def test_arrays_of_any_order_in_memory(array, turned):
    array = array[..., ::-1].T if turned else array
    array.setflags(write=False)
    x, _ = batch([array])
    assert np.array_equal(x[0].numpy(), array, equal_nan=array.dtype.kind == "f")


@pytest.mark.seconds
def test_hugging_face():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abc"))}
    )
    rows = {"img": [Image.fromarray(p) for p in PIXELS], "label": [0, 1, 2, 0, 1, 2]}
    data = datasets.Dataset.from_dict(rows, features=features)
    x, given = batch(data, 4, 0)
    assert torch.equal(x, torch.from_numpy(PIXELS[[4, 0]].transpose(0, 3, 1, 2).copy()))
    assert given["y"].tolist() == [1, 0]
    x, given = batch(data.with_format("torch"), 4, 0)
    assert torch.equal(x, torch.from_numpy(PIXELS[[4, 0]].transpose(0, 3, 1, 2).copy()))
    with pytest.raises(InputError, match="DatasetDict of 'train' is no data set: give one of its"):
        Items(datasets.DatasetDict({"train": data}))
    numbers = datasets.Dataset.from_dict({"x": [[[1.0, 2.0]]] * 3, "text": ["a"] * 3})
    with pytest.raises(InputError, match=r"'text' of an item is a str .*leave it out of the items"):
        batch(numbers)
    assert batch(numbers, x="x")[0].tolist() == [[[1.0, 2.0]]]


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 9), st.integers(0, 2**64), st.integers(0, 3))
def test_what_a_set_draws_follows_from_the_sample(share, seed, position):
    before = get_state()
    whole = BatchStream(Items(Drawn()), 2 * share, seed=seed, position=position)
    parts = [
        BatchStream(Items(Drawn()), 2 * share, seed=seed, position=position, rank=r, world_size=2)
        for r in range(2)
    ]
    for _ in range(2):
        assert torch.equal(next(whole)[0], torch.cat([next(part)[0] for part in parts]))
    after = get_state()
    assert torch.equal(before["torch"], after["torch"]) and before["python"] == after["python"]
    assert torch.equal(before["numpy"]["state"]["key"], after["numpy"]["state"]["key"])
    assert before["numpy"]["state"]["pos"] == after["numpy"]["state"]["pos"]


@pytest.mark.seconds
def test_the_same_is_drawn_in_workers_and_anew_in_each_epoch():
    alone, helped = (BatchStream(Items(Drawn()), 7, workers=workers) for workers in (0, 2))
    epochs = []
    for _ in range(3):
        x = next(alone)[0]
        assert torch.equal(x, next(helped)[0])
        epochs.append(x[x[:, 0].argsort()])
    assert not (epochs[0] == epochs[1])[:, 1:].any()
    helped.close()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no items"),
        ([(FIRST, 1, 2)], "has 3 parts; expected x"),
        ([{"pixels": FIRST}], "has 'pixels'; expected one of x, image"),
        ([(FIRST, "cat")], "'label' of an item is a str and no tensor"),
        ([FIRST, FIRST[:, :4]], r"x of item 1 is \(3, 4, 4\) torch.uint8, of item 0 \(3, 5, 4\)"),
        ([FIRST, FIRST.float()], "x of item 1 .* torch.float32, of item 0 .*; expected one shape"),
        ([(FIRST, 1), FIRST], r"item 1 has the arguments \[\], item 0 has \['y'\]"),
    ],
)
def test_what_is_no_sample(data, message):
    with pytest.raises(InputError, match=message) as caught:
        batch(data, *range(len(data)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"x": "missing"}, {"label": "missing"}])
def test_names_that_no_item_has(options):
    with pytest.raises(InputError, match="'missing'"):
        batch([{"image": FIRST, "label": 1}], **options)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (KeyError("name"), InputError, "item 3 of the data set cannot be read: KeyError: 'name'"),
        (ValueError(), InputError, "item 3 of the data set cannot be read: ValueError"),
        (OSError(5, "I/O error"), OSError, r"item 3 .* read: \[Errno 5\] I/O error"),
        (Unsendable("one", "two"), InputError, "item 3 .* read: Unsendable: one and"),
    ],
)
def test_an_item_that_cannot_be_read_is_named(error, kind, message, workers):
    stream = BatchStream(Items(Broken(error)), 6, workers=workers)
    with pytest.raises(kind) as caught:
        next(stream)
    assert re.fullmatch(message, str(caught.value))
    assert "Traceback" in "".join(caught.value.__notes__)  # where in the user's code it was
    stream.close()
