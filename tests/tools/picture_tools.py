"""Pictures as bytes, for tests that put them into archives."""

import io

import numpy as np
from PIL import Image


def pixels(number: int, side: int = 8) -> np.ndarray:
    """uint8 (side, side, 3), another for every number."""
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)


def encoded(number: int, side: int = 8, kind: str = "PNG") -> bytes:
    """``pixels`` as a file of this kind."""
    stream = io.BytesIO()
    Image.fromarray(pixels(number, side)).save(stream, kind)
    return stream.getvalue()


def shows(image, number: int, side: int = 8) -> bool:
    """Whether a data set's image is ``pixels``, to the last bit."""
    return np.array_equal(image.permute(1, 2, 0).numpy(), pixels(number, side))
