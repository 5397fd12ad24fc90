"""What was compiled, from one run to the next: Triton's and Inductor's caches as one file.

    python -m gpu.caches --out FOLDER        packs them into FOLDER/caches.tar.gz

``make gpu-bundle CACHES=FOLDER/caches.tar.gz`` takes them along, and the next run starts from them.
"""

import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from gpu import lines
from gpu.places import State

FILE = "caches.tar.gz"
MOST_BYTES = 15 * 2**20  # so that it travels where files are limited


def main(argv: Sequence[str] | None = None) -> int:
    given = lines.arguments(__doc__, argv)
    size = pack(State(given.dry).caches, given.out / FILE)
    lines.write(given.out, "caches", ok=True, bytes=size)
    return 0


def pack(folder: Path, file: Path, most_bytes: int = MOST_BYTES) -> int:
    """The size of the file; 0 where there is nothing, or too much to be worth carrying."""
    if not folder.is_dir():
        return 0
    with tarfile.open(file, "w:gz", compresslevel=5) as archive:
        archive.add(folder, arcname=".")
    size = file.stat().st_size
    if size > most_bytes:
        file.unlink()
        print(f"the caches take {size >> 20} MiB, more than {most_bytes >> 20}: left here")
        return 0
    return size


def unpack(bundle: Path, folder: Path) -> list[str]:
    """Start from the bundle's caches where there are none yet."""
    file = bundle / FILE
    if not file.exists() or folder.exists():
        return []
    try:
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
    except (OSError, tarfile.TarError) as error:
        return [f"{file} cannot be read: {error}"]
    return [f"the compilers' caches are those of {file}"]


if __name__ == "__main__":
    sys.exit(main())
