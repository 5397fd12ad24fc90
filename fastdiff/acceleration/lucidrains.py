"""The blocks of denoising-diffusion-pytorch."""

from collections.abc import Iterator
from typing import Any

from fastdiff.acceleration.fused_class import Fusion


def fusions(module: Any) -> Iterator[tuple[Fusion, tuple[Any, ...]]]:
    yield from ()
