"""How a sampler treats its model: eval mode, memory, interruptions; and what it tells."""

import functools
import gc
import json
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch

from fastdiff.errors import InputError
from fastdiff.sampling.sampler import Sampler
from paths import TOOLS
from patience import WAIT
from sampler_tools import SHAPE, Tiny, closed_form, diffusion, small_unet

PROCESS = diffusion(20)


pytestmark = pytest.mark.usefixtures("seeded")


# --- Functions as models ----------------------------------------------------------------------

GLOBAL = Tiny()


def of_global(x, t):
    return GLOBAL(x, t)


class Holder:
    def __init__(self, model):
        self.model = model

    def __call__(self, x, t):
        return self.model(x, t)

    def method(self, x, t):
        return self.model(x, t)


@pytest.mark.parametrize("kind", ["global", "closure", "partial", "object", "method"])
def test_the_modules_that_a_function_calls_are_sampled_in_eval_mode(kind):
    inner = GLOBAL if kind == "global" else Tiny()
    model = {
        "global": of_global,
        "closure": lambda x, t: inner(x, t),
        "partial": functools.partial(inner, y=None),
        "object": Holder(inner),
        "method": Holder(inner).method,
    }[kind]
    inner.train()
    sampler = Sampler(model, PROCESS, steps=2)
    assert torch.equal(sampler.sample(SHAPE), Sampler(inner, PROCESS, steps=2).sample(SHAPE))
    assert inner.training and not any(training for *_, training, _ in inner.seen)


def test_two_iterations_of_a_model_in_training():
    model = Tiny().train()
    sampler = Sampler(model, PROCESS, steps=3)
    one, two = sampler.iterate(SHAPE), sampler.iterate(SHAPE)
    next(one), next(two)
    list(one)
    assert model.training  # as ever: what is in eval mode is the sampler's replica
    list(two)
    assert model.training and not any(training for *_, training, _ in model.seen)


def test_the_mode_is_back_while_an_exception_is_handled():
    model = Tiny().train()

    def fail(step):
        raise RuntimeError("of the callback")

    try:
        Sampler(model, PROCESS, steps=2).sample(SHAPE, callback=fail)
    except RuntimeError:
        assert model.training


def test_what_is_yielded_is_a_copy():
    sampler = Sampler(Tiny().eval(), PROCESS, steps=4)
    expected = sampler.sample(SHAPE)
    for step in sampler.iterate(SHAPE):
        last = step["sample"].clone()
        step["sample"].zero_()
        step["pred_xstart"].zero_()
    assert torch.equal(last, expected)


# --- Memory, interruptions --------------------------------------------------------------------


@pytest.mark.seconds
def test_the_loop_allocates_nothing_that_stays():
    sampler = Sampler(closed_form(), diffusion(1000), method="ddim")
    steps = sampler.iterate((1, 2, 4, 4))
    sizes = []
    tracemalloc.start()
    try:
        for step in steps:
            if step["step"] in (100, 900):
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # 800 steps; one object that each left behind would be more, even an empty one.
    assert sizes[1] - sizes[0] < 800 * 40


@pytest.mark.parametrize("largest, fits", [(5, "one of 5 fits"), (2, "one of 2 fits"), (0, "nor")])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("error", ["device", "host"])
def test_running_out_of_memory_names_a_batch_that_fits(largest, fits, guided, error):
    def model(x, t, y, extra):
        assert y.shape == extra["z"][0].shape == x.shape[:1]
        if len(x) > largest * (1 + guided):
            if error == "device":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: "
                               "can't allocate memory: you tried to allocate 9 bytes.")  # fmt: skip
        return x

    sampler = Sampler(model, PROCESS, steps=2, guidance_scale=2.0 if guided else None)
    extra = {"z": [torch.zeros(11)]} if not guided else {"z": (torch.zeros(22),)}
    arguments = {"model_kwargs": {"y": torch.zeros(11), "extra": extra}}
    arguments |= {"uncond_kwargs": {"y": torch.ones(11)}} if guided else {}
    with pytest.raises(InputError, match=f"no memory on cpu for a batch of 11.*{fits}"):
        sampler.sample((11, 2, 4, 4), **arguments)


@pytest.mark.seconds
def test_memory_that_is_really_too_small():
    """In a process of its own, whose memory is limited."""
    script = """
import resource, torch
from fastdiff import InputError, Sampler, GaussianDiffusion, cosine_betas
process = GaussianDiffusion(cosine_betas(20), mean_type="epsilon", var_type="fixed_small")
sampler = Sampler(lambda x, t: (x.repeat(1, 64, 1, 1).exp())[:, :3], process, steps=2)
sampler.sample((1, 3, 64, 64))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
try:
    sampler.sample((256, 3, 64, 64))
except InputError as error:
    print(error)
print(sampler.sample((4, 3, 64, 64)).shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no memory on cpu for a batch of 256; one of " in done.stdout
    assert "torch.Size([4, 3, 64, 64])" in done.stdout


@pytest.mark.seconds
def test_an_interrupt_from_outside_leaves_the_model_as_it_was(tmp_path):
    script = """
import json, os, signal, sys, threading, time, torch
sys.path.insert(0, sys.argv[1])
from sampler_tools import SHAPE, Tiny, diffusion
from fastdiff import Sampler
model = Tiny().train()
sampler = Sampler(model, diffusion(1000), dtype=torch.bfloat16)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what shells start with & ignores it
interrupted = False
try:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        sampler.sample(SHAPE, seed=1)
except KeyboardInterrupt:
    interrupted = True
whole = all(part.training for part in model.modules())
whole = whole and all(p.dtype == torch.float32 for p in model.parameters())
sampler.configure(steps=5)
same = torch.equal(sampler.sample(SHAPE, seed=2), sampler.sample(SHAPE, seed=2))
print(json.dumps([interrupted, whole, same]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(TOOLS)],
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, True, True]


# --- torch.compile, what is told --------------------------------------------------------------


@pytest.mark.seconds
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_compiled_network_gives_the_same_samples_and_its_compile_time(backend):
    model = Tiny().eval()
    expected = Sampler(model, PROCESS, steps=3).sample(SHAPE, seed=1)
    sampler = Sampler(model, PROCESS, steps=3, compile={"backend": backend})
    actual = sampler.sample(SHAPE, seed=1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    first = sampler.stats.compile_seconds
    assert first > 0.1
    sampler.sample(SHAPE, seed=2)
    assert sampler.stats.compile_seconds == first
    assert not model.training and isinstance(sampler.model, Tiny)


def test_stats_say_where_the_time_went():
    model = Tiny()
    # Slow enough that what a busy machine takes between the two clocks is little beside it.
    model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    sampler = Sampler(model, PROCESS, steps=4)
    assert sampler.explain() == "nothing was sampled yet" and sampler.stats.steps == 0
    started = time.perf_counter()
    sampler.sample(SHAPE)
    wall = time.perf_counter() - started
    stats = sampler.stats
    assert (stats.steps, stats.images) == (4, 3)
    assert set(stats.seconds) == {"prepare", "sampling", "network", "update"}
    assert stats.seconds["prepare"] + stats.seconds["sampling"] > 0.5 * wall
    assert stats.seconds["network"] >= 4 * 0.05
    assert stats.seconds["network"] + stats.seconds["update"] <= stats.seconds["sampling"]
    assert stats.steps_per_second == pytest.approx(4 / stats.seconds["sampling"])
    assert stats.images_per_second == pytest.approx(3 / stats.seconds["sampling"])
    assert sampler.explain().startswith("eager: CUDA graphs need a CUDA device")
    sampler.sample((1, 2, 4, 4))
    assert (stats.steps, stats.images) == (4, 1)
    assert "4 steps" in str(stats) and "network" in str(stats)


def test_a_graph_cannot_be_insisted_on_without_a_gpu():
    sampler = Sampler(Tiny(), PROCESS, steps=2, capture=True, device="cpu")
    with pytest.raises(InputError, match="capture=True: CUDA graphs need a CUDA device"):
        sampler.sample(SHAPE)


def test_a_shape_that_does_not_fit_the_model():
    unet = small_unet(3)
    with pytest.raises(InputError, match=r"x has shape \(3, 5, 4, 4\); expected \(N, 3, H, W\)"):
        Sampler(unet, PROCESS, steps=2).sample((3, 5, 4, 4))
    # Other networks' own words, and where they said them.
    with pytest.raises(RuntimeError, match="to have 2 channels, but got 5") as caught:
        Sampler(Tiny(), PROCESS, steps=2).sample((3, 5, 4, 4))
    assert caught.value.__notes__ == ["(while fastdiff sampled: step 0, x of shape (3, 5, 4, 4))"]
