"""Self-conditioning: the network is given its own estimate of x_0.

Chen et al. 2022, "Analog Bits" (arXiv:2208.04202), algorithm 1: in half of the steps a first pass,
through which no gradient flows, makes the estimate from zeros, and the second is given it; in the
other half the network is given zeros, from which a sampler begins.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.data.words import SELF_CONDITION, uniform
from fastdiff.methods.levels import Levels, Source
from fastdiff.methods.protocol import noise_levels


class SelfCondition:
    """How a run gives its network ``name``, the estimate of x_0: clipped to [−1, 1], as Sampler's.

    Args:
        name: of the network's argument.
        diffusion: a process that Sampler takes.
        seed: of the run; with the number of a step it decides which half the step is of.

    Raises InputError for what is no such process.
    """

    def __init__(self, name: str, diffusion: Any, seed: int, device: torch.device) -> None:
        self.name, self.diffusion, self.seed = name, diffusion, seed
        source = Source.of(Levels.of(*noise_levels(diffusion)), diffusion)
        # Of what the network is given, which is input_scale·x_t.
        self.a = torch.from_numpy(source.a / diffusion.input_scale).to(device)
        self.b = torch.from_numpy(source.b).to(device)

    def estimates(self, step: int) -> bool:
        """Whether the step begins with a first pass: the same on every rank."""
        return bool(uniform(self.seed, step, SELF_CONDITION, 1)[0] < 0.5)

    def around(self, network: Callable, t: Tensor, step: int) -> Callable:
        """``network`` for samples at ``t`` (N,), as the process' losses have it, of that step."""

        def run(x: Tensor, timesteps: Tensor, **kwargs: Tensor) -> Tensor:
            kwargs[self.name] = torch.zeros_like(x)
            if self.estimates(step):
                with torch.no_grad():
                    kwargs[self.name] = self._x_start(x, network(x, timesteps, **kwargs), t)
            return network(x, timesteps, **kwargs)

        return run

    def _x_start(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """x_0 from the network's input (N, C, ...) and output (N, C or 2C, ...), like x."""
        if self.diffusion.continuous:
            a, b = self.diffusion.x_start_coefficients_at(t)
        else:
            a, b = self.a[t], self.b[t]
        a, b = (c.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for c in (a, b))
        return (a * x + b * output[:, : x.shape[1]].to(x.dtype)).clamp(-1, 1)
