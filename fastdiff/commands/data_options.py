"""The flags that say how a data set is read, alike in every command that reads one."""

import argparse
from collections.abc import Mapping
from typing import Any

from fastdiff.data.labels import WAYS

# What --data may be, for the helps and for the error where it is missing.
KINDS_OF_DATA = (
    "'digits', 'mnist5k', a folder of images, a .zip or .tar of them (EDM's, webdataset's shards), "
    "an LMDB, a .npz or .npy array, the files of CIFAR-10, MNIST or the downsampled ImageNet"
)
READING = ("labels", "skip_broken", "max_pixels")  # load_dataset's names for them


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """--labels, --skip-broken and --max-pixels, which leave no trace unless they are given."""
    parser.add_argument(
        "--labels",
        choices=WAYS,
        default=argparse.SUPPRESS,
        help="what a folder's classes are read from: its sub-folders, their sub-folders, or what "
        "precedes '_' in the file names (default: the one of them that gives classes; refused "
        "where several do)",
    )
    parser.add_argument(
        "--skip-broken",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="leave out image files that cannot be read, and say which; decodes every file once "
        "before anything else",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="the most pixels an image file may have (default: Pillow's limit, 178956970)",
    )


def reading_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the flags that were given, as load_dataset takes them."""
    return {name: given[name] for name in READING if name in given}
