"""What images look like while they are drawn: x_t, or the x_0 that the network expects."""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from fastdiff.images import to_bytes


class Kind(NamedTuple):
    """key: of a Sampler's step. part: how the name of a batch's frames begins. picture: the file
    that is made of them."""

    key: str
    part: str
    picture: str


KINDS = {
    "xt": Kind("sample", "frames", "trajectory.png"),
    "x0": Kind("pred_xstart", "frames_x0", "trajectory_x0.png"),
}


class Trajectory:
    """Collects what a batch's first ``count`` images were at these rows of the step table; ``add``
    is a callback of ``Sampler.sample``. ``of``: one of KINDS."""

    def __init__(self, count: int, rows: Collection[int], of: str):
        self.count, self.rows, self.key = count, set(rows), KINDS[of].key
        self.moments: list[np.ndarray] = []

    def add(self, step: dict[str, Any]) -> None:
        if self.count and step["step"] in self.rows:
            self.moments.append(to_bytes(step[self.key][: self.count]))

    def frames(self) -> np.ndarray | None:
        """uint8 (K, n, H, W, C), noisiest first; None when no image is followed."""
        return np.stack(self.moments) if self.moments else None
