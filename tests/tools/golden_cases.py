"""The recorded answers of the published code, and the processes they were recorded from."""

import json

import numpy as np
import torch

from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.schedules import get_named_beta_schedule
from paths import RECORDED

FILE = RECORDED / "improved_diffusion.npz"

with np.load(FILE) as archive:
    ARRAYS = {name: archive[name] for name in archive.files}
META = json.loads(str(ARRAYS["meta"]))

MEAN_TYPES = {"EPSILON": "epsilon", "START_X": "x_start"}


def process(case: str) -> GaussianDiffusion:
    meta = META[case]
    base = GaussianDiffusion(
        get_named_beta_schedule(meta["schedule"], meta["T"]),
        mean_type=MEAN_TYPES[meta["mean"]],
        var_type=meta["var"].lower(),
        loss_type=meta["loss"].lower(),
        rescale_timesteps=meta["rescale_timesteps"],
    )
    return base.respace(meta["respacing"]) if meta["respacing"] else base


def network(diffusion: GaussianDiffusion):
    """The closed form that stands in for a network in every recorded answer."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.view(-1, 1, 1, 1)
        eps = torch.tanh(x) * (0.6 + 0.4 * torch.cos(t / 100)) + 0.1 * torch.sin(5 * x)
        if not diffusion.learns_variance:
            return eps
        return torch.cat([eps, torch.sin(3 * x + t / 50)], dim=1)

    return model


def array(name: str) -> torch.Tensor:
    return torch.from_numpy(ARRAYS[name])


def relative_error(actual, expected) -> float:
    """The largest deviation of any row, over that row's largest magnitude.

    Rows are samples, which stand at timesteps of very different scale. A row far below the array's
    scale (an exact zero, say) counts by a thousandth of that.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    rows = tuple(range(1, expected.ndim))
    floor = max(1e-3 * np.abs(expected).max(), 1e-30)
    scale = np.maximum(np.abs(expected).max(axis=rows), floor)
    return float((np.abs(actual - expected).max(axis=rows) / scale).max())
