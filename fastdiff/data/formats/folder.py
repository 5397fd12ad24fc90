"""A folder of image files."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.dataset import ImageDataset
from fastdiff.data.formats.registry import CACHE_BYTES, Options, image_format
from fastdiff.data.labels import Reading, Refusal, read_labels
from fastdiff.data.listing import SUFFIXES, list_folder
from fastdiff.data.pictures import Header, check_pixels, decode, pixel_limit, read_header
from fastdiff.data.summary import NOT_ASKED, Found
from fastdiff.data.text import plain
from fastdiff.errors import InputError, first_line

READ_THREADS = 8
KINDS = {
    "1": "greyscale",
    "L": "greyscale",
    "LA": "greyscale with alpha",
    "P": "colour",
    "RGB": "colour",
    "CMYK": "colour",
    "YCbCr": "colour",
    "RGBA": "colour with alpha",
    "PA": "colour with alpha",
}


class FolderDataset(ImageDataset):
    """Image files decoded on demand; a small set is kept in memory once read.

    Reading is safe from several threads. A file that cannot be decoded raises InputError with
    its name. ``load_dataset`` finds the files and makes this of them.

    Args:
        files: N paths of images.
        image_size: (H, W) in pixels that all have, after ``resize``.
        channels: 1, 3 or 4: grey, RGB or RGBA.
        resize: side to resize and centre-crop to; None leaves the images as they are.
        cache_bytes: the decoded images are kept if they are no more than this.
        max_pixels: the most pixels of a file; None: Pillow's limit.
        **options: the keyword arguments of :class:`ImageDataset`.
    """

    def __init__(
        self,
        files: list[Path],
        image_size: tuple[int, int],
        channels: int,
        *,
        resize: int | None,
        cache_bytes: int = CACHE_BYTES,
        max_pixels: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(len(files), image_size, channels, **options)
        self.files = files
        self._resize = resize
        self._max_pixels = max_pixels
        shape = (len(files), channels, *image_size)
        self._cache = np.empty(shape, np.uint8) if np.prod(shape) <= cache_bytes else None
        self._cached = np.zeros(len(files), bool)

    def gather(self, indices: np.ndarray) -> Tensor:
        if self._cache is None:
            return torch.from_numpy(np.stack([self._decode(i) for i in indices]))
        for i in indices[~self._cached[indices]]:
            self._cache[i] = self._decode(i)
            self._cached[i] = True  # after the pixels: another thread may be looking
        return torch.from_numpy(self._cache[indices])

    def _decode(self, index: int) -> np.ndarray:
        """uint8 (C, H, W)."""
        file = self.files[index]
        try:
            array = decode(file, self._resize, self.channels, self._max_pixels)
        except InputError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more
            raise InputError(
                f"'{plain(file)}' cannot be decoded: {first_line(error)}; mend or remove it, or "
                "leave out every such file with --skip-broken"
            ) from error
        if array.shape[:2] != self.image_size:
            raise InputError(
                f"'{plain(file)}' is now {_pixels(array.shape[1::-1])}, was "
                f"{_pixels(self.image_size[::-1])} when the folder was opened"
            )
        return array.transpose(2, 0, 1)


@image_format("a folder of images", Path.is_dir, general=True)
def load_folder(root: Path, options: Options) -> FolderDataset:
    """Open a folder and its sub-folders; every file's header is read now, its pixels later.

    With ``skip_broken`` the pixels are decoded now too, once, to know which files are whole.
    """
    listing = list_folder(root)
    skipped = listing.skipped()
    if not listing.files:
        passed_over = f"; passed over: {skipped}" if skipped else ""
        raise InputError(
            f"'{plain(root)}' holds no image files ({', '.join(sorted(SUFFIXES))}){passed_over}"
        )
    headers, broken = _read_headers(listing.files, options)
    if not headers:
        raise InputError(
            f"'{plain(root)}' holds no image file that is whole; the first is {broken[0]}"
        )
    found = Found(
        str(root),
        sizes=Counter(_pixels(header.size) for header in headers),
        modes=Counter(header.mode for header in headers),
        several=sum(header.several for header in headers),
        skipped=skipped,
        broken=[line.replace(f"'{plain(root)}/", "'", 1) for line in broken],
    )
    channels = options.channels or _choose_channels(headers)
    side = options.image_size
    width, height = _one_size(headers) if side is None else (side, side)
    files = [header.file for header in headers]
    reading = _read_classes(root, files, options, found)
    numbers, class_names = (None, None) if reading is None else _number(reading)
    return FolderDataset(
        files,
        (height, width),
        channels,
        resize=side,
        cache_bytes=options.cache_bytes,
        max_pixels=options.max_pixels,
        labels=numbers,
        class_names=class_names,
        random_flip=options.random_flip,
        reading=None if reading is None else reading.way,
        found=found,
    )


def _read_headers(files: list[Path], options: Options) -> tuple[list[Header], list[str]]:
    """Headers of the files that can be used; with ``skip_broken``, what the others suffer from."""
    image_size, max_pixels = options.image_size, options.max_pixels

    def read(file: Path) -> Header | InputError:
        try:
            header = read_header(file, max_pixels)
            if header.mode not in KINDS:
                raise InputError(
                    f"'{plain(file)}' has the pixel mode {header.mode}, expected 8 bits per "
                    "channel: convert it first"
                )
            if image_size is not None:
                _check_resized(header, image_size, max_pixels)
            if options.skip_broken:
                check_pixels(file, max_pixels)
            return header
        except InputError as error:
            return error
        except Exception as error:
            return InputError(f"'{plain(file)}' is not a readable image: {first_line(error)}")

    with ThreadPoolExecutor(READ_THREADS) as pool:
        results = list(pool.map(read, files))
    broken = [result for result in results if isinstance(result, InputError)]
    if broken and not options.skip_broken:
        raise InputError(
            f"{broken[0]}; --skip-broken leaves out what cannot be used ({len(broken)} of "
            f"{len(files)} files)"
        )
    return [result for result in results if isinstance(result, Header)], list(map(str, broken))


def _check_resized(header: Header, image_size: int, max_pixels: int | None) -> None:
    """A picture is resized before it is cropped, and a long strip would fill the memory then."""
    short, long = sorted(header.size)
    pixels = image_size**2 * long // short
    if pixels > pixel_limit(max_pixels):
        raise InputError(
            f"'{plain(header.file)}' is {_pixels(header.size)}, so long that {pixels:,} pixels "
            f"would be left of it at image size {image_size}: crop it first"
        )


def _choose_channels(headers: list[Header]) -> int:
    counts = Counter(KINDS[header.mode] for header in headers)
    if len(counts) > 1:
        first = {KINDS[header.mode]: header.file for header in reversed(headers)}
        found = ", ".join(
            f"{n} {kind} (such as '{plain(first[kind])}')" for kind, n in counts.items()
        )
        raise InputError(f"images of mixed modes: {found}; choose with --channels 1, 3 or 4")
    return 1 if next(iter(counts)).startswith("greyscale") else 3


def _one_size(headers: list[Header]) -> tuple[int, int]:
    """(width, height) of all images."""
    first = headers[0]
    for other in headers:
        if other.size != first.size:
            raise InputError(
                f"images of mixed sizes: '{plain(first.file)}' is {_pixels(first.size)} and "
                f"'{plain(other.file)}' is {_pixels(other.size)}; choose one with --image-size"
            )
    return first.size


def _read_classes(root: Path, files: list[Path], options: Options, found: Found) -> Reading | None:
    """The class of every file. Where none is demanded, why there are none goes to ``found``."""
    if options.class_cond is False:
        found.no_classes = NOT_ASKED
        return None
    parts = [file.relative_to(root).parts for file in files]
    reading = read_labels(parts, options.labels, options.known_classes)
    demanded = options.class_cond or options.labels is not None
    if isinstance(reading, Refusal):
        if demanded:
            raise InputError(f"'{plain(root)}': {reading.reason}")
        found.no_classes = reading.reason
        return None
    if not demanded and len(set(reading.names)) == 1:
        found.no_classes = f"there is only one, {reading}"
        return None
    return reading


def _number(reading: Reading) -> tuple[np.ndarray, list[str]]:
    """Labels (N,) and the classes' names in sorted order, which numbers them."""
    classes = sorted(set(reading.names))
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in reading.names], dtype=np.int64), classes


def _pixels(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
