"""Where the library, the peers and the compilers' caches lie, and the environment that says so."""

import os
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "build" / "gpu-bundle"  # what was built beforehand: make gpu-bundle
MODULE = "_native"


class State:
    """What runs leave for the next: build/gpu, and build/gpu-dry for those without a GPU."""

    def __init__(self, dry: bool, root: Path = ROOT):
        self.folder = root / "build" / ("gpu-dry" if dry else "gpu")
        self.library = self.folder / "library" / (MODULE + sysconfig.get_config_var("EXT_SUFFIX"))
        self.peers = self.folder / "peers"  # the packages of the bundle that are not installed
        self.caches = self.folder / "caches"

    def environment(self, dry: bool) -> dict[str, str]:
        """That of every phase."""
        benchmarks = ROOT / "benchmarks"
        path = [benchmarks / "gpu" / "path", ROOT, benchmarks, self.peers]
        return {
            **os.environ,
            **({"CUDA_VISIBLE_DEVICES": ""} if dry else {}),
            "FASTDIFF_LIBRARY": str(self.library),
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.caches / "inductor"),
            "TRITON_CACHE_DIR": str(self.caches / "triton"),
        }
