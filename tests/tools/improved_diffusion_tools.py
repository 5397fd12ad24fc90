"""Diffusion objects for fastdiff.integrations.improved_diffusion, and a network for them.

The stand-ins'; and those of the real codebases where a checkout is on PYTHONPATH
(improved_diffusion, guided_diffusion; DiT's package is called diffusion).
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import improved_diffusion_standin as standin
from fastdiff.process.schedules import linear_betas

SHAPE = (2, 3, 8, 8)
T, EVERY = 1000, 20  # 50 steps where spaced


@dataclass(frozen=True)
class Codebase:
    """Where a diffusion object comes from, and what it knows of."""

    gaussian: Any
    spaced: Any
    enums: Any
    guides: bool  # cond_fn
    rescales: bool = True
    means: tuple[str, ...] = ("PREVIOUS_X", "START_X", "EPSILON")
    variances: tuple[str, ...] = ("LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE")

    def diffusion(
        self,
        mean="EPSILON",
        variance="FIXED_LARGE",
        loss="MSE",
        *,
        spaced=True,
        rescaled=False,
        betas=None,
        base=None,
    ):
        steps = T if spaced else T // EVERY
        kwargs = {
            "betas": linear_betas(steps) if betas is None else betas,
            "model_mean_type": self.enums.ModelMeanType[mean],
            "model_var_type": self.enums.ModelVarType[variance],
            "loss_type": self.enums.LossType[loss],
        }
        if self.rescales:
            kwargs["rescale_timesteps"] = rescaled
        if spaced:
            kwargs["use_timesteps"] = set(range(0, len(kwargs["betas"]), EVERY))
        return (base or (self.spaced if spaced else self.gaussian))(**kwargs)


def _real(package, **knows):
    try:
        gaussian = importlib.import_module(f"{package}.gaussian_diffusion")
        spaced = importlib.import_module(f"{package}.respace").SpacedDiffusion
    except ImportError:
        return None
    return Codebase(gaussian.GaussianDiffusion, spaced, gaussian, **knows)


DIT = {"rescales": False, "means": ("START_X", "EPSILON")}
DIT |= {"variances": ("FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE")}
CODEBASES = {
    "improved": Codebase(standin.Improved, standin.spaced(standin.Improved), standin, guides=False),
    "guided": Codebase(standin.Guided, standin.spaced(standin.Guided), standin, guides=True),
    "improved_diffusion": _real("improved_diffusion", guides=False),
    "guided_diffusion": _real("guided_diffusion", guides=True),
    "DiT": _real("diffusion", guides=True, **DIT),
}
TYPES = [
    *(("EPSILON", variance) for variance in ("FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE")),
    *(("START_X", "LEARNED_RANGE"), ("START_X", "LEARNED"), ("EPSILON", "LEARNED")),
    *(("PREVIOUS_X", "FIXED_SMALL"), ("PREVIOUS_X", "LEARNED"), ("PREVIOUS_X", "LEARNED_RANGE")),
]
LOOPS = ["p_sample_loop", "ddim_sample_loop"]
CODEBASES = {name: found for name, found in CODEBASES.items() if found is not None}


class Network(nn.Module):
    """Smooth, and sensitive to t; keeps what it was given."""

    def __init__(self, variance="FIXED_LARGE"):
        super().__init__()
        self.variance = variance
        self.note = [].append  # not the list: an attribute that changes is a reason to recapture
        self.scale = nn.Parameter(torch.ones(3).view(1, 3, 1, 1))

    @property
    def given(self):
        return self.note.__self__

    def forward(self, x, t, y=None):
        self.note(t)
        phase = t.view(-1, 1, 1, 1).to(x.dtype)
        out = self.scale * torch.tanh(x) * (0.6 + 0.4 * torch.cos(phase / 7)) + 0.1 * torch.sin(
            3 * x
        )
        if y is not None:
            out = out + 0.1 * y.view(-1, 1, 1, 1)
        if not self.variance.startswith("LEARNED"):
            return out
        level = -7.0 if self.variance == "LEARNED" else 0.0
        return torch.cat([out, level + 0.5 * torch.sin(3 * x + phase / 5)], dim=1)


def gradient(x, t, y=None):
    """∇ log p(y | x) of a classifier that looks at t, and at y where there is one."""
    pull = 0.0 if y is None else y.view(-1, 1, 1, 1)
    return 0.5 * (pull - x) * (1 + t.view(-1, 1, 1, 1) / 1000)


def drawn(function, *args, **kwargs):
    """Its result from seed 0, and the generator's state after it."""
    torch.manual_seed(0)
    result = function(*args, **kwargs)
    return result, torch.get_rng_state()
