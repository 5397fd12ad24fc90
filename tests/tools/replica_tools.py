"""Networks whose parts are reached in every way."""

import torch
from torch import nn

from sampler_tools import SHAPE, diffusion

PROCESS = diffusion(20)


X, T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), torch.zeros(3)


class Part(nn.Module):
    """Notes in which mode it runs, and has dropout."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.note = [].append

    def forward(self, x):
        self.note(self.training)
        return self.drop(self.linear(x))

    def twice(self, x):
        return 2 * self(x)


class Whole(nn.Module):
    """Reaches its part in one of the ways that real models have."""

    def __init__(self, reach):
        super().__init__()
        self.part = Part()
        reach(self)

    def forward(self, x, t):
        return self.call(x)
