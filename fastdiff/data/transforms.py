"""Resizing, cropping and colour modes, as improved-diffusion's loader does them."""

from typing import Any

import numpy as np

from fastdiff.errors import InputError
from fastdiff.images import MODES
from fastdiff.optional import require


def resize_and_crop(image: Any, size: int) -> Any:
    """Bring a Pillow image to ``size`` x ``size``: halve by 2x2 means while the shorter side is
    at least twice ``size``, then bicubic until the shorter side is ``size``, then crop the centre.

    Runs in the image's own mode, so that the result is the published loader's pixel for pixel;
    Pillow resizes palette images without interpolation there.
    """
    resampling = require("PIL.Image", "train").Resampling
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resampling.BOX)
    factor = size / min(image.size)
    width, height = round(image.width * factor), round(image.height * factor)
    image = image.resize((width, height), resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_array(image: Any, image_size: int | None, channels: int) -> np.ndarray:
    """A Pillow image as uint8, or greyscale of 16 bits as uint16, (H, W, C) of the wanted size and
    channel count."""
    if image.mode.startswith("I"):
        return convert_deep(np.asarray(image).astype(np.uint16)[:, :, None], image_size, channels)
    if image_size is not None:
        image = resize_and_crop(image, image_size)
    array = np.asarray(image.convert(MODES[channels]))
    return array[:, :, None] if channels == 1 else array


def convert_arrays(
    images: np.ndarray, image_size: int | None, channels: int | None, name: str
) -> np.ndarray:
    """Images (N, H, W, C) brought to another side and channel count; None keeps what is there."""
    height, width, found = images.shape[1:]
    wanted = found if channels is None else channels
    if wanted == found and image_size in (None, height) and image_size in (None, width):
        return images
    if found not in MODES or wanted not in MODES:
        raise InputError(
            f"{name} has {found} channels: only 1, 3 or 4 can be resized or converted, "
            "leave out image_size and channels"
        )
    if images.dtype != np.uint8:
        if wanted != found and found != 1:
            raise InputError(
                f"{name} has {found} channels of {images.dtype}, of which {wanted} cannot be made: "
                "only bytes change their colours, and grey can be repeated"
            )
        return np.stack([convert_deep(frame, image_size, wanted) for frame in images])
    pillow = require("PIL.Image", "train")
    frames = images[:, :, :, 0] if found == 1 else images
    return np.stack([to_array(pillow.fromarray(frame), image_size, wanted) for frame in frames])


def convert_deep(image: np.ndarray, image_size: int | None, channels: int) -> np.ndarray:
    """uint16, or floats in [-1, 1], (H, W, C) brought to another side, plane by plane in float32;
    grey is repeated where more channels are wanted."""
    if image_size is not None:
        fromarray = require("PIL.Image", "train").fromarray
        planes = [
            np.asarray(resize_and_crop(fromarray(plane), image_size))
            for plane in np.moveaxis(image.astype(np.float32), 2, 0)
        ]
        resized = np.stack(planes, axis=2)
        if image.dtype == np.uint16:
            image = resized.round().clip(0, 65535).astype(np.uint16)
        else:
            image = resized.clip(-1, 1)  # bicubic weights overshoot
    return image if image.shape[2] == channels else np.repeat(image, channels, axis=2)
