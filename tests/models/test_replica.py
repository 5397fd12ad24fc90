"""Replicas: what a model computes, in eval mode, beside the model itself."""

import functools
import gc
import types
import weakref

import pytest
import torch
from torch import nn

from fastdiff.models.eval_mode import eval_mode
from fastdiff.models.replicas.replica import Replica, replica_of, twin_of
from fastdiff.sampling.sampler import Sampler
from replica_tools import PROCESS, Part, T, Whole, X
from sampler_tools import SHAPE, Tiny

pytestmark = pytest.mark.usefixtures("seeded")


def _hidden(self):
    self.parts = [self.part]
    del self.part
    self.call = lambda x: self.parts[0](x)


def _patched_forward(self):
    inner = self.part.forward
    self.part.forward = lambda x: inner(x) + 1
    self.call = self.part


def _hooked_as_accelerate_does(self):
    def forward(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs)

    part = self.part
    part._old_forward = part.forward
    part.forward = functools.update_wrapper(functools.partial(forward, part), part.forward)
    self.__dict__["call"] = part


def _processor(self):
    self.call = types.SimpleNamespace(module=self.part)
    Whole_call = type("Processor", (), {"__call__": lambda self, x: self.module(x)})
    self.call = Whole_call()
    self.call.module = self.part


def _hook(self):
    other = Part()
    self.other = other
    self.part.register_forward_hook(lambda module, args, output: output + other(args[0]))
    self.__dict__["call"] = self.part


def _set(name, make):
    def reach(self):
        self.__dict__["call"] = make(self)

    reach.__name__ = name
    return reach


REACHES = [
    _hidden,
    _patched_forward,
    _hooked_as_accelerate_does,
    _processor,
    _hook,
    _set("method", lambda self: self.part.twice),
    _set("partial", lambda self: functools.partial(self.part.twice)),
    _set("partial of a lambda", lambda self: functools.partial(lambda p, x: p(x), self.part)),
    _set("closure", lambda self: (lambda part: lambda x: part(x))(self.part)),
    _set("default", lambda self: lambda x, part=self.part: part(x)),
    _set("in a dict", lambda self: (lambda d: lambda x: d["a"][0](x))({"a": (self.part,)})),
    _set("no_grad", lambda self: torch.no_grad()(self.part.twice)),
    _set("weak", lambda self: (lambda ref: lambda x: ref()(x))(weakref.ref(self.part))),
    _set("compiled", lambda self: torch.compile(self.part, backend="eager")),
    _set("compiled method", lambda self: torch.compile(self.part.twice, backend="eager")),
]


@pytest.mark.parametrize("reach", REACHES, ids=lambda reach: reach.__name__.strip("_"))
def test_however_a_module_is_reached_it_runs_in_eval_mode(reach):
    model = Whole(reach)
    parts = [part for part in model.modules() if isinstance(part, Part)] or model.parts
    for part in parts:
        part.eval()
    with torch.no_grad():
        expected = model(X, T)
    model.train()
    for part in parts:
        part.train()
        part.note.__self__.clear()
    with replica_of(model) as replica, torch.no_grad():
        actual = replica(X, T)
    torch.testing.assert_close(actual, expected)
    for part in parts:
        noted = part.note.__self__
        assert noted == [False] * len(noted)
        assert part.training and part.drop.training
    # What a hook calls is seen when the first call is watched, and the model itself runs then.
    assert len(parts[0].note.__self__) == (2 if reach is _hook else 1)


class Slotted(nn.Module):
    __slots__ = ("extra",)

    def __init__(self):
        super().__init__()
        self.part = Part()

    def forward(self, x, t):
        return self.part(x)


def test_what_cannot_be_replicated_is_in_eval_mode_as_long_as_somebody_samples():
    model = Slotted().train()
    expected = None
    for dtype in (None, torch.bfloat16):
        steps = [Sampler(model, PROCESS, steps=2, dtype=dtype).iterate(SHAPE) for _ in range(2)]
        first = next(steps[0])["sample"]
        assert torch.equal(first, next(steps[1])["sample"])
        steps[0].close()
        assert not model.training and not model.part.training
        list(steps[1])
        assert all(part.training for part in model.modules())
        expected = first if expected is None else expected
    assert model.part.note.__self__.count(True) == 0


def test_holders_of_eval_mode_in_any_order():
    model = nn.Sequential(Part(), Part())
    model[1].eval()
    one, two = eval_mode([model]), eval_mode([model[0]])
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert model.training and not model[0].training and not model[0].drop.training
    two.__exit__(None, None, None)
    assert model[0].training and model[0].drop.training and not model[1].training


def test_scripted_modules_run_as_they_are():
    model = torch.jit.trace(Tiny().eval().conv, X)
    called = Sampler(lambda x, t: model(x), PROCESS, steps=2)
    assert torch.isfinite(called.sample(SHAPE)).all()


# --- Structure --------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = self.b = Part()
        self.named = nn.ModuleDict({"c": nn.Sequential(self.a, nn.ReLU())})
        self.listed = nn.ModuleList([self.a, nn.Linear(4, 4)])
        self.listed[1].weight = self.a.linear.weight
        self.__dict__["itself"] = self
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x, t):
        assert self.a is self.b is self.named["c"][0] is self.listed[0]
        assert self.itself is self and self.listed[1].weight is self.a.linear.weight
        return self.scale * self.listed[1](self.named["c"](x))


def test_shared_and_tied_parts_and_cycles():
    model = Shared()
    with twin_of(model) as replica:
        assert replica is not model and replica.a is not model.a
        assert type(replica) is Shared and list(replica.state_dict()) == list(model.state_dict())
        assert all(a is b for a, b in zip(replica.parameters(), model.parameters(), strict=True))
        model.scale.fill_(2)
        assert torch.equal(replica(X, T), model.eval()(X, T))


def test_a_replica_follows_its_model():
    model = Whole(lambda self: None)
    model.call = nn.Sequential(Part(), nn.Tanh())
    sampler = Sampler(model, PROCESS, steps=2)

    def same():
        model.eval()
        expected = Sampler(model, PROCESS, steps=2).sample(SHAPE)
        model.train()
        actual = sampler.sample(SHAPE)
        assert torch.equal(actual, expected)
        return actual

    seen = [same()]
    changes = [
        lambda: model.call.insert(1, nn.Linear(4, 4)),
        lambda: model.call.append(Part()),
        lambda: setattr(model.call[0].linear, "weight", nn.Parameter(torch.eye(4))),
        lambda: model.call[0].linear.register_forward_hook(lambda module, args, out: out + 1),
        lambda: model.call[0]._modules["linear"]._forward_hooks.clear(),
        lambda: setattr(model, "call", Part()),
        lambda: setattr(model.call, "__class__", type("Other", (Part,), {"forward": Part.twice})),
    ]
    changes[-1] = lambda: setattr(model.call, "forward", lambda x: x * 0.5)
    for change in changes:
        change()
        seen.append(same())
        assert not torch.equal(seen[-1], seen[-2])


@pytest.mark.seconds
def test_a_replica_holds_nothing_that_its_model_dropped():
    model = nn.Sequential(Part(), Part())
    replica = Replica(model)
    gone = weakref.ref(model[1])
    del model[1]
    replica.refresh()
    gc.collect()
    assert gone() is None


# --- What a forward writes --------------------------------------------------------------------
