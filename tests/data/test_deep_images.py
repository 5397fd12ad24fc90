"""Images of 16 bits and of floats, which are never cut to 8 bits unseen."""

import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from fastdiff.data import ArrayDataset, BatchStream, load_dataset
from fastdiff.data.dataset import check_bytes
from fastdiff.errors import InputError
from fastdiff.images import to_float

LEVELS = np.random.default_rng(0).integers(0, 65536, (3, 6, 8), np.uint16)


def write_folder(folder, suffix="png"):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(LEVELS):
        if suffix == "pgm":
            content = b"P5\n8 6\n65535\n" + image.astype(">u2").tobytes()
            (folder / f"{number}.pgm").write_bytes(content)
        else:
            Image.fromarray(image).save(folder / f"{number}.{suffix}")
    return folder


def rgb_of_16_bits(width=4, height=2):
    """A colour PNG of 16 bits, which Pillow reads and cannot write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content)
        )  # fmt: skip

    rows = b"".join(b"\0" + bytes(range(6 * width)) for _ in range(height))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + end


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_greyscale_of_16_bits(suffix, cache_bytes, tmp_path):
    dataset = load_dataset(write_folder(tmp_path / "a", suffix), cache_bytes=cache_bytes)
    assert dataset.dtype == torch.uint16 and dataset.channels == 1
    images = dataset.gather(np.arange(3))
    assert images.dtype == torch.uint16 and np.array_equal(images[:, 0].numpy(), LEVELS)
    assert "modes    I;16 3; read in 1 channel" in dataset.describe()
    colour = load_dataset(tmp_path / "a", channels=3)[1][0]
    assert np.array_equal(colour.numpy(), np.stack([LEVELS[1]] * 3))
    half = load_dataset(tmp_path / "a", image_size=3)[0][0]
    pairs = LEVELS[0].astype(np.float64).reshape(3, 2, 4, 2).mean((1, 3))
    assert half.shape == (1, 3, 3) and np.abs(half[0].numpy() - pairs[:, :3]).max() <= 0.5


def test_mirrored_batches_of_16_bits(tmp_path):
    dataset = load_dataset(write_folder(tmp_path / "a"), random_flip=True)
    seen = torch.cat([images for images, _ in (next(BatchStream(dataset, 32)) for _ in "ab")])
    known = {image.tobytes(): False for image in LEVELS}
    known |= {np.ascontiguousarray(image[:, ::-1]).tobytes(): True for image in LEVELS}
    assert {known[image.numpy().tobytes()] for image in seen[:, 0]} == {False, True}


def test_16_bits_in_a_zip_and_beside_8(tmp_path):
    folder = write_folder(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(folder / "0.png", "0.png")
    assert load_dataset(tmp_path / "a.zip").dtype == torch.uint16
    with pytest.raises(InputError, match="16 bits, of which 4 channels cannot be made"):
        load_dataset(folder, channels=4)
    dataset = load_dataset(folder)
    Image.new("L", (8, 6)).save(folder / "1.png")
    with pytest.raises(InputError, match=r"1\.png' is now of uint8, was of uint16"):
        dataset[1]
    for channels in (None, 1, 3):
        with pytest.raises(InputError, match=r"0\.png' is greyscale of 16 bits and '.*1\.png' is"):
            load_dataset(folder, channels=channels)


def test_colours_of_16_bits_are_cut_and_it_is_said(tmp_path):
    (tmp_path / "a.png").write_bytes(rgb_of_16_bits())
    (tmp_path / "b.ppm").write_bytes(b"P6\n4 2\n65535\n" + bytes(48))
    dataset = load_dataset(tmp_path)
    assert dataset.dtype == torch.uint8 and dataset[0][0][:, 0, 0].tolist() == [0, 2, 4]
    assert "RGB;16 2; read in 3 channels; colours of 16 bits cut to 8" in dataset.describe()
    (tmp_path / "b.ppm").write_bytes(b"P6\n4 2\n255\n" + bytes(24))
    assert "RGB;16 1, RGB 1" in load_dataset(tmp_path).describe()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint16])
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_arrays(suffix, dtype, tmp_path):
    images = (LEVELS[..., None] / 32767.5 - 1).astype(dtype)
    if dtype == np.uint16:
        images = LEVELS[..., None]
    (np.savez if suffix == ".npz" else np.save)(tmp_path / f"a{suffix}", images)
    dataset = load_dataset(tmp_path / f"a{suffix}")
    kept = torch.uint16 if dtype == np.uint16 else torch.float32
    assert dataset.dtype == kept and dataset[0][0].dtype == kept
    assert torch.equal(dataset.images[:, 0], torch.from_numpy(images[..., 0]).to(kept))
    assert f"1-channel {np.dtype(dtype)} from" in dataset.describe()
    with pytest.raises(InputError, match=r"has no labels, .*: .*(arr_1|\.npz)"):
        load_dataset(tmp_path / f"a{suffix}", class_cond=True)
    small = load_dataset(tmp_path / f"a{suffix}", image_size=4, channels=3)[0][0]
    assert small.shape == (3, 4, 4) and small.dtype == kept
    with pytest.raises(
        InputError, match=f"needs images of 8 bits .*these are torch.{str(kept)[6:]}"
    ):
        check_bytes(dataset, "this")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.full((1, 4, 4, 1), 254.5), r"floats in \[-1, 1\].*from 254.5 to .*astype\(numpy.uint8"),
        (np.full((1, 4, 4, 1), -1.01), r"floats in \[-1, 1\].*bring them to"),
        (np.full((1, 4, 4, 1), np.nan), r"floats in \[-1, 1\].*not finite"),
        (np.zeros((1, 4, 4, 1), np.int64), r"int64 .*uint8 \(N, H, W, C\), or of uint16 or floats"),
        (np.zeros((4, 4, 1), np.float32), r"float32 \(4, 4, 1\), expected uint8 \(N, H, W, C\)"),
        (np.zeros((0, 4, 4, 1), np.float32), "holds no images"),
        (np.zeros((2, 3, 8, 8), np.float32), "channels first"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_other_arrays_are_refused(suffix, images, words, tmp_path):
    (np.savez if suffix == ".npz" else np.save)(tmp_path / f"a{suffix}", images)
    with pytest.raises(InputError, match=rf"a\{suffix}'.*{words}"):
        load_dataset(tmp_path / f"a{suffix}")


def test_a_npy_file_that_is_none(tmp_path):
    np.save(tmp_path / "a.npy", LEVELS[..., None])
    content = (tmp_path / "a.npy").read_bytes()
    for damaged in (b"", content[:40], content[:-5], b"text"):
        (tmp_path / "a.npy").write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.npy' is not a readable \.npy file"):
            load_dataset(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4, 2), np.uint16))
    with pytest.raises(InputError, match="2 channels"):
        load_dataset(tmp_path / "a.npy", channels=3)
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4, 3), np.uint16))
    with pytest.raises(InputError, match="3 channels of uint16, of which 1 cannot be made"):
        load_dataset(tmp_path / "a.npy", channels=1)


@settings(max_examples=50)
@given(arrays(np.uint16, 5), arrays(np.float32, 5, elements=st.floats(-1, 1, width=32)))
def test_to_float(levels, floats):
    scaled = to_float(torch.from_numpy(levels))
    assert scaled.dtype == torch.float32 and scaled.abs().max() <= 1
    back = ((scaled.double() + 1) * 32767.5).round()
    assert np.array_equal(back.numpy(), levels)
    assert torch.equal(to_float(torch.from_numpy(floats)), torch.from_numpy(floats))
    assert to_float(torch.from_numpy(floats).double()).dtype == torch.float32
    ends = to_float(torch.from_numpy(np.array([0, 65535], np.uint16)))
    assert ends.tolist() == [-1, 1]


def test_bicubic_weights_do_not_leave_the_range():
    edges = np.where(np.arange(12) % 6 < 3, -1, 1).astype(np.float32)
    images = np.broadcast_to(edges[:, None, None], (1, 12, 12, 1))
    assert ArrayDataset(images)[0][0].abs().max() == 1


@pytest.mark.cuda
def test_to_float_on_a_gpu():
    levels = torch.from_numpy(LEVELS)
    assert torch.equal(to_float(levels.cuda()).cpu(), to_float(levels))
