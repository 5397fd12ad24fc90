"""Images to train on and to compare with: where they come from and the order they are drawn in."""

from fastdiff.data.classes import match_classes
from fastdiff.data.dataset import NO_LABEL, ArrayDataset, ImageDataset
from fastdiff.data.load import load_dataset
from fastdiff.data.picture_set import PictureDataset
from fastdiff.data.stream import BatchStream, iterate_once

__all__ = [
    "NO_LABEL",
    "ArrayDataset",
    "BatchStream",
    "PictureDataset",
    "ImageDataset",
    "iterate_once",
    "load_dataset",
    "match_classes",
]
