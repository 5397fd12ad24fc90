"""Images to train on and to compare with: where they come from and the order they are drawn in."""

from fastdiff.data.classes import match_classes
from fastdiff.data.dataset import NO_LABEL, ArrayDataset, ImageDataset
from fastdiff.data.items import Items
from fastdiff.data.load import load_dataset
from fastdiff.data.picture_set import PictureDataset
from fastdiff.data.stream import BatchStream, iterate_once

FolderDataset = PictureDataset  # its name while folders alone had pictures

__all__ = [
    "FolderDataset",
    "NO_LABEL",
    "ArrayDataset",
    "BatchStream",
    "PictureDataset",
    "ImageDataset",
    "Items",
    "iterate_once",
    "load_dataset",
    "match_classes",
]
