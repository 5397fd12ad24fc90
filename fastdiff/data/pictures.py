"""One picture file: opened within a limit, measured and decoded upright, as its EXIF says.

Pillow's own limit on pixels is one global of the process, and between it and its double a picture
is read with a warning. Here a limit belongs to a data set, and files are opened by Pillow's
plugins without ``Image.open``, which alone looks at that global (WebP and GIF look there too).
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import numpy as np

from fastdiff.data.text import plain
from fastdiff.data.transforms import to_array
from fastdiff.errors import InputError
from fastdiff.optional import require

ORIENTATION = 0x0112  # EXIF's tag
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
LATE_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # PNG chunks that can hold EXIF or XMP


class PictureFile(Protocol):
    """A Path, or a member of an archive: it opens, and ``str`` of it is its name."""

    def open(self, mode: Literal["rb"], /) -> BinaryIO: ...


class Header(NamedTuple):
    """mode: Pillow's, or with ";16" behind it where the file has 16 bits, which Pillow keeps in
    greyscale alone ("I;16"). size: (width, height) of the upright picture. several: animated, or
    of several pages."""

    file: PictureFile
    mode: str
    size: tuple[int, int]
    several: bool


def read_header(file: PictureFile, max_pixels: int | None) -> Header:
    """Everything but the pixels. Raises whatever Pillow raises, and InputError for the limit."""
    with _opened(file, max_pixels) as (image, stream):
        width, height = image.size
        mode = _mode(image)
        if image.format == "PNG" and _metadata_after_pixels(stream):
            _load_if_whole(image)
        turned = _orientation(image) in SIDEWAYS
        if hasattr(image, "tag_v2") and image.tag_v2.get(ORIENTATION) in SIDEWAYS:
            turned = False  # a TIFF: Pillow turns it, and has exchanged the sides already
        return Header(file, mode, (height, width) if turned else (width, height), _several(image))


def decode(
    file: PictureFile, image_size: int | None, channels: int, max_pixels: int | None
) -> np.ndarray:
    """uint8 or, of 16-bit greyscale, uint16 (H, W, C), upright. Raises whatever Pillow raises, and
    InputError for the limit."""
    with _opened(file, max_pixels) as (image, _):
        image.load()
        return to_array(_upright(image), image_size, channels)


def check_pixels(file: PictureFile, max_pixels: int | None) -> None:
    """Decode the whole file and forget it; raises as ``decode`` does."""
    with _opened(file, max_pixels) as (image, _):
        image.load()


def pixel_limit(max_pixels: int | None) -> float:
    """The most pixels a picture may have: what was asked for, or else what Pillow refuses."""
    if max_pixels is not None:
        return max_pixels
    pillows = require("PIL.Image", "train").MAX_IMAGE_PIXELS
    return float("inf") if pillows is None else 2 * pillows


@contextmanager
def _opened(file: PictureFile, max_pixels: int | None) -> Iterator[tuple[Any, BinaryIO]]:
    """The Pillow image in ``file``, not decoded yet, and the stream it reads."""
    pillow = require("PIL.Image", "train")
    with file.open("rb") as stream:
        try:
            image = _identify(pillow, stream)
        except pillow.DecompressionBombError as error:
            raise InputError(
                f"'{plain(file)}' is larger than Pillow lets its format be ({error}): set "
                "PIL.Image.MAX_IMAGE_PIXELS, or convert the picture to PNG"
            ) from error
        pixels, limit = image.width * image.height, pixel_limit(max_pixels)
        if pixels > limit:
            raise InputError(
                f"'{plain(file)}' has {image.width}x{image.height} = {pixels:,} pixels, more "
                f"than the limit of {int(limit):,} that guards against pictures made to fill the "
                f"memory: if it is meant to be read, raise the limit with --max-pixels {pixels}"
            )
        yield image, stream


def _identify(pillow: Any, stream: BinaryIO) -> Any:
    """What ``Image.open`` does, without its limit.

    Pillow is not given the file's name: it would map uncompressed pixels into memory by it, and
    those of a TIFF on its side with the width and height exchanged, which scrambles them.
    """
    pillow.preinit()
    pillow.init()
    prefix = stream.read(16)
    if not prefix:
        raise ValueError("the file is empty")
    for kind in pillow.ID:
        factory, accept = pillow.OPEN[kind]
        accepted = accept is None or accept(prefix)
        if not accepted or isinstance(accepted, str):  # a string says what is missing
            continue
        stream.seek(0)
        try:
            return factory(stream, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # another kind of file
    raise ValueError("no kind of image that Pillow knows")


def _upright(image: Any) -> Any:
    """A decoded picture as it is meant to be seen (ImageOps.exif_transpose)."""
    turns = require("PIL.Image", "train").Transpose
    turn = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Any) -> int:
    """EXIF's (or XMP's) orientation, 1 to 8; 1 where it is missing or broken."""
    try:
        # Pillow's PNG has a getexif of its own, which decodes the picture first.
        found = require("PIL.Image", "train").Image.getexif(image).get(ORIENTATION)
    except Exception:  # damaged EXIF spoils no picture
        return 1
    return found if found in range(1, 9) else 1


def _mode(image: Any) -> str:
    """The mode of a picture that is not decoded yet."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return "I;16"
    for *_, arguments in image.tile:  # how a decoder is asked to read a part of the picture
        raw, *others = arguments if isinstance(arguments, tuple) else (arguments,)
        if ";16" in str(raw) or (image.format == "PPM" and others and others[0] > 255):
            return f"{image.mode};16"
    return image.mode


def _metadata_after_pixels(stream: BinaryIO) -> bool:
    """Whether a PNG tells about itself behind its pixels, where a header scan does not come."""
    before, pixels_seen, late = stream.tell(), False, False
    stream.seek(8)
    while not late and len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        pixels_seen |= kind == b"IDAT"
        late = pixels_seen and kind in LATE_METADATA
        stream.seek(length + 4, 1)
    stream.seek(before)
    return late


def _load_if_whole(image: Any) -> None:
    try:
        image.load()
    except Exception:  # reading the pixels will say so
        pass


def _several(image: Any) -> bool:
    """Whether there are more pictures than the first (a camera's MPO holds previews)."""
    try:
        return bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    except Exception:  # a GIF looks for its second frame, which may be broken
        return False
