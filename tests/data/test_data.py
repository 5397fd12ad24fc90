"""Data sets and the stream over them, on real files made by Pillow."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.data import NO_LABEL, ArrayDataset, BatchStream, iterate_once, load_dataset
from fastdiff.data.formats import registry
from fastdiff.errors import InputError
from paths import RECORDED

LOADER = RECORDED / "published_loader.npz"


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


def test_mnist5k():
    dataset = load_dataset("mnist5k", class_cond=True)
    assert len(dataset) == 5000 and dataset.image_size == (28, 28) and dataset.channels == 1
    assert dataset.class_names == list("0123456789")
    assert np.bincount(dataset.labels).tolist() == [500] * 10
    image, label = dataset[0]
    assert label == 0 and image.dtype == torch.uint8 and int(image.max()) == 255
    # The first row of ink, and nothing at all around the digit: no label among the pixels.
    assert image[0, 4, 15:20].tolist() == [51, 159, 253, 159, 50]
    assert not image[:, :4].any() and not image[:, -4:].any()


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
        with pytest.raises(
            InputError, match="a text of grey levels, a folder of images or a .npz file"
        ):
            load_dataset(tmp_path / "nowhere")
    finally:
        registry.FORMATS[:] = [f for f in registry.FORMATS if f.load is not load]
    assert len(registry.FORMATS) == known


def test_labels_without_names_are_numbers():
    dataset = ArrayDataset(np.zeros((3, 2, 2, 1), np.uint8), labels=np.array([0, 2, 2], np.int32))
    assert dataset.class_names == ["0", "1", "2"] and dataset.numbered
    assert dataset.num_classes == 3 and dataset[1][1] == 2


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (np.zeros((2, 4, 4, 1), np.int32), None, "images are int32 .*expected a uint8 array"),
        (np.full((2, 4, 4, 1), 1.5), None, r"images: float64 .*floats in \[-1, 1\].*from 1.5 to"),
        (np.zeros((2, 4, 4), np.uint8), None, r"images are uint8 \(2, 4, 4\); expected"),
        (torch.zeros(2, 4, 4, 1, dtype=torch.uint8), None, "expected a uint8 array"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0]), r"labels are int64 \(1,\); expected"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, -1]), "expected class numbers from 0"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0.0, 1.0]), "labels are float64"),
    ],
)
def test_arrays_that_are_no_images(images, labels, message):
    with pytest.raises(InputError, match=message):
        ArrayDataset(images, labels=labels)
