"""Five kernels launched once each, for ncu to watch; before, once more, to compile them.

ncu --profile-from-start off python -m gpu.watched --out FOLDER [--dry]
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import fastdiff
from gpu import device, lines, operations


def main(argv: Sequence[str] | None = None) -> int:
    given = lines.arguments(__doc__, argv)
    calls = list(launches(device.chosen(given.dry), given.dry))
    for call in calls:
        call()
    with device.watched_by_ncu(device.chosen(given.dry)):
        for call in calls:
            call()
    return 0


def launches(on: torch.device, dry: bool) -> Iterator[Callable[[], Any]]:
    batch, channels, size = (2, 32, 4) if dry else (operations.BATCH, *operations.NORMS[1])
    images, side = (2, 8) if dry else (operations.IMAGES, operations.SIZES[-1])
    tokens, head_dim = (16, 32) if dry else operations.HEADS[0]
    half, full = torch.bfloat16, torch.float32
    norm = operations.norm(on, batch, channels, size, half, "channels_last")
    noising = operations.noising(on, images, side, full)
    step = operations.step(on, images, side, half)
    attention = operations.attention(on, batch, tokens, head_dim)
    for measured in (norm, noising, step, attention):
        inputs = measured.inputs()
        backends = operations.serving(measured, inputs[0])
        # Both norms; of the others Triton's kernel, which is what serves.
        for backend in backends if measured is norm else backends[:1]:
            yield lambda m=measured, i=inputs, b=backend: launch(m, i, b)


def launch(measured: operations.Measured, inputs: tuple, backend: str) -> None:
    with fastdiff.backend(backend):
        measured.call(*inputs)


if __name__ == "__main__":
    sys.exit(main())
