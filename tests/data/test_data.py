"""Data sets and the stream over them, on real files made by Pillow."""

import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdiff.data import NO_LABEL, ArrayDataset, BatchStream, iterate_once, load_dataset
from fastdiff.data.formats import registry
from fastdiff.data.formats.cifar10 import CIFAR10_CLASSES
from fastdiff.errors import InputError
from paths import RECORDED

LOADER = RECORDED / "published_loader.npz"
PINNED_ORDER = [[0, 1, 2, 7, 5, 6, 4, 3], [5, 6, 3, 7, 0, 1, 2, 4]]
PINNED_FLIPS = [[1, 1, 0, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0, 1, 0]]


def source_image(mode, size):
    """The picture whose passage through the published loader was recorded."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    planes = [
        (x * (5 + 2 * k) + y * (9 - 3 * k) + x * y // (4 + k) + 40 * k) % 256 for k in range(4)
    ]
    pixels = np.stack(planes, axis=-1).astype(np.uint8)
    if mode == "P":
        image = Image.fromarray(pixels[:, :, 0] // 16).copy()
        image.putpalette([(37 * i) % 256 for i in range(48)])
        return image
    if mode == "L":
        return Image.fromarray(pixels[:, :, 0])
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, : len(mode)]))


def write(folder, name, mode="RGB", size=(8, 8)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    source_image(mode, size).save(path)
    return path


def numbered(count, flip=False, shape=(1, 2, 1)):
    """Images whose left pixel is their number and whose right pixel is 0."""
    images = np.zeros((count, *shape), np.uint8)
    images[:, :, 0] = np.arange(count)[:, None, None] + 1
    labels = np.arange(count, dtype=np.int64)
    return ArrayDataset(
        images, labels=labels, class_names=[str(i) for i in range(count)], random_flip=flip
    )


# --- the published loader -------------------------------------------------------------------


@pytest.mark.parametrize("case", np.load(LOADER).files)
def test_resize_and_crop_equal_the_published_loader(case, tmp_path):
    mode, size, side = case.split("_")
    width, height = map(int, size.split("x"))
    write(tmp_path, "a.png", mode, (width, height))
    dataset = load_dataset(tmp_path, image_size=int(side), channels=3)
    expected = torch.from_numpy(np.load(LOADER)[case]).permute(2, 0, 1)
    assert torch.equal(dataset[0][0], expected)
    assert dataset.image_size == (int(side), int(side))


def test_arrays_are_resized_as_files_are(tmp_path):
    pictures = [source_image("RGB", (31, 20)), source_image("RGB", (31, 20)).rotate(180)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    np.savez(tmp_path / "a.npz", np.stack([np.asarray(picture) for picture in pictures]))
    from_array = load_dataset(tmp_path / "a.npz", image_size=7)
    from_files = load_dataset(tmp_path, image_size=7)
    for i in range(2):
        assert torch.equal(from_array[i][0], from_files[i][0])


# --- where images come from -----------------------------------------------------------------


def test_digits():
    dataset = load_dataset("digits", class_cond=True)
    assert len(dataset) == 1797 and dataset.image_size == (8, 8) and dataset.channels == 1
    assert dataset.num_classes == 10 and dataset.class_names == list("0123456789")
    image, label = dataset[0]
    assert image.dtype == torch.uint8 and image.shape == (1, 8, 8) and label == 0
    assert image.max() == 239 and image[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert max(int(images.max()) for images, _ in iterate_once(dataset, 500)) == 255


def test_without_class_cond_there_are_no_labels():
    dataset = load_dataset("digits")
    assert dataset.num_classes is None and dataset.class_names is None
    assert dataset[5][1] == NO_LABEL


def test_digits_in_colour_and_enlarged():
    grey, colour = load_dataset("digits"), load_dataset("digits", channels=3)
    assert torch.equal(colour[7][0], grey[7][0].expand(3, 8, 8))
    assert load_dataset("digits", image_size=16)[7][0].shape == (1, 16, 16)


def test_folder_with_classes_from_sub_folders(tmp_path):
    write(tmp_path, "dog/x_1.png")
    write(tmp_path, "cat/b.png")
    write(tmp_path, "cat/deep/a.JPG")
    write(tmp_path, "cat/.hidden.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    dataset = load_dataset(str(tmp_path), class_cond=True)
    assert dataset.class_names == ["cat", "dog"]
    assert [dataset[i][1] for i in range(len(dataset))] == [0, 0, 1]
    assert dataset.channels == 3 and dataset.image_size == (8, 8)


def test_folder_with_classes_from_file_names(tmp_path):
    for name in ("zebra_1.png", "ant_x_2.png", "zebra_3.png"):
        write(tmp_path, name)
    dataset = load_dataset(tmp_path, class_cond=True)
    assert dataset.class_names == ["ant", "zebra"]
    assert dataset.labels.tolist() == [0, 1, 1]


def test_labels_when_there_are_any(tmp_path):
    write(tmp_path / "named", "a_1.png")
    write(tmp_path / "named", "b_1.png")
    write(tmp_path / "camera", "IMG_1.png")
    write(tmp_path / "camera", "IMG_2.png")
    write(tmp_path / "bare", "1.png")
    assert load_dataset(tmp_path / "named", class_cond=None).num_classes == 2
    assert load_dataset(tmp_path / "camera", class_cond=None).num_classes is None
    assert load_dataset(tmp_path / "bare", class_cond=None).num_classes is None


def test_folder_survives_a_link_to_itself(tmp_path):
    write(tmp_path, "a/x.png")
    os.symlink(tmp_path, tmp_path / "a" / "up")
    assert len(load_dataset(tmp_path)) == 1


def test_images_need_not_be_square(tmp_path):
    write(tmp_path, "a.png", size=(9, 5))
    dataset = load_dataset(tmp_path)
    assert dataset.image_size == (5, 9) and dataset[0][0].shape == (3, 5, 9)


@pytest.mark.parametrize(
    ("modes", "channels", "expected"),
    [
        (["L", "L"], None, 1),
        (["RGB", "P"], None, 3),
        (["RGBA", "RGBA"], None, 3),
        (["L", "RGB", "RGBA", "P"], 3, 3),
        (["L", "RGB"], 1, 1),
        (["L", "RGB", "RGBA"], 4, 4),
    ],
)
def test_channels(modes, channels, expected, tmp_path):
    for i, mode in enumerate(modes):
        write(tmp_path, f"{i}.png", mode)
    dataset = load_dataset(tmp_path, channels=channels)
    assert dataset.channels == expected
    for i, mode in enumerate(modes):
        wanted = {1: "L", 3: "RGB", 4: "RGBA"}[expected]
        converted = np.asarray(source_image(mode, (8, 8)).convert(wanted))
        shown = dataset[i][0].permute(1, 2, 0).numpy()
        assert np.array_equal(shown, converted.reshape(shown.shape))


def test_folder_is_cached_only_when_it_fits(tmp_path):
    path = write(tmp_path, "a.png")
    kept = load_dataset(tmp_path, cache_bytes=8 * 8 * 3)
    reread = load_dataset(tmp_path, cache_bytes=8 * 8 * 3 - 1)
    before = kept[0][0], reread[0][0]
    assert torch.equal(*before)
    Image.new("RGB", (8, 8), "red").save(path)
    assert torch.equal(kept[0][0], before[0])
    assert reread[0][0][:, 0, 0].tolist() == [255, 0, 0]


def test_items_are_copies(tmp_path):
    write(tmp_path, "a.png")
    for dataset in (load_dataset(tmp_path), load_dataset("digits")):
        before = dataset[0][0].clone()
        dataset[0][0].fill_(9)
        assert torch.equal(dataset[0][0], before)


def test_npz(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images, np.array([0, 2, 2, 1, 0], np.int32))
    dataset = load_dataset(tmp_path / "a.npz", class_cond=True)
    assert dataset.image_size == (4, 6) and dataset.num_classes == 3
    assert np.array_equal(dataset[3][0].numpy(), images[3].transpose(2, 0, 1))
    assert dataset[-1][1] == 0
    with pytest.raises(IndexError):
        dataset[5]


def test_arrays_of_any_channel_count(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((2, 4, 4, 5), np.uint8))
    assert load_dataset(tmp_path / "a.npz").channels == 5
    with pytest.raises(InputError, match="5 channels"):
        load_dataset(tmp_path / "a.npz", image_size=2)


# --- CIFAR-10 -------------------------------------------------------------------------------


def cifar_batch(count, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), np.uint8), rng.integers(0, 10, count).tolist()


def write_cifar(folder, kind, batches):
    folder.mkdir()
    for number, (pixels, labels) in enumerate(batches, start=1):
        if kind == "bin":
            records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
            (folder / f"data_batch_{number}.bin").write_bytes(records.tobytes())
        else:
            batch = {b"batch_label": b"training", b"labels": labels, b"data": pixels}
            with (folder / f"data_batch_{number}").open("wb") as stream:
                pickle.dump(batch, stream, protocol=2)


@pytest.mark.parametrize("kind", ["py", "bin"])
def test_cifar10(kind, tmp_path):
    batches = [cifar_batch(3, 1), cifar_batch(2, 2)]
    folder = tmp_path / f"cifar-10-batches-{kind}"
    write_cifar(folder, kind, batches)
    dataset = load_dataset(folder, class_cond=True)
    assert len(dataset) == 5 and dataset.image_size == (32, 32) and dataset.channels == 3
    assert dataset.class_names == CIFAR10_CLASSES
    assert dataset.labels.tolist() == batches[0][1] + batches[1][1]
    assert np.array_equal(dataset[4][0].numpy().ravel(), batches[1][0][1])
    one = load_dataset(folder / ("data_batch_2" + (".bin" if kind == "bin" else "")))
    assert len(one) == 2


def test_cifar10_as_python_2_wrote_it(tmp_path):
    """Python 2's protocol-2 opcodes: byte strings (SHORT_BINSTRING), numpy.core's old name."""
    pixels = bytes(range(256)) * 12
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    stream = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00"
        + pixels
        + b"tbU\x06labels]K\x07au."
    )
    (folder / "data_batch_1").write_bytes(stream)
    dataset = load_dataset(folder, class_cond=True)
    assert dataset.labels.tolist() == [7]
    assert dataset[0][0].numpy().tobytes() == pixels


class Malicious:
    def __reduce__(self):
        return os.system, ("touch unpickled",)


def test_cifar10_pickle_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Malicious()}, protocol=2))
    with pytest.raises(InputError, match="data_batch_1.*system"):
        load_dataset(folder)
    assert not (tmp_path / "unpickled").exists()


def test_damaged_cifar10(tmp_path):
    for kind in ("py", "bin"):
        folder = tmp_path / kind
        write_cifar(folder, kind, [cifar_batch(2, 0)])
        file = next(folder.iterdir())
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(InputError, match="data_batch_1"):
            load_dataset(folder)
    write_cifar(tmp_path / "gap", "bin", [cifar_batch(2, 0)] * 3)
    (tmp_path / "gap" / "data_batch_2.bin").unlink()
    with pytest.raises(InputError, match="lacks data_batch_2.bin"):
        load_dataset(tmp_path / "gap")
    write_cifar(tmp_path / "labels", "bin", [(cifar_batch(2, 0)[0], [3, 11])])
    with pytest.raises(InputError, match="labels run from 3 to 11"):
        load_dataset(tmp_path / "labels")
    write_cifar(tmp_path / "shape", "py", [(np.zeros((2, 100), np.uint8), [3, 1])])
    with pytest.raises(InputError, match=r"uint8 \(2, 100\)"):
        load_dataset(tmp_path / "shape")


# --- bad input ------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="no data at.*nowhere"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no image files"):
        load_dataset(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="unknown kind"):
        load_dataset(tmp_path / "a.txt")
    np.savez(tmp_path / "a.npz", np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(InputError, match="no images"):
        load_dataset(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, np.int64))
    with pytest.raises(InputError, match="no images"):
        load_dataset(tmp_path / "a.npz", class_cond=True)
    np.savez(tmp_path / "a.npz", np.zeros((2, 0, 4, 3), np.uint8))
    with pytest.raises(InputError, match=r"no images: arr_0 has shape \(2, 0, 4, 3\)"):
        load_dataset(tmp_path / "a.npz")


def test_mixed_sizes_name_two_files(tmp_path):
    write(tmp_path, "a.png", size=(8, 8))
    write(tmp_path, "b.png", size=(9, 5))
    with pytest.raises(InputError, match=r"a\.png' is 8x8 and .*b\.png' is 9x5.*--image-size"):
        load_dataset(tmp_path)
    assert load_dataset(tmp_path, image_size=4)[1][0].shape == (3, 4, 4)


def test_mixed_modes_say_what_was_found(tmp_path):
    for name, mode in [("a.png", "RGB"), ("b.png", "L"), ("c.png", "RGB"), ("d.png", "RGBA")]:
        write(tmp_path, name, mode)
    with pytest.raises(InputError, match="2 colour.*1 greyscale.*1 colour with alpha.*--channels"):
        load_dataset(tmp_path)


def test_unreadable_image_is_named_at_once(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"b\.png' is not a readable image"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_is_named_when_read(suffix, workers, tmp_path):
    write(tmp_path, "a.png", size=(64, 64))
    path = write(tmp_path, f"b.{suffix}", size=(64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    dataset = load_dataset(tmp_path)
    with pytest.raises(InputError, match=rf"b\.{suffix}' cannot be decoded"):
        next(BatchStream(dataset, 2, workers=workers))


def test_sixteen_bit_image_is_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png' has the pixel mode I;16"):
        load_dataset(tmp_path)


def test_image_replaced_by_another_size(tmp_path):
    path = write(tmp_path, "a.png")
    dataset = load_dataset(tmp_path)
    write(tmp_path, "a.png", size=(6, 8))
    with pytest.raises(InputError, match="is now 6x8, was 8x8"):
        dataset[0]
    path.unlink()
    with pytest.raises(InputError, match=r"a\.png"):
        dataset[0]


def test_missing_labels(tmp_path):
    write(tmp_path, "cat_1.png")
    write(tmp_path, "other.png")
    with pytest.raises(InputError, match=r"no labels for .*other\.png"):
        load_dataset(tmp_path, class_cond=True)
    np.savez(tmp_path / "a.npz", np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(InputError, match="no labels"):
        load_dataset(tmp_path / "a.npz", class_cond=True)
    np.savez(tmp_path / "a.npz", np.zeros((2, 4, 4, 3), np.uint8), np.array([-1, 0]))
    with pytest.raises(InputError, match="label -1"):
        load_dataset(tmp_path / "a.npz", class_cond=True)
    np.savez(tmp_path / "a.npz", np.zeros((2, 4, 4, 3), np.uint8), np.array([3, 40_000_000]))
    with pytest.raises(InputError, match="label 40000000, expected class numbers"):
        load_dataset(tmp_path / "a.npz", class_cond=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [("image_size", 0), ("image_size", 8.5), ("image_size", "8"), ("channels", 2)],
)
def test_bad_options(option, value):
    with pytest.raises(InputError, match=f"{option} is {value!r}"):
        load_dataset("digits", **{option: value})


# --- the stream -----------------------------------------------------------------------------

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


def test_a_folder_named_digits_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "digits" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("digits")) == 1797
    assert len(load_dataset("./digits")) == len(load_dataset(tmp_path / "digits")) == 1


def test_a_format_is_added_by_registering_it(tmp_path):
    known = len(registry.FORMATS)

    @registry.image_format("a text of grey levels", lambda path: path.suffix == ".grey")
    def load(path, options):
        levels = np.array(path.read_text().split(), np.uint8)
        return ArrayDataset(levels[:, None, None, None], random_flip=options.random_flip)

    try:
        (tmp_path / "a.grey").write_text("1 2 3")
        assert load_dataset(tmp_path / "a.grey")[1][0].item() == 2
        with pytest.raises(InputError, match="a text of grey levels or a folder of images"):
            load_dataset(tmp_path / "nowhere")
    finally:
        registry.FORMATS[:] = [f for f in registry.FORMATS if f.load is not load]
    assert len(registry.FORMATS) == known
