"""A folder of image files."""

from pathlib import Path

import numpy as np

from fastdiff.data import dataset_json
from fastdiff.data.formats.registry import Options, image_format
from fastdiff.data.labels import Refusal
from fastdiff.data.listing import list_folder
from fastdiff.data.paths import Lazy, PathTable
from fastdiff.data.picture_set import PictureDataset, Pictures, open_pictures


class FolderFiles(Lazy[Path]):
    """The paths of a table below ``root``, each made when it is asked for."""

    def __init__(self, root: Path, paths: PathTable) -> None:
        self._root, self._paths = root, paths

    def __len__(self) -> int:
        return len(self._paths)

    def at(self, index: int) -> Path:
        return self._root / self._paths.at(index)


@image_format("a folder of images", Path.is_dir, general=True)
def load_folder(root: Path, options: Options) -> PictureDataset:
    """The image files of a folder and its sub-folders, with its dataset.json's labels or those
    that its paths say."""
    listing = list_folder(root)
    files, about = FolderFiles(root, listing.files), root / dataset_json.NAME

    def own_labels() -> np.ndarray | Refusal | None:
        if not about.is_file():
            return None
        return dataset_json.read_labels_of(listing.files, about.read_bytes)

    pictures = Pictures(root, files, listing.files, listing.skipped(), own_labels)
    return open_pictures(pictures, options)
