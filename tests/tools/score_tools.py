"""A network whose features are few and cost nothing, in the place of the one that --features names:
in this process, or in those that torchrun starts."""

import functools
import json
import os
import signal
from pathlib import Path

from fastdiff.cli import main
from fastdiff.evaluation.features import NETWORKS, FeatureNetwork

NAME = "efficientnet-lite0"  # in whose place it stands


class Pixels(FeatureNetwork):
    """What it is asked for goes to the file ``log``, if there is one: (rank, images) a batch.

    dies_at: the batch of rank 1 at which its process is killed; 0: none.
    """

    name, published, resizing = "pixels", False, "none"
    widths = {"pooled": 12, "logits": 5, "spatial": 8}

    def __init__(self, log: Path | None = None, dies_at: int = 0) -> None:
        super().__init__()
        self.log, self.dies_at, self.batches = log, dies_at, 0
        self.rank = int(os.environ.get("RANK", "0"))

    def forward(self, images):
        self.batches += 1
        if self.rank == 1 and self.batches == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps([self.rank, len(images)]) + "\n")
        values = images.float().flatten(1)
        return {kind: values[:, :width] / 100 for kind, width in self.widths.items()}


def asked(log: Path) -> dict[int, int]:
    """Rank -> the images that it was asked for."""
    found: dict[int, int] = {}
    for rank, images in map(json.loads, log.read_text().splitlines()):
        found[rank] = found.get(rank, 0) + images
    return found


def command(argv: list[str], log: Path | None = None, dies_at: int = 0) -> functools.partial:
    """What a process does that torchrun starts: ``fastdiff`` with this network."""
    return functools.partial(_command, argv, log, dies_at)


def _command(argv: list[str], log: Path | None, dies_at: int) -> int:
    NETWORKS[NAME] = lambda weights, resize: Pixels(log, dies_at)
    return main(argv)
