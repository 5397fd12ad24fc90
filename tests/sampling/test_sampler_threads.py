"""One network, many users at once: samplers, pipelines and training in several threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastdiff
from capture_tools import pair
from fastdiff.ops import backends
from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, Tiny, diffusion
from thread_tools import at_once

PROCESS = diffusion(20)

pytestmark = pytest.mark.usefixtures("seeded")


class Gated(Tiny):
    """Waits in the middle of its forward for whoever has closed the gate."""

    def __init__(self):
        super().__init__()
        self.gate = {}

    def forward(self, x, t, y=None):
        if "reached" in self.gate:
            self.gate["reached"].set()
            assert self.gate["go on"].wait(30)
        return super().forward(x, t, y)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_in_the_middle_of_a_step_the_model_is_its_owners(dtype):
    model = Gated().train()
    before = {name: (p, p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    attributes = set(vars(model.conv))
    sampler = Sampler(model, PROCESS, steps=2, dtype=dtype, channels_last=True)
    expected = sampler.sample(SHAPE)
    reached, go_on = threading.Event(), threading.Event()
    model.gate |= {"reached": reached, "go on": go_on}
    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(sampler.sample, SHAPE)
        assert reached.wait(30)
        try:
            assert all(part.training for part in model.modules())
            after = {name: (p, p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
            assert all(after[name][0] is before[name][0] for name in before)
            assert {n: a[1:] for n, a in after.items()} == {n: b[1:] for n, b in before.items()}
            assert set(vars(model.conv)) == attributes
        finally:
            model.gate.clear()
            go_on.set()
        assert torch.equal(sampling.result(30), expected)


def test_a_callback_may_train_the_model():
    model = Tiny().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    expected = Sampler(model, PROCESS, steps=4, dtype=torch.bfloat16).sample(SHAPE)
    kinds = []

    def train(step):
        model.train()
        with torch.enable_grad():
            model(torch.ones(SHAPE), torch.zeros(3)).sum().backward()
        kinds.append({p.grad.dtype for p in model.conv.parameters()})
        optimizer.step()

    sampler = Sampler(model, PROCESS, steps=4, dtype=torch.bfloat16)
    assert torch.equal(sampler.sample(SHAPE, callback=train), expected)
    assert kinds == [{torch.float32}] * 4 and model.training


def test_samplers_of_one_network_and_its_training_at_once():
    model = Tiny(channels=4)
    shape = (1, 4, 6, 6)
    parameters = list(model.parameters())
    samplers = [
        Sampler(model, PROCESS, steps=3),
        Sampler(model, PROCESS, steps=3, dtype=torch.bfloat16),
        Sampler(model, PROCESS, steps=4, dtype=torch.bfloat16, channels_last=True),
    ]
    expected = [sampler.sample(shape, seed=1) for sampler in samplers]
    noted = model.seen
    noted.clear()

    def sampled(sampler, first):
        return lambda: all(torch.equal(sampler.sample(shape, seed=1), first) for _ in range(40))

    def trained():
        losses = []
        for _ in range(300):
            torch.manual_seed(0)
            output = model(torch.ones(shape), torch.zeros(1))
            output.sum().backward()
            losses.append(all(p.grad is not None for p in model.conv.parameters()))
        return all(losses)

    calls = [sampled(*each) for each in zip(samplers, expected, strict=True)]
    assert all(at_once(*calls, sampled(samplers[1], expected[1]), trained))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(part.training for part in model.modules())
    assert sum(training for *_, training, _ in noted) == 300  # of all forwards, those of training


@pytest.mark.parametrize("taped", [False, True])
def test_one_sampler_in_several_threads(request, taped):
    if taped:
        request.getfixturevalue("made")
    model = Tiny().eval()
    sampler = Sampler(model, PROCESS, steps=5, capture="auto" if not taped else True)
    jobs = [(SHAPE, 1), (SHAPE, 2), ((2, 2, 6, 4), 3)]
    expected = [sampler.sample(shape, seed=seed) for shape, seed in jobs]

    def again(shape, seed, first):
        return lambda: all(torch.equal(sampler.sample(shape, seed=seed), first) for _ in range(25))

    assert all(at_once(*(again(*job, e) for job, e in zip(jobs, expected, strict=True))))
    assert sampler.stats.steps == 5


def test_a_captured_step_serves_calls_in_turns(made):
    captured, eager = pair(steps=4)
    first, second = (eager.sample(SHAPE, seed=seed) for seed in (1, 2))
    inner = []
    outer = captured.sample(
        SHAPE, seed=1, progress=lambda: inner.append(captured.sample(SHAPE, seed=2))
    )
    assert torch.equal(outer, first) and all(torch.equal(each, second) for each in inner)
    one, two = captured.iterate(SHAPE, seed=1), captured.iterate(SHAPE, seed=2)
    steps = [(next(one), next(two)) for _ in range(4)]
    assert torch.equal(steps[-1][0]["sample"], first)
    assert torch.equal(steps[-1][1]["sample"], second) and made() == 1


def test_iterations_that_end_in_any_order():
    model = Tiny().train()
    samplers = [Sampler(model, PROCESS, steps=3, dtype=d) for d in (None, torch.bfloat16)]
    expected = [sampler.sample(SHAPE) for sampler in samplers]
    first, second = (sampler.iterate(SHAPE) for sampler in samplers)
    abandoned = samplers[0].iterate(SHAPE)
    next(first), next(abandoned), next(second)
    *_, last = first
    del abandoned
    assert torch.equal(last["sample"], expected[0])
    *_, last = second
    assert torch.equal(last["sample"], expected[1])
    assert model.training and all(p.dtype == torch.float32 for p in model.parameters())


def test_a_sampler_may_be_configured_while_it_samples():
    sampler = Sampler(Tiny().eval(), PROCESS, steps=3)
    expected = {}
    for steps in (3, 6):
        expected[steps] = sampler.configure(steps=steps).sample(SHAPE)

    def configure():
        for _ in range(200):
            sampler.configure(steps=3)
            sampler.configure(steps=6)
        return True

    def sample():
        found = [sampler.sample(SHAPE) for _ in range(40)]
        return all(any(torch.equal(x, e) for e in expected.values()) for x in found)

    assert all(at_once(configure, sample))


def test_blocks_of_backends_end_in_any_order():
    before = backends.named()
    one, two = fastdiff.backend("reference"), fastdiff.backend("native")
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert backends.named() == "native"
    two.__exit__(None, None, None)
    assert backends.named() == before
    with fastdiff.backend("native"):
        fastdiff.set_backend("reference")
        assert backends.named() == "reference"
    assert backends.named() == before
