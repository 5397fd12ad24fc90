"""Conversions, pictures, .npz samples and loss curves."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import images as out
from fastdiff.data import load_dataset
from fastdiff.errors import InputError


def picture(count=3, channels=3, height=4, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


# --- floats and bytes -----------------------------------------------------------------------


def test_bytes_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = out.to_float(levels)
    assert floats.dtype == torch.float32 and floats[0] == -1 and floats[255] == 1
    assert torch.equal(out.to_uint8(floats), levels)
    assert torch.equal(out.to_uint8(floats.double()), levels)


def test_rounding():
    levels = torch.tensor([0.2, 0.8, 100.4, 100.6, 254.8])
    x = levels / 127.5 - 1
    assert out.to_uint8(x).tolist() == [0, 1, 100, 101, 255]
    assert out.to_uint8(x, rounding="truncate").tolist() == [0, 0, 100, 100, 254]


def test_values_outside_are_clipped():
    x = torch.tensor([-1.7, -1.0, 1.0, 1.004, 30.0])
    for rounding in ("nearest", "truncate"):
        assert out.to_uint8(x, rounding).tolist() == [0, 0, 255, 255, 255]


def test_half_precision_is_computed_in_float32():
    x = torch.tensor([0.5], dtype=torch.bfloat16)
    assert out.to_uint8(x).item() == 191


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_colour_for_what_is_not_finite(value):
    with pytest.raises(InputError, match="not finite"):
        out.to_uint8(torch.tensor([0.0, value]))


def test_conversion_arguments():
    with pytest.raises(InputError, match="rounding is 'up'"):
        out.to_uint8(torch.zeros(1), "up")
    with pytest.raises(
        InputError, match="to_float takes uint8, uint16 or float images, got .*int32"
    ):
        out.to_float(torch.zeros(1, dtype=torch.int32))


# --- pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grid_places_every_image(channels, tmp_path):
    images = picture(5, channels)
    path = out.save_grid(images, tmp_path / "deep" / "grid.png", columns=2, scale=3)
    shown = np.asarray(Image.open(path))
    shown = shown.reshape(*shown.shape[:2], channels)
    gap = out.SEPARATOR
    assert shown.shape[:2] == (3 * (12 + gap) + gap, 2 * (15 + gap) + gap)
    for i in range(5):
        top, left = gap + i // 2 * (12 + gap), gap + i % 2 * (15 + gap)
        cell = shown[top : top + 12, left : left + 15]
        for offset in range(3):  # nearest-neighbour: every pixel became a 3x3 block
            assert np.array_equal(cell[offset::3, offset::3], images[i].permute(1, 2, 0).numpy())
    assert (shown[-1, :, :1] == out.SEPARATOR_GREY).all()


def test_grid_is_large_enough_to_look_at(tmp_path):
    for size, count in [(8, 64), (32, 1), (64, 100)]:
        path = out.save_grid(picture(count, 1, size, size), tmp_path / "grid.png")
        width, height = Image.open(path).size
        assert 600 <= width <= 600 + 8 * size * 10 and width == height


def test_grid_takes_arrays_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")
    out.save_grid(picture().numpy(), path)
    assert Image.open(path).mode == "RGB"
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_pngs(tmp_path):
    images = picture(3, 1)
    paths = out.save_pngs(images, tmp_path / "all", start=10)
    assert [path.name for path in paths] == [f"sample_0000{n}.png" for n in (10, 11, 12)]
    assert np.array_equal(np.asarray(Image.open(paths[2])), images[2, 0].numpy())


def test_trajectory_has_a_row_per_image_and_a_column_per_step(tmp_path):
    frames = torch.stack([torch.full((2, 1, 4, 4), 10 * step) for step in range(20)])
    frames = frames.to(torch.uint8)
    frames[:, 1] += 1
    path = out.save_trajectory(list(frames), tmp_path / "t.png", max_columns=5, scale=1)
    shown = np.asarray(Image.open(path))
    assert shown.shape == (2 * 6 + 2, 5 * 6 + 2)
    middles = shown[3::6, 3::6]
    assert middles[0, 0] == 0 and middles[0, -1] == 190
    assert (np.diff(middles[0].astype(int)) > 0).all()
    assert np.array_equal(middles[1], middles[0] + 1)
    last = out.save_trajectory(frames, tmp_path / "t.png", max_columns=1, scale=1)
    assert np.asarray(Image.open(last))[3, 3] == 190


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 4, 4),
        torch.zeros(1, 2, 4, 4, dtype=torch.uint8),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.zeros(0, 3, 4, 4, dtype=torch.uint8),
    ],
)
def test_what_is_no_picture(images, tmp_path):
    for write in (out.save_grid, out.save_pngs):
        with pytest.raises(InputError, match="picture needs uint8"):
            write(images, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_bad_layout_arguments(tmp_path):
    for options in ({"columns": 0}, {"scale": 0}):
        with pytest.raises(InputError, match="positive"):
            out.save_grid(picture(), tmp_path / "x.png", **options)
    with pytest.raises(InputError, match="nothing to draw"):
        out.save_trajectory([], tmp_path / "x.png")


# --- samples --------------------------------------------------------------------------------


def test_samples_in_the_published_format(tmp_path):
    images = picture(6, 3, 4, 5).permute(0, 2, 3, 1)
    path = out.save_samples_npz(tmp_path / "run", images, torch.arange(6, dtype=torch.int32))
    assert path == tmp_path / "run" / "samples_6x4x5x3.npz"
    with np.load(path) as archive:
        assert sorted(archive) == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_1"].dtype == np.int64
    read, labels = out.load_samples_npz(path)
    assert np.array_equal(read, images.numpy()) and labels.tolist() == list(range(6))
    assert out.load_samples_npz(out.save_samples_npz(tmp_path / "x.npz", images))[1] is None


def test_samples_of_the_wrong_form(tmp_path):
    good = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(InputError, match=r"float32 \(2, 4, 4, 3\)"):
        out.save_samples_npz(tmp_path, good.astype(np.float32))
    with pytest.raises(InputError, match=r"labels: int64 \(3,\)"):
        out.save_samples_npz(tmp_path, good, np.zeros(3, np.int64))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, r"uint8 \(2, 4, 4\), expected uint8 \(N, H, W"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "float64"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "holds images, expected arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, int)}, "arr_1"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(2)}, "arr_1: float64"),
        ({"arr_0": np.array([{}], object)}, "not a readable .npz"),
    ],
)
def test_bad_npz(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        out.load_samples_npz(tmp_path / "a.npz")


def test_unreadable_npz(tmp_path):
    with pytest.raises(InputError, match="no file"):
        out.load_samples_npz(tmp_path / "a.npz")
    path = out.save_samples_npz(tmp_path, np.zeros((2, 40, 40, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match="not a readable .npz"):
        out.load_samples_npz(path)
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(InputError, match="not a readable .npz"):
        out.load_samples_npz(tmp_path / "a.npz")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = out.save_samples_npz(tmp_path / "a.npz", np.zeros((1, 2, 2, 1), np.uint8))

    def fail(stream, *arrays):
        stream.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space"):
        out.save_samples_npz(path, np.ones((1, 2, 2, 1), np.uint8))
    assert out.load_samples_npz(path)[0].max() == 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


# --- arrays the wrong way round ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 28, 28), (5, 4, 6, 9), (2, 3, 32, 7)])
def test_channels_first_are_refused_with_the_transpose(shape, tmp_path):
    images = np.zeros(shape, np.uint8)
    np.savez(tmp_path / "a.npz", images)
    calls = [
        lambda: out.load_samples_npz(tmp_path / "a.npz"),
        lambda: load_dataset(tmp_path / "a.npz"),
        lambda: out.save_samples_npz(tmp_path / "b.npz", images),
        lambda: out.save_samples_npz(tmp_path / "b.npz", torch.from_numpy(images)),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"channels first; .*images\.transpose\(0, 2, 3, 1\)"):
            call()
    assert not (tmp_path / "b.npz").exists()
    np.savez(tmp_path / "a.npz", images.transpose(0, 2, 3, 1))
    assert load_dataset(tmp_path / "a.npz").channels == shape[1]


@pytest.mark.parametrize(
    "shape", [(2, 3, 9, 3), (2, 4, 4, 5), (2, 1, 9, 1), (2, 8, 8, 3), (2, 3, 9, 2), (2, 5, 5, 8)]
)
def test_low_pictures_are_no_channels(shape, tmp_path):
    path = out.save_samples_npz(tmp_path / "a.npz", np.zeros(shape, np.uint8))
    assert out.load_samples_npz(path)[0].shape == shape
    data = load_dataset(path)
    assert (*data.image_size, data.channels) == shape[1:]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.array([0.0, 1.0], np.float32), r"from 0 to 1, .*\(images \* 255\.0\)\.round"),
        (np.array([-1.0, 1.0]), r"from -1 to 1, .*\(\(images \+ 1\) \* 127\.5\)"),
        (np.array([0.0, 254.6]), r"to 254\.6, .*images\.round\(\)\.astype\(numpy\.uint8\)"),
        (np.array([0, 255]), "from 0 to 255, convert"),
        (np.array([0, 65535], np.uint16), r"bring them to 0 \.\.\. 255 first"),
        (np.array([False, True]), r"\(images \* 255\.0\)"),
        (np.array([np.nan, 1.0]), "not finite"),
    ],
)
def test_other_numbers_are_refused_with_the_conversion(images, words, tmp_path):
    images = np.resize(images, (2, 4, 4, 3))
    np.savez(tmp_path / "a.npz", images)
    with pytest.raises(
        InputError, match=rf"arr_0: {images.dtype} .*uint8 \(N, H, W, C\): .*{words}"
    ):
        load_dataset(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("shape", "words"),
    [((2, 4, 4), r"images\[\.\.\., None\]"), ((4, 4, 3), r"images\[None\]")],
)
def test_a_missing_axis_is_refused_with_the_index(shape, words, tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match=words):
        load_dataset(tmp_path / "a.npz")


def test_pictures_of_channels_last_are_refused_with_the_transpose(tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    for save in (out.save_grid, out.save_pngs):
        with pytest.raises(InputError, match=r"images\.transpose\(0, 3, 1, 2\)"):
            save(images, tmp_path / "x")
        with pytest.raises(InputError, match=r"images\.permute\(0, 3, 1, 2\)"):
            save(torch.from_numpy(images), tmp_path / "x")
        with pytest.raises(InputError, match="to_uint8"):
            save(np.zeros((2, 3, 8, 8)), tmp_path / "x")
    with pytest.raises(InputError, match=r"transpose\(0, 3, 1, 2\)"):
        out.save_trajectory([images], tmp_path / "x")


def test_a_capital_suffix_is_one(tmp_path):
    path = out.save_samples_npz(tmp_path / "a.npz", np.zeros((2, 8, 8, 3), np.uint8))
    assert len(load_dataset(path.rename(tmp_path / "A.NPZ"))) == 2
