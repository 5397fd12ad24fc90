"""Endless batches of loaders and of iterables: the same on any ranks, resumed where they were."""

import contextlib
import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from fastdiff.data.loaders import LoaderStream
from fastdiff.data.private_random import get_state
from fastdiff.errors import InputError


class Numbered(Dataset):
    """x is filled with the item's number; of ``augmented`` ones a random part is added to it."""

    def __init__(self, count=23, augmented=False):
        self.count, self.augmented = count, augmented

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        drawn = torch.rand(()) + random.random() + np.random.rand() if self.augmented else 0.0
        return torch.full((1, 2, 2), float(index)) + drawn, index


class Counted(IterableDataset):
    """Numbers in an order of each epoch's own, drawn from Python's global generator."""

    def __init__(self, count=23, shuffled=True):
        self.count, self.shuffled = count, shuffled

    def __iter__(self):
        numbers = list(range(self.count))
        if self.shuffled:
            random.shuffle(numbers)
        for number in numbers:
            yield {"x": torch.full((1, 2, 2), float(number)) + torch.rand(()), "y": number}


class Failing(Counted):
    def __iter__(self):
        yield from list(super().__iter__())[:9]
        raise KeyError("shard")


def draw(stream, batches):
    """Per batch: rows of (x's first value, label)."""
    return [
        torch.stack([x[:, 0, 0, 0].double(), given["y"].double()], 1)
        for x, given in (next(stream) for _ in range(batches))
    ]


@pytest.fixture
def closing():
    """Streams that are closed at the end, with their workers."""
    with contextlib.ExitStack() as stack:
        yield lambda stream: stack.enter_context(contextlib.closing(stream))


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def labels(batches):
    return torch.cat([batch[:, 1] for batch in batches]).long().tolist()


def sent(state):
    """As a checkpoint keeps it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(0, 2**64), st.integers(0, 9))
def test_position_alone_resumes(batch_size, seed, position):
    def stream():
        return LoaderStream(Counted(), batch_size, seed=seed)

    before = get_state()
    whole = draw(stream(), position + 3)
    resumed, moved = stream(), stream()
    draw(moved, 2)
    resumed.position = moved.position = position
    assert same(draw(resumed, 3), whole[position:]) and same(draw(moved, 3), whole[position:])
    resumed.close()  # and goes on where it was
    whole = draw(stream(), position + 5)
    assert same(draw(resumed, 2), whole[position + 3 :])
    assert torch.equal(before["torch"], get_state()["torch"])
    assert before["python"] == get_state()["python"]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 7))
def test_ranks_share_each_batch_of_items(share, world_size, position):
    size = share * world_size
    whole = LoaderStream(Counted(), size, seed=5)
    ranks = [{"rank": rank, "world_size": world_size} for rank in range(world_size)]
    parts = [LoaderStream(Counted(), size, seed=5, **rank) for rank in ranks]
    for stream in (whole, *parts):
        stream.position = position
    for _ in range(3):
        mine = [draw(part, 1)[0] for part in parts]
        assert torch.equal(torch.cat(mine), draw(whole, 1)[0])


def test_epochs_leave_out_what_fills_no_batch():
    stream = LoaderStream(Counted(shuffled=False), 5)
    assert labels(draw(stream, 5)) == [*range(20), *range(5)]
    assert (stream.position, stream.epoch) == (5, 1)


@pytest.mark.seconds
def test_a_worker_reads_an_iterable_set_once(closing):
    stream = closing(LoaderStream(Counted(shuffled=False), 5, workers=3))
    assert labels(draw(stream, 6)) == [*range(20), *range(10)]
    # In a worker too, what is drawn follows from the seed and the epoch.
    seeds = (0, 0, 1)
    first, again, other = (closing(LoaderStream(Counted(), 5, workers=1, seed=s)) for s in seeds)
    whole = draw(first, 6)
    again.position = 5
    assert same(draw(again, 1), whole[5:])
    assert labels(whole) != labels(draw(other, 6))


@pytest.mark.seconds
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_is_resumed_by_reading_on(workers, closing):
    def stream():
        loader = DataLoader(Numbered(augmented=True), 4, shuffle=True, num_workers=workers)
        return closing(LoaderStream(loader, 4, seed=3))

    whole, resumed = draw(stream(), 9), stream()
    resumed.position = 7
    assert same(draw(resumed, 2), whole[7:])
    assert labels(whole[:5]) != labels(whole[5:])
    assert sorted(labels(whole[:5])) != labels(whole[:5])


@pytest.mark.seconds
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_begins_where_it_was(workers, closing):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def stream(seed):
        torch.manual_seed(seed)  # from which such a loader is seeded when it is made
        data = Numbered(augmented=not workers)  # torchdata keeps no generators of workers
        loader = stateful.StatefulDataLoader(data, 4, shuffle=True, num_workers=workers)
        return closing(LoaderStream(loader, 4, seed=3))

    whole = draw(stream(0), 13)
    # in an epoch of 5 batches and a bit; after its last batch; in the next ones
    for position in (1, 5, 6, 11) if not workers else (6,):
        stopped, resumed = stream(0), stream(1)  # the order comes from the state alone
        assert stopped.state_dict() is None
        draw(stopped, position)
        resumed.load_state_dict(sent(stopped.state_dict()), position)
        assert resumed.state_dict() is not None  # saved again before a batch was drawn
        assert same(draw(resumed, 13 - position), whole[position:])
        # A step that failed had drawn its batch already.
        draw(stopped, 1)
        stopped.position = position
        resumed = stream(1)
        resumed.load_state_dict(sent(stopped.state_dict()), position)
        assert resumed.position == position
        assert same(draw(resumed, 13 - position), whole[position:])
        resumed.close()
        assert same(draw(stopped, 1), whole[position : position + 1])
        stopped.close()


def test_a_batch_is_given_again():
    stream = LoaderStream(Counted(), 4)
    whole = draw(stream, 3)
    stream.position = 2
    assert same(draw(stream, 1), whole[2:]) and stream.position == 3


@pytest.mark.seconds
def test_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as tar:
        for number in range(10):
            pixels = np.full((4, 4, 3), number, np.uint8)
            tar.write({"__key__": f"{number:03d}", "png": pixels, "cls": number})
    source = str(tmp_path / "0.tar")
    data = webdataset.WebDataset(source, shardshuffle=False).decode("pil").to_tuple("png", "cls")
    for workers in (0, 1):
        stream = LoaderStream(data, 4, workers=workers)
        batches = [next(stream) for _ in range(3)]
        assert [given["y"].tolist() for _, given in batches] == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
            [0, 1, 2, 3],
        ]
        assert batches[1][0].shape == (4, 3, 4, 4) and batches[1][0].dtype == torch.uint8
        assert batches[1][0][:, 0, 0, 0].tolist() == [4, 5, 6, 7]
        stream.close()


@pytest.mark.seconds
def test_hugging_face_streams():
    datasets = pytest.importorskip("datasets")
    rows = {"x": [[[float(i)]] for i in range(10)], "label": list(range(10))}
    stream = LoaderStream(datasets.Dataset.from_dict(rows).to_iterable_dataset(), 4)
    assert not stream.is_loader  # for all that it has a state_dict
    assert [next(stream)[1]["y"].tolist() for _ in range(3)][1:] == [[4, 5, 6, 7], [0, 1, 2, 3]]


def test_loaders_that_do_not_know_of_the_other_ranks():
    data = Numbered()
    for options in ({}, {"shuffle": True}):
        with pytest.raises(InputError, match="DataLoader does not know of the other ranks"):
            LoaderStream(DataLoader(data, 2, **options), 4, rank=1, world_size=2)
    parts = []
    for rank in range(2):
        sampler = DistributedSampler(data, 2, rank, shuffle=True)
        loader = DataLoader(data, 2, sampler=sampler)
        parts.append(draw(LoaderStream(loader, 4, rank=rank, world_size=2), 12))
    first, second = (labels(part[:6]) for part in parts)
    assert set(first) | set(second) == set(range(23)) and len(set(first) & set(second)) <= 1
    assert labels(parts[0][6:]) != first  # set_epoch was told


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(Numbered(), 8), "a batch of the loader has 8 samples; expected 4"),
        (DataLoader(Numbered(), 2), "a batch of the loader has 2 samples; expected 4"),
        (Counted(3), "ended before a batch of 4 in epoch 0"),
        (iter(list(Counted(5))), "ended before a batch of 4 in epoch 1: an iterator can be read"),
        (Failing(), "a batch from item 8 of the data on cannot be read: KeyError: 'shard'"),
        (DataLoader(Failing(), 4), "a batch of the data cannot be read: KeyError: 'shard'"),
        (DataLoader(Failing(), 4, num_workers=1), "cannot be read: KeyError: 'shard'"),
        ([torch.zeros(1, 2)] * 5 + [torch.zeros(1, 3)] * 3, r"x of item 5 is \(1, 3\)"),
    ],
)
def test_one_line_says_what_is_wrong(data, message):
    stream = LoaderStream(data, 4)
    with pytest.raises(InputError, match=message) as caught:
        for _ in range(4):
            next(stream)
    assert "\n" not in str(caught.value)
    stream.close()


def test_batches_of_a_size_that_ranks_cannot_share():
    with pytest.raises(InputError, match="batch_size is 5, expected a positive multiple"):
        LoaderStream([], 5, world_size=2)
