"""Attributes of a network that change between two calls: a captured step is made anew."""

import functools
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from capture_tools import PROCESS, assert_equal, pair
from fastdiff.sampling import capture
from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, Tiny, diffusion

pytestmark = pytest.mark.usefixtures("made", "seeded")
LABELS = torch.tensor([0, 2, 1])


class Processor:
    def __init__(self, scale):
        self.scale = scale


@dataclass(slots=True)
class Config:
    scale: float
    more: SimpleNamespace


class Attributed(Tiny):
    """Computes by all sorts of attributes, and has others that are hard to compare."""

    def __init__(self):
        super().__init__()
        self.gain, self.scaling = 1.0, {"lora": [1.0, 2.0]}
        self.processor = Processor(1.0)
        self.config = Config(1.0, SimpleNamespace(scale=1.0))
        self.shift = np.zeros(2, dtype=np.float32)
        self.held = torch.zeros(1)
        self.itself, self.nan, self.sparse = [self], float("nan"), torch.eye(3).to_sparse()
        dying = Processor(0.0)
        self.gone = weakref.proxy(dying)
        self.deep = functools.reduce(lambda inner, _: {"deeper": inner}, range(20), {})
        self.table, self.words = np.linspace(0, 1, 2000), {str(i): i for i in range(5000)}
        self.process = diffusion(500)
        self.bulk = np.zeros(2**20)

    def forward(self, x, timesteps, y=None):
        gain = self.gain * self.scaling["lora"][1] * self.processor.scale
        gain *= self.config.scale * self.config.more.scale
        return gain * super().forward(x, timesteps) + float(self.shift.sum()) + self.held


class Doubled(Attributed):
    def forward(self, x, timesteps, y=None):
        return 2 * super().forward(x, timesteps, y)


@pytest.mark.seconds
def test_attributes_are_seen(made):
    model = Attributed().eval()
    captured, eager = pair(model, steps=3)
    changes = (
        lambda: setattr(model, "gain", 0.25),
        lambda: model.scaling["lora"].__setitem__(1, 0.5),
        lambda: setattr(model.processor, "scale", 3.0),
        lambda: setattr(model, "processor", Processor(0.75)),
        lambda: setattr(model.config, "scale", 2.0),
        lambda: setattr(model.config.more, "scale", 0.5),
        lambda: model.shift.fill(0.5),
        lambda: setattr(model, "held", torch.ones(1)),
        lambda: setattr(model, "__class__", Doubled),
    )
    before = assert_equal(captured, eager)
    for count, change in enumerate(changes, 1):
        assert torch.equal(assert_equal(captured, eager), before) and made() == count
        change()
        after = assert_equal(captured, eager)
        assert not torch.equal(after, before)
        before = after


class Counting(Tiny):
    calls = 0

    def forward(self, x, timesteps, y=None):
        self.calls += 1
        return super().forward(x, timesteps, y)


def test_a_network_that_counts_its_calls_is_captured_once(made):
    captured, _ = pair(Counting().eval(), steps=3, guidance_scale=2.0, guidance_interval=(10, 20))
    for _ in range(3):
        captured.sample(SHAPE, model_kwargs={"y": LABELS}, uncond_kwargs={})
    assert made() == 2


def test_what_runs_eagerly_is_not_tried_again_at_every_call(made, monkeypatch):
    def seconds(call, device):
        return float(call.__name__ != "_step")

    monkeypatch.setattr(capture, "seconds_a_call", seconds)
    sampler = Sampler(Counting().eval(), PROCESS, steps=2)
    for _ in range(3):
        sampler.sample(SHAPE)
    assert made() == 1 and "measured faster" in sampler.explain()
