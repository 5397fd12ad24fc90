"""The order in which a set's images are drawn."""

import multiprocessing
import signal
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdiff.data import ArrayDataset, BatchStream, iterate_once, load_dataset
from fastdiff.errors import InputError

PINNED_ORDER = [[0, 1, 2, 7, 5, 6, 4, 3], [5, 6, 3, 7, 0, 1, 2, 4]]


PINNED_FLIPS = [[1, 1, 0, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0, 1, 0]]


def numbered(count, flip=False, shape=(1, 2, 1)):
    """Images whose left pixel is their number and whose right pixel is 0."""
    images = np.zeros((count, *shape), np.uint8)
    images[:, :, 0] = np.arange(count)[:, None, None] + 1
    labels = np.arange(count, dtype=np.int64)
    return ArrayDataset(
        images, labels=labels, class_names=[str(i) for i in range(count)], random_flip=flip
    )


streams = st.fixed_dictionaries(
    {
        "count": st.integers(1, 12),
        "batch_size": st.integers(1, 30),
        "seed": st.integers(0, 2**64),
        "random_flip": st.booleans(),
    }
)


def make(count, batch_size, **options):
    return BatchStream(numbered(count), batch_size, **options)


def draw(stream, batches):
    """Per batch: rows of (left pixel, right pixel, label)."""
    return [
        torch.cat([images.flatten(1).long(), labels[:, None]], dim=1)
        for images, labels in (next(stream) for _ in range(batches))
    ]


@pytest.mark.seconds
@settings(deadline=None, max_examples=60)
@given(streams, st.integers(0, 20))
def test_position_alone_resumes(arguments, position):
    whole = draw(make(**arguments), position + 4)
    resumed = make(**arguments, position=position)
    moved = make(**arguments)
    draw(moved, 2)
    moved.position = position
    for stream in (resumed, moved):
        assert all(map(torch.equal, draw(stream, 4), whole[position:]))
        assert stream.position == position + 4


@settings(deadline=None, max_examples=60)
@given(streams, st.integers(1, 4))
def test_every_epoch_shows_every_image_once(arguments, epochs):
    count, batch_size = arguments["count"], arguments["batch_size"]
    rows = torch.cat(draw(make(**arguments), -(-count * epochs // batch_size)))
    for epoch in range(epochs):
        shown = rows[epoch * count : (epoch + 1) * count]
        assert sorted(shown[:, -1].tolist()) == list(range(count))
    # Image and label belong together, whichever way the image is turned.
    assert torch.equal(rows[:, 0] + rows[:, 1], rows[:, 2] + 1)


@settings(deadline=None, max_examples=40)
@given(streams, st.integers(1, 5), st.integers(0, 5))
def test_ranks_share_each_global_batch(arguments, world_size, position):
    arguments = arguments | {"batch_size": arguments["batch_size"] * world_size}
    whole = draw(make(**arguments, position=position), 2)
    parts = [
        draw(make(**arguments, position=position, rank=rank, world_size=world_size), 2)
        for rank in range(world_size)
    ]
    for k in range(2):
        assert torch.equal(torch.cat([part[k] for part in parts]), whole[k])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers, tmp_path):
    for i in range(7):
        Image.new("RGB", (6, 6), (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
    dataset = load_dataset(tmp_path, image_size=4, random_flip=True, cache_bytes=0)
    alone, helped = BatchStream(dataset, 5), BatchStream(dataset, 5, workers=workers)
    for _ in range(6):
        assert all(map(torch.equal, next(alone), next(helped)))
    helped.position = alone.position = 2  # what was prepared ahead must not leak through
    assert all(map(torch.equal, next(alone), next(helped)))
    helped.close()
    assert all(map(torch.equal, next(alone), next(helped)))
    helped.close()


def test_a_stream_that_is_dropped_ends_its_workers():
    before = set(multiprocessing.active_children())
    stream = make(7, 3, workers=2)
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    del stream  # not the collector's work: it would wait five seconds for each
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_are_deaf_to_signals_but_obey_their_parent(number):
    stream = make(7, 3, workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    # From a process that is not their parent, as a scheduler is.
    subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    assert len(draw(stream, 9)) == 9 and worker.is_alive()
    if hasattr(signal, "sigwaitinfo"):
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
    stream.close()


def test_order_and_flips_vary_with_seed_and_epoch():
    def order(seed, epoch):
        return draw(make(50, 50, seed=seed, random_flip=True, position=epoch), 1)[0]

    first = order(0, 0)
    for other in (order(1, 0), order(0, 1)):
        assert not torch.equal(first[:, -1], other[:, -1])
        by_image = [(rows[:, 0] == 0)[rows[:, -1].argsort()] for rows in (first, other)]
        assert not torch.equal(*by_image)


def test_order_is_pinned():
    """A checkpoint's position means the same images under another version of fastdiff or numpy."""
    rows = draw(make(8, 8, seed=3, random_flip=True), 2)
    assert [row[:, -1].tolist() for row in rows] == PINNED_ORDER
    assert [(row[:, 0] == 0).int().tolist() for row in rows] == PINNED_FLIPS


def test_flips_are_mirrors_of_half_the_images():
    dataset = numbered(200, flip=True)
    rows = torch.cat(draw(BatchStream(dataset, 64), 25))  # 8 epochs
    assert 0.45 < (rows[:, 0] == 0).float().mean() < 0.55
    unflipped = torch.cat(draw(BatchStream(dataset, 64, random_flip=False), 25))
    assert not (unflipped[:, 0] == 0).any()


def test_epoch_progress():
    stream = make(10, 4)
    draw(stream, 5)
    assert stream.epoch == 2.0


def test_iterate_once_visits_in_order():
    dataset = numbered(10, flip=True)
    batches = list(iterate_once(dataset, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    assert torch.cat([images for images, _ in batches])[:, 0, 0, 0].tolist() == list(range(1, 11))
    shared = [y for rank in range(3) for _, y in iterate_once(dataset, 4, rank=rank, world_size=3)]
    assert sorted(torch.cat(shared).tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 5, "world_size": 2}, "multiple of world_size"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"position": -1}, "position is -1"),
        ({"seed": -1}, "seed -1"),
        ({"workers": -2}, "workers -2"),
    ],
)
def test_bad_stream_arguments(options, message):
    with pytest.raises(InputError, match=message):
        BatchStream(numbered(4), **({"batch_size": 4} | options))
