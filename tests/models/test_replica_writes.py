"""What a forward writes while its replica runs, and what is reached past the replica."""

import collections
import gc
import types
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from fastdiff.sampling.sampler import Sampler
from replica_tools import PROCESS, Part, Whole, X
from sampler_tools import SHAPE, Tiny

pytestmark = pytest.mark.usefixtures("seeded")


class Counter:
    calls = 0


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
