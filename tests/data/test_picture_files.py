"""Folders as people have them: photos with EXIF, broken and foreign files, what systems leave."""

import os
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastdiff.data import load_dataset
from fastdiff.data.pictures import read_header
from fastdiff.errors import InputError

PIXELS = np.arange(5 * 8 * 3, dtype=np.uint8).reshape(5, 8, 3) * 2  # 8 wide, 5 high


def write(path, size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, **options)
    return path


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png(width, height, *chunks):
    """A PNG of these chunks, (kind, content) each, after its header."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# --- EXIF -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (5, lambda pixels: pixels.swapaxes(0, 1)),
        (6, lambda pixels: np.rot90(pixels, -1)),
        (7, lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1)),
        (8, lambda pixels: np.rot90(pixels, 1)),
    ],
)
def test_a_tiff_on_its_side(orientation, turn, compression, channels, tmp_path):
    # Against numpy: Pillow's own reading of an uncompressed one is scrambled.
    pixels = np.arange(12 * 20 * channels, dtype=np.uint16).astype(np.uint8)
    pixels = pixels.reshape(12, 20, channels)
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    picture.save(tmp_path / "a.tif", exif=exif(orientation), compression=compression)
    dataset = load_dataset(tmp_path, channels=channels)
    assert dataset.image_size == (20, 12)
    assert np.array_equal(dataset[0][0].permute(1, 2, 0).numpy(), turn(pixels))
    square = load_dataset(tmp_path, image_size=12, channels=channels)[0][0]
    assert np.array_equal(square.permute(1, 2, 0).numpy(), turn(pixels)[4:16])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation, suffix, tmp_path):
    (tmp_path / "same").mkdir()
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(PIXELS).save(path, exif=exif(orientation))
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    dataset = load_dataset(tmp_path)
    assert dataset.image_size == upright.shape[:2] == ((8, 5) if orientation > 4 else (5, 8))
    assert np.array_equal(dataset[0][0].permute(1, 2, 0).numpy(), upright)
    resized = load_dataset(tmp_path, image_size=4)[0][0]
    Image.fromarray(upright).save(tmp_path / "same" / "a.png")
    assert torch.equal(resized, load_dataset(tmp_path / "same", image_size=4)[0][0])


def test_upright_and_tagged_are_of_one_size(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    Image.fromarray(np.rot90(PIXELS)).save(tmp_path / "b.png", exif=exif(6))
    dataset = load_dataset(tmp_path)
    assert torch.equal(dataset[0][0], dataset[1][0])


def test_orientation_behind_the_pixels_and_in_xmp(tmp_path):
    pixels = (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in PIXELS)))
    tags = (b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "a.png").write_bytes(png(8, 5, pixels, tags))
    (tmp_path / "b.png").write_bytes(png(8, 5, tags, pixels))
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    Image.fromarray(PIXELS).save(tmp_path / "c.png", pnginfo=info)
    dataset = load_dataset(tmp_path)
    assert dataset.image_size == (8, 5)
    for i in range(3):
        assert np.array_equal(dataset[i][0].permute(1, 2, 0).numpy(), np.rot90(PIXELS, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("tags", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_broken_exif_breaks_no_picture(tags, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=tags)
    (tmp_path / "b.png").write_bytes(
        png(8, 5, (b"IDAT", zlib.compress(b"\0" * (25 * 5))), (b"eXIf", tags))
    )
    for orientation in (0, 9, 65535):
        Image.fromarray(PIXELS).save(tmp_path / f"{orientation}.jpg", exif=exif(orientation))
    dataset = load_dataset(tmp_path)
    assert dataset.image_size == (5, 8) and len({dataset[i][0].shape for i in range(5)}) == 1


def test_headers_are_read_without_the_pixels(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    Image.fromarray(PIXELS).save(tmp_path / "b.jpg", exif=exif(6))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", pytest.fail)
    assert read_header(tmp_path / "a.png", None).size == (8, 5)
    assert read_header(tmp_path / "b.jpg", None).size == (5, 8)


# --- the limit on pixels ----------------------------------------------------------------------


def test_a_picture_of_182_megapixels(tmp_path):
    path = tmp_path / "huge.png"
    path.write_bytes(png(13500, 13500, (b"IDAT", b"")))
    with pytest.raises(InputError) as caught:
        load_dataset(tmp_path, image_size=8)
    for words in ("huge.png", "182,250,000", "limit of 178,956,970", "--max-pixels 182250000"):
        assert words in str(caught.value)
    assert len(load_dataset(tmp_path, image_size=8, max_pixels=182_250_000)) == 1
    with pytest.raises(InputError, match="--max-pixels"):
        load_dataset(tmp_path, image_size=8, max_pixels=182_249_999)


def test_the_limit_is_one_line_between_pillows_two(tmp_path):
    (tmp_path / "large.png").write_bytes(png(10000, 10000, (b"IDAT", b"")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_dataset(tmp_path, image_size=8)) == 1


def test_limits_of_two_sets_in_two_threads(tmp_path):
    write(tmp_path / "a.png", (20, 20))
    before, refused, read = Image.MAX_IMAGE_PIXELS, [], []

    def load(limit, count):
        for _ in range(count):
            try:
                read.append((limit, load_dataset(tmp_path, max_pixels=limit)[0][0].shape))
            except InputError:
                refused.append(limit)

    threads = [threading.Thread(target=load, args=(limit, 20)) for limit in (399, 400)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert read == [(400, (3, 20, 20))] * 20 and refused == [399] * 20
    assert Image.MAX_IMAGE_PIXELS == before


def test_pillows_own_limit_counts_where_it_was_changed(tmp_path, monkeypatch):
    write(tmp_path / "a.png", (20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="20x20 = 400 pixels, more than the limit of 200"):
        load_dataset(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.png").write_bytes(png(20000, 20000, (b"IDAT", b"")))
    assert len(load_dataset(tmp_path, image_size=8)) == 1
    with pytest.raises(InputError, match="max_pixels is 0"):
        load_dataset(tmp_path, max_pixels=0)


def test_a_strip_that_would_fill_the_memory(tmp_path):
    Image.new("L", (60000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(InputError, match=r"strip\.png' is 60000x1, so long that 3,932,160,000"):
        load_dataset(tmp_path, image_size=256)
    assert load_dataset(tmp_path, image_size=8)[0][0].shape == (1, 8, 8)


# --- broken files ---------------------------------------------------------------------------


def broken_folder(folder):
    for number in range(4):
        write(folder / f"ok_{number}.png", (64, 64))
    cut = write(folder / "cut.jpg", (64, 64))
    cut.write_bytes(cut.read_bytes()[:-200])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("<html>404</html>")
    Image.fromarray(np.full((64, 64), 0.5, np.float32)).save(folder / "deep.tif")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "round.png").symlink_to(folder / "round.png")
    return folder


def test_broken_files_are_left_out_on_request(tmp_path):
    folder = broken_folder(tmp_path)
    dataset = load_dataset(folder, skip_broken=True)
    assert [file.name for file in dataset.files] == [f"ok_{i}.png" for i in range(4)]
    assert [dataset[i][0].shape for i in range(4)] == [(3, 64, 64)] * 4
    (line,) = [text for text in dataset.describe().splitlines() if text.startswith("  broken")]
    assert "6, left out" in line and "'cut.jpg'" in line and "and 3 more" in line
    with pytest.raises(InputError, match=r"not a readable image.*--skip-broken.*\(6 of 10 files\)"):
        load_dataset(folder)


def test_a_file_that_breaks_later_is_named(tmp_path):
    path = write(tmp_path / "a.png", (64, 64))
    dataset = load_dataset(tmp_path, skip_broken=True)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"a\.png' cannot be decoded: .*--skip-broken"):
        dataset[0]


def test_nothing_but_broken_files(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError, match=r"no image file that is whole.*a\.png.*file is empty"):
        load_dataset(tmp_path, skip_broken=True)
    with pytest.raises(InputError, match=r"a\.png' is not a readable image: the file is empty"):
        load_dataset(tmp_path)


def test_a_class_of_broken_files_is_no_class(tmp_path):
    write(tmp_path / "cat" / "0.png")
    write(tmp_path / "dog" / "0.png")
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "0.png").write_text("no picture")
    dataset = load_dataset(tmp_path, class_cond=True, skip_broken=True)
    assert dataset.class_names == ["cat", "dog"]
    assert "'eel/0.png'" in dataset.describe()


# --- what lies beside -----------------------------------------------------------------------


def test_what_is_passed_over_is_said(tmp_path):
    for name in ("cat/0.png", "cat/1.JFIF", "dog/2.Jpg"):
        write(tmp_path / name, format="JPEG" if not name.endswith("png") else None)
    for folder in ("@eaDir", "__MACOSX", ".thumbnails", "$RECYCLE.BIN", "lost+found", "cat/@eaDir"):
        write(tmp_path / folder / "0.png", (3, 3))
    for name in ("a.heic", "b.HEIC", "c.avif", "notes.txt", "README", "cat/Thumbs.db", "._0.png"):
        (tmp_path / name).touch()
    (tmp_path / "eel").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dog" / "up").symlink_to(tmp_path)
    dataset = load_dataset(tmp_path, class_cond=True)
    assert dataset.class_names == ["cat", "dog"] and len(dataset) == 3
    lines = dataset.describe().splitlines()
    assert lines[0] == f"{tmp_path}: 3 images"
    assert lines[1:4] == [
        "  sizes    8x8 3",
        "  modes    RGB 3; read in 3 channels",
        "  classes  2, from folders: cat 2, dog 1",
    ]
    for words in (
        ".heic 2, .avif 1 (pictures in formats that are not read)",
        "without a suffix 1, .txt 1 (no pictures)",
        "@eaDir 2",
        "__MACOSX 1",
        "Thumbs.db 1",
        "hidden 2",
        "read already 1",
        "pipes and devices 1",
        "folders without images: eel",
    ):
        assert words in lines[4]
    assert len(lines) == 5


def test_nothing_but_foreign_files(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(InputError, match=r"no image files.*passed over: \.heic 1"):
        load_dataset(tmp_path)


def test_the_summary_is_short_whatever_there_is(tmp_path):
    for number in range(40):
        write(tmp_path / f"{number:03d}{'x' * 90}" / "0.png", (5 + number, 6))
        (tmp_path / f"a.{number}").touch()
    text = load_dataset(tmp_path, image_size=4, class_cond=True).describe()
    assert len(text.splitlines()) == 5 and max(map(len, text.splitlines())) < 600
    for words in ("and 32 more; brought to 4x4", "40, from folders (1 to 1 images each)"):
        assert words in text


def test_names_that_are_no_text(tmp_path):
    folder = os.fsencode(tmp_path)
    for name in (b"caf\xe9", b"two\nlines"):
        os.mkdir(folder + b"/" + name)
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", folder + b"/" + name + b"/\xff.png")
    dataset = load_dataset(tmp_path, class_cond=True)
    assert dataset.num_classes == 2 and dataset[1][0].shape == (3, 8, 8)
    text = dataset.describe()
    assert text.isprintable() or len(text.splitlines()) == 4
    text.encode("utf-8")
    assert r"caf\udce9 1" in text and r"two\nlines 1" in text


def test_a_name_with_a_comma_is_one_name_in_a_list(tmp_path):
    for name in ("fly, house", "ant"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.png")
    dataset = load_dataset(tmp_path, class_cond=True)
    assert 'classes  2, from folders: ant 1, "fly, house" 1' in dataset.describe()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_listed(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(InputError, match="closed' cannot be listed"):
        load_dataset(tmp_path)


def test_a_listing_that_fails_is_one_line(tmp_path, monkeypatch):
    def closed(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", closed)
    with pytest.raises(InputError, match=r"cannot be listed \(Permission denied\)"):
        load_dataset(tmp_path)


def test_animations_show_their_first_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for suffix in ("gif", "webp", "png", "tif"):
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    dataset = load_dataset(tmp_path)
    for i in range(4):
        assert dataset[i][0][:, 0, 0].tolist() == [255, 0, 0]
    assert "; of animations and pages the first" in dataset.describe()
    write(tmp_path / "still" / "a.png")
    assert "of animations" not in load_dataset(tmp_path / "still").describe()


# --- labels through load_dataset ----------------------------------------------------------------


def test_two_readings_are_refused_only_where_labels_are_demanded(tmp_path):
    for name in ("part0/cat_0.png", "part0/dog_1.png", "part1/cat_2.png"):
        write(tmp_path / name)
    with pytest.raises(InputError, match=r"in several ways.*--labels folders or --labels prefixes"):
        load_dataset(tmp_path, class_cond=True)
    assert load_dataset(tmp_path, class_cond=False).num_classes is None
    assert load_dataset(tmp_path, class_cond=False, labels="prefixes").num_classes is None
    unsure = load_dataset(tmp_path, class_cond=None)
    assert unsure.num_classes is None and "none taken: the classes can be" in unsure.describe()
    for condition in (True, None):
        chosen = load_dataset(tmp_path, class_cond=condition, labels="prefixes")
        assert chosen.class_names == ["cat", "dog"] and chosen.reading == "prefixes"
    assert load_dataset(
        tmp_path, class_cond=True, known_classes=["dog", "cat"]
    ).labels.tolist() == [
        0,
        1,
        0,
    ]
    with pytest.raises(InputError, match="labels is 'names', expected one of folders"):
        load_dataset(tmp_path, labels="names")
