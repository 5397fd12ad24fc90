"""A disk so small that it fills."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int | str) -> Iterator[None]:
    """``folder`` as a disk of ``size`` bytes ("64k"); skips the test where none can be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        # Lazily: of a test that fails a file may still be open, and the disk would stay for good.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
