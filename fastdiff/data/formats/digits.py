"""The handwritten digits inside scikit-learn."""

from pathlib import Path

import numpy as np

from fastdiff.data.dataset import ArrayDataset
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.in_memory import in_memory
from fastdiff.optional import require


@image_format("'digits'", "digits")
def load_digits(path: Path, options: Options) -> ArrayDataset:
    """1,797 images of 8x8, values 0..16 brought to 0..255."""
    bunch = require("sklearn.datasets", "demo").load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, :, :, None]
    names = [str(name) for name in bunch.target_names]
    return in_memory(images, bunch.target.astype(np.int64), names, "digits", options)
