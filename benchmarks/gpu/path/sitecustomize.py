"""In every process of a phase: fastdiff is this clone's, as it stands, without an installation.

Python imports this file at its start, since its folder is on PYTHONPATH (gpu/places.py).
"""

import os
import sys
from importlib.util import spec_from_file_location

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3))


class OfThisClone:
    """The two parts of the package that do not lie in its folder."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        library = os.environ.get("FASTDIFF_LIBRARY", "")
        if name == "fastdiff._native" and os.path.exists(library):
            return spec_from_file_location(name, library)
        if name == "fastdiff.kernels":
            folder = os.path.join(ROOT, "kernels")
            file = os.path.join(folder, "__init__.py")
            return spec_from_file_location(name, file, submodule_search_locations=[folder])
        return None


sys.meta_path.insert(0, OfThisClone)
