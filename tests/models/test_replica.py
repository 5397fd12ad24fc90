"""Replicas: what a model computes, in eval mode, beside the model itself."""

import collections
import functools
import gc
import types
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from fastdiff.models.eval_mode import eval_mode
from fastdiff.models.replicas.replica import Replica, replica_of, twin_of
from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, Tiny, diffusion

PROCESS = diffusion(20)

pytestmark = pytest.mark.usefixtures("seeded")
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


class Counter:
    calls = 0


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


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.cache, self.proj = 0, {}, None
        self.last = "nothing"
        self.gone = 1

    def forward(self, x, t):
        self.calls += 1
        self.cache[self.calls] = x.shape
        self.last = x
        self.new = [self.proj]
        self.__dict__.pop("gone", None)
        if self.proj is None:
            self.proj = nn.Linear(4, 4)
        return self.proj(x)


@pytest.mark.seconds
def test_what_a_forward_writes_the_model_has_afterwards():
    model = Stateful()
    sampler = Sampler(model, PROCESS, steps=3)
    sampler.sample(SHAPE)
    made = model.proj
    assert model.calls == 3 and list(model.cache) == [1, 2, 3] and not hasattr(model, "gone")
    assert isinstance(made, nn.Linear) and model.last.shape == SHAPE and model.new == [made]
    assert list(model.state_dict()) == ["proj.weight", "proj.bias"]
    kept = weakref.ref(model.last)
    model.last = None
    gc.collect()
    assert kept() is None  # nor does the sampler hold it
    for step in sampler.iterate(SHAPE):
        assert model.calls == 4 + step["step"]
    assert model.proj is made and model.last.shape == SHAPE


def test_weights_that_a_hook_computes_stay_the_owners():
    """A thread that trains is between weight_norm's hook and the convolution."""
    model = nn.utils.weight_norm(Tiny().conv)
    model(X)
    computed = model.weight
    Sampler(lambda x, t: model(x), PROCESS, steps=2).sample(SHAPE)
    assert model.weight is computed and computed.requires_grad


@pytest.mark.parametrize("kind", ["method", "attribute"])
def test_objects_that_hold_a_model(kind):
    class Owner:
        def __init__(self):
            self.model, self.count = Tiny().train(), Counter()
            self.steps = 0

        def predict(self, x, t):
            self.steps += 1
            self.count.calls += 1
            return self.model(x, t)

    owner = Owner()
    model = owner.predict if kind == "method" else lambda x, t: owner.predict(x, t)
    sample = Sampler(model, PROCESS, steps=3).sample(SHAPE)
    assert torch.equal(sample, Sampler(owner.model, PROCESS, steps=3).sample(SHAPE))
    assert owner.steps == owner.count.calls == 3 and owner.model.training
    assert not any(training for *_, training, _ in owner.model.seen)


COUNT = 0
NET = Tiny()


def counting(x, t):
    global COUNT
    COUNT += 1
    return NET(x, t)


def rebinding(x, t):
    global NET
    NET = NET
    return NET(x, t)


@pytest.mark.parametrize("function", [counting, rebinding])
def test_functions_that_assign_to_globals(function):
    before = COUNT
    NET.train().seen.clear()
    Sampler(function, PROCESS, steps=3).sample(SHAPE)
    assert COUNT - before == (3 if function is counting else 0)
    assert NET.training and not any(training for *_, training, _ in NET.seen)


def test_a_compiled_replica_is_compiled_once():
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    model = Part()
    model.note = None
    model.forward = types.MethodType(lambda self, x, t=None: self.drop(self.linear(x)), model)
    for called in (model, lambda x, t: model(x)):
        torch._dynamo.reset()
        traced.clear()
        sampler = Sampler(called, PROCESS, steps=2, compile={"backend": backend})
        first = sampler.sample(SHAPE)
        model.train()
        assert torch.equal(sampler.sample(SHAPE), first) and len(traced) == 1
        with torch.no_grad():
            model.linear.weight.mul_(2)
        assert not torch.equal(sampler.sample(SHAPE), first) and len(traced) == 1


class Registry(nn.Module):
    """Reaches its dropout by a way that no replica can follow."""

    known: ClassVar[dict[str, Any]] = {}

    def __init__(self, keep):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 4)
        object.__setattr__(self, "find", keep(self))

    def forward(self, x, t):
        return self.linear(self.find()(x))


def _of_class(self):
    Registry.known["drop"] = self.drop
    return lambda: Registry.known["drop"]


ESCAPES = {
    "deque": lambda self: (lambda kept: lambda: kept[0])(collections.deque([self.drop])),
    "set": lambda self: (lambda kept: lambda: next(iter(kept)))({self.drop}),
    "object in object": lambda self: (lambda a: lambda: a.b.drop)(
        types.SimpleNamespace(b=types.SimpleNamespace(drop=self.drop))
    ),
    "class": _of_class,
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("keep", ESCAPES.values(), ids=ESCAPES)
def test_a_module_that_is_reached_past_the_replica_is_in_eval_mode(keep, dtype):
    model = Registry(keep).train()
    sampler = Sampler(model, PROCESS, steps=3, dtype=dtype)
    drawn = sampler.sample(SHAPE)
    assert model.training and model.drop.training
    assert torch.equal(sampler.sample(SHAPE), drawn)
    model.eval()
    torch.testing.assert_close(Sampler(model, PROCESS, steps=3, dtype=dtype).sample(SHAPE), drawn)


def test_hooks_are_given_the_module_they_were_registered_on():
    model = Whole(lambda self: self.__dict__.update(call=self.part))
    seen, counts = [], {model.part: 0}

    def note(module, inputs, output):
        seen.append(module)
        counts[module] += 1
        return 2 * output

    plain = Sampler(model, PROCESS, steps=2).sample(SHAPE)
    model.part.register_forward_hook(note)
    model.part.linear.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    hooked = Sampler(model, PROCESS, steps=2).sample(SHAPE)
    assert set(seen) == {model.part, model.part.linear} and counts == {model.part: 2}
    assert not torch.equal(hooked, plain)


def test_a_hook_on_all_modules_is_given_the_models_own():
    model, seen = Whole(lambda self: self.__dict__.update(call=self.part)), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.add(m))
    try:
        Sampler(model, PROCESS, steps=2).sample(SHAPE)
    finally:
        handle.remove()
    assert model in seen and seen <= set(model.modules())


class Logged(nn.Module):
    """Writes to lists and dicts of its own that hold modules."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = {self.linear: 0}
        self.order = [self.linear]
        self.last: dict[Any, Any] = {}

    def forward(self, x, t):
        self.calls[self.linear] += 1
        self.order.append(self.linear)
        self.last["calls"] = self.last.get("calls", 0) + 1
        self.last[self.linear] = len(x)
        return self.linear(x)


def test_what_a_forward_writes_into_its_lists_and_dicts_is_there_afterwards():
    model = Logged()
    sampler = Sampler(model, PROCESS, steps=3)
    for calls in (3, 6):
        sampler.sample(SHAPE)
        assert model.calls == {model.linear: calls}
        assert model.order == [model.linear] * (1 + calls)
        assert model.last == {"calls": calls, model.linear: len(X)}
