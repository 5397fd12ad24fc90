"""Sets of picture files, wherever these lie: measured when they are opened, decoded on demand."""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.dataset import ImageDataset
from fastdiff.data.formats.registry import CACHE_BYTES, Options
from fastdiff.data.labels import Refusal, read_labels
from fastdiff.data.listing import SUFFIXES
from fastdiff.data.paths import Chosen, PathTable
from fastdiff.data.pictures import (
    Header,
    PictureFile,
    check_pixels,
    decode,
    pixel_limit,
    read_header,
)
from fastdiff.data.summary import NOT_ASKED, Found
from fastdiff.data.text import plain
from fastdiff.errors import InputError, first_line

READ_THREADS = 8
READ_AHEAD = 4096  # headers that are asked for at a time
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
    "I;16": "16-bit greyscale",
    "LA;16": "greyscale with alpha",
    "RGB;16": "colour",
    "RGBA;16": "colour with alpha",
}
SHALLOW = set(KINDS.values()) - {KINDS["I;16"]}


@dataclass(frozen=True)
class Pictures:
    """What a format found at ``place``: N picture files, and their paths below it.

    skipped: what was passed over, for ``describe``. own_labels: reads what the format itself says
    of the classes, int64 (N,), or why that is of no use; None where it says nothing, and the
    classes are read from the paths. broken: a line for everything that could not be listed.
    """

    place: Path
    files: Sequence[PictureFile]
    paths: PathTable
    skipped: str = ""
    own_labels: Callable[[], np.ndarray | Refusal | None] = lambda: None
    broken: Sequence[str] = ()


class PictureDataset(ImageDataset):
    """Picture files decoded on demand; a small set is kept in memory once read.

    Reading is safe from several threads. A file that cannot be decoded raises InputError with
    its name. ``load_dataset`` finds the files and makes this of them.

    Args:
        files: N paths, or members of archives: what opens and says its name.
        image_size: (H, W) in pixels that all have, after ``resize``.
        channels: 1, 3 or 4: grey, RGB or RGBA.
        resize: side to resize and centre-crop to; None leaves the images as they are.
        cache_bytes: the decoded images are kept if they are no more than this.
        max_pixels: the most pixels of a file; None: Pillow's limit.
        **options: the keyword arguments of :class:`ImageDataset`.
    """

    def __init__(
        self,
        files: Sequence[PictureFile],
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
        self._numbers = np.uint16 if self.dtype == torch.uint16 else np.uint8
        shape = (len(files), channels, *image_size)
        fits = np.prod(shape) * np.dtype(self._numbers).itemsize <= cache_bytes
        self._cache = np.empty(shape, self._numbers) if fits else None
        self._cached = np.zeros(len(files), bool)

    def gather(self, indices: np.ndarray) -> Tensor:
        if self._cache is None:
            return torch.from_numpy(np.stack([self._decode(i) for i in indices]))
        for i in indices[~self._cached[indices]]:
            self._cache[i] = self._decode(i)
            self._cached[i] = True  # after the pixels: another thread may be looking
        return torch.from_numpy(self._cache[indices])

    def _decode(self, index: int) -> np.ndarray:
        """(C, H, W)."""
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
        if array.dtype != self._numbers:
            raise InputError(
                f"'{plain(file)}' is now of {array.dtype}, was of {np.dtype(self._numbers)} when "
                "the set was opened"
            )
        if array.shape[:2] != self.image_size:
            raise InputError(
                f"'{plain(file)}' is now {_pixels(array.shape[1::-1])}, was "
                f"{_pixels(self.image_size[::-1])} when the set was opened"
            )
        return array.transpose(2, 0, 1)


def open_pictures(pictures: Pictures, options: Options) -> PictureDataset:
    """The set of these files; every header is read now, the pixels later.

    With ``skip_broken`` the pixels are decoded now too, once, to know which files are whole.
    """
    place = plain(pictures.place)
    if not pictures.files and not pictures.broken:
        passed_over = f"; passed over: {pictures.skipped}" if pictures.skipped else ""
        raise InputError(
            f"'{place}' holds no image files ({', '.join(sorted(SUFFIXES))}){passed_over}"
        )
    survey = _survey(pictures.files, options)
    broken = [*pictures.broken, *survey.broken]
    if not survey.rows:
        raise InputError(f"'{place}' holds no image file that is whole; the first is {broken[0]}")
    found = Found(
        str(pictures.place),
        sizes=Counter({_pixels(size): count for size, count in survey.sizes.items()}),
        modes=survey.modes,
        several=survey.several,
        skipped=pictures.skipped,
        broken=[line.replace(f"'{place}/", "'", 1) for line in broken],
    )
    dtype = _choose_dtype(survey, options.channels)
    channels = options.channels or _choose_channels(survey)
    side = options.image_size
    width, height = _one_size(survey) if side is None else (side, side)
    rows = np.array(survey.rows)
    classes = _read_classes(pictures, rows, options, found)
    return PictureDataset(
        pictures.files if len(rows) == len(pictures.files) else Chosen(pictures.files, rows),
        (height, width),
        channels,
        resize=side,
        cache_bytes=options.cache_bytes,
        max_pixels=options.max_pixels,
        labels=classes.labels,
        class_names=classes.names,
        random_flip=options.random_flip,
        reading=classes.reading,
        dtype=dtype,
        found=found,
    )


@dataclass
class _Survey:
    """What the headers say, in bounded memory.

    rows: of the files that can be used. first_of: by size and by kind, a file that has it.
    broken: what the others suffer from.
    """

    rows: array = field(default_factory=lambda: array("q"))
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    several: int = 0
    first_of: dict[Any, PictureFile] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def add(self, row: int, header: Header) -> None:
        self.rows.append(row)
        self.sizes[header.size] += 1
        self.modes[header.mode] += 1
        self.several += header.several
        self.first_of.setdefault(header.size, header.file)
        self.first_of.setdefault(KINDS[header.mode], header.file)


def _survey(files: Sequence[PictureFile], options: Options) -> _Survey:
    """Read all headers; a file that cannot be used is an error, unless ``skip_broken``."""
    image_size, max_pixels = options.image_size, options.max_pixels

    def read(row: int) -> Header | InputError:
        file = files[row]
        try:
            header = read_header(file, max_pixels)
            if header.mode not in KINDS:
                raise InputError(
                    f"'{plain(file)}' has the pixel mode {header.mode}, expected 8 bits per "
                    "channel, or 16 in greyscale: convert it first"
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

    survey = _Survey()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for start in range(0, len(files), READ_AHEAD):
            rows = range(start, min(start + READ_AHEAD, len(files)))
            for row, result in zip(rows, pool.map(read, rows), strict=True):
                if isinstance(result, Header):
                    survey.add(row, result)
                else:
                    survey.broken.append(str(result))
    if survey.broken and not options.skip_broken:
        raise InputError(
            f"{survey.broken[0]}; --skip-broken leaves out what cannot be used "
            f"({len(survey.broken)} of {len(files)} files)"
        )
    return survey


def _check_resized(header: Header, image_size: int, max_pixels: int | None) -> None:
    """A picture is resized before it is cropped, and a long strip would fill the memory then."""
    short, long = sorted(header.size)
    pixels = image_size**2 * long // short
    if pixels > pixel_limit(max_pixels):
        raise InputError(
            f"'{plain(header.file)}' is {_pixels(header.size)}, so long that {pixels:,} pixels "
            f"would be left of it at image size {image_size}: crop it first"
        )


def _choose_dtype(survey: _Survey, channels: int | None) -> torch.dtype:
    """8 bits, or 16 where all files are greyscale of 16."""
    deep = survey.modes["I;16"]
    if not deep:
        return torch.uint8
    one = plain(survey.first_of[KINDS["I;16"]])
    if deep < len(survey.rows):
        other = next(file for kind, file in survey.first_of.items() if kind in SHALLOW)
        raise InputError(
            f"'{one}' is greyscale of 16 bits and '{plain(other)}' is not: convert them to one kind"
        )
    if channels == 4:
        raise InputError(
            f"'{one}' is greyscale of 16 bits, of which 4 channels cannot be made: choose "
            "--channels 1 or 3"
        )
    return torch.uint16


def _choose_channels(survey: _Survey) -> int:
    counts: Counter[str] = Counter()
    for mode, count in survey.modes.items():
        counts[KINDS[mode]] += count
    if len(counts) > 1:
        found = ", ".join(
            f"{n} {kind} (such as '{plain(survey.first_of[kind])}')" for kind, n in counts.items()
        )
        raise InputError(f"images of mixed modes: {found}; choose with --channels 1, 3 or 4")
    return 1 if "greyscale" in next(iter(counts)) else 3


def _one_size(survey: _Survey) -> tuple[int, int]:
    """(width, height) of all images."""
    first, *others = survey.sizes  # in the order in which they came
    if others:
        one, other = survey.first_of[first], survey.first_of[others[0]]
        raise InputError(
            f"images of mixed sizes: '{plain(one)}' is {_pixels(first)} and "
            f"'{plain(other)}' is {_pixels(others[0])}; choose one with --image-size"
        )
    return first


class _Classes(NamedTuple):
    """labels: int64 (N,). names: None where the classes have numbers alone. reading: of WAYS."""

    labels: np.ndarray | None = None
    names: list[str] | None = None
    reading: str | None = None


def _read_classes(pictures: Pictures, rows: np.ndarray, options: Options, found: Found) -> _Classes:
    """The class of every file. Where none is demanded, why there are none goes to ``found``."""
    if options.class_cond is False:
        found.no_classes = NOT_ASKED
        return _Classes()
    demanded = options.class_cond or options.labels is not None
    labels = pictures.own_labels() if options.labels is None else None
    if isinstance(labels, np.ndarray):
        return _Classes(labels[rows])
    groups = pictures.paths.groups(rows)
    reading = labels or read_labels(
        groups.examples, options.labels, options.known_classes, groups.counts
    )
    if isinstance(reading, Refusal):
        if demanded:
            raise InputError(f"'{plain(pictures.place)}': {reading.reason}")
        found.no_classes = reading.reason
        return _Classes()
    names = sorted(set(reading.names))  # which numbers them
    if not demanded and len(names) == 1:
        found.no_classes = f"there is only one, {reading}"
        return _Classes()
    numbers = {name: number for number, name in enumerate(names)}
    of_group = np.array([numbers[name] for name in reading.names], dtype=np.int64)
    return _Classes(of_group[groups.of], names, reading.way)


def _pixels(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
