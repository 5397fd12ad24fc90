"""How a sampler treats its model: weights, layouts, memory, interruptions; and what it tells."""

import functools
import gc
import json
import os
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from sampler_tools import SHAPE, Tiny, closed_form, diffusion
from torch import nn

from fastdiff.errors import InputError
from fastdiff.models.unet import UNet
from fastdiff.sampler import Sampler
from fastdiff.sampling import packing
from fastdiff.sampling.weights import Weights

PROCESS = diffusion(20)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Tied(nn.Module):
    """A linear layer whose weight an embedding has too, a norm, and convolutions."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.tied = nn.Linear(2, 4, bias=False)
        self.tied.weight = self.embedding.weight
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.ConvTranspose2d(4, 2, 3, padding=1)
        self.seen = {}

    def forward(self, x, t):
        self.seen = {name: (p.dtype, p.stride()) for name, p in self.named_parameters()}
        return self.out(self.norm(self.conv(x)))


# --- Weights ----------------------------------------------------------------------------------


def test_what_is_cast_is_what_autocast_would_cast():
    model = Tied().eval()
    live = {name: p.data_ptr() for name, p in model.named_parameters()}
    Sampler(model, PROCESS, steps=2, dtype=torch.bfloat16).sample(SHAPE)
    cast = {name for name, (dtype, _) in model.seen.items() if dtype == torch.bfloat16}
    # The linear layer's copy of the weight, and not the embedding's.
    assert cast == {"conv.weight", "conv.bias", "out.weight", "out.bias", "tied.weight"}
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == live
    assert model.tied.weight is model.embedding.weight
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("grad", [True, False])
def test_cast_weights_change_no_result(grad):
    model = Tied().eval().requires_grad_(grad)
    x, t = torch.randn(SHAPE), torch.zeros(3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x, t)
    weights = Weights(model, torch.bfloat16, channels_last=False)
    weights.refresh()
    with weights.in_use(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x, t), expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_channels_last_on_request(dtype):
    model = Tied().eval()
    expected = Sampler(model, PROCESS, timesteps=[9], dtype=dtype).sample((2, 2, 5, 4))
    sampler = Sampler(model, PROCESS, timesteps=[9], dtype=dtype, channels_last=True)
    actual = sampler.sample((2, 2, 5, 4))
    tolerance = 1e-5 if dtype is None else 0.05
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert model.seen["conv.weight"][1][1] == 1 and model.conv.weight.stride()[1] != 1
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_the_model_has_its_own_weights_whenever_somebody_looks():
    model = Tied().eval()
    sampler = Sampler(model, PROCESS, steps=3, dtype=torch.bfloat16, channels_last=True)

    def look(step=None):
        assert all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())

    sampler.sample(SHAPE, callback=look)
    for _ in sampler.iterate(SHAPE):
        look()
    for fail in (RuntimeError, KeyboardInterrupt):

        def break_down(*_, fail=fail):
            raise fail("in the middle")

        hook = model.norm.register_forward_hook(break_down)
        with pytest.raises(fail):
            sampler.sample(SHAPE)
        hook.remove()
        look()
    sampler.sample(SHAPE)


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


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight + 5, self.bias, padding=1)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Standardised(2, 2, 3),
        lambda: nn.utils.spectral_norm(nn.Conv2d(2, 2, 3, padding=1)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3, padding=1)),
    ],
    ids=["standardised", "spectral_norm", "weight_norm"],
)
def test_layers_that_compute_their_weight_are_as_under_autocast(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer(), nn.Tanh()).eval()
    x = torch.randn(SHAPE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    weights = Weights(model, torch.bfloat16, channels_last=False)
    weights.refresh()
    with weights.in_use(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), expected)


def test_autograd_keeps_what_hangs_on_the_parameters():
    """DDP's hooks, for one, hang on the node that accumulates a parameter's gradient."""
    model = Tied()

    def nodes():
        return [p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]

    before = nodes()
    Sampler(model, PROCESS, steps=2, dtype=torch.bfloat16, channels_last=True).sample(SHAPE)
    assert all(a is b for a, b in zip(nodes(), before, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_call_in_inference_mode_leaves_nothing_behind(dtype):
    model = Tied().eval()
    sampler = Sampler(model, PROCESS, steps=2, dtype=dtype, channels_last=True)
    with torch.inference_mode():
        inside = sampler.sample(SHAPE)
    assert torch.equal(sampler.sample(SHAPE), inside)


def test_what_a_condition_sees_of_the_model():
    model = Tied().eval()

    def denoised_fn(x):
        return x + 0 * model(x, None)  # in float32, outside of the network's autocast

    sampler = Sampler(model, PROCESS, steps=2, dtype=torch.bfloat16, denoised_fn=denoised_fn)
    expected = sampler.sample(SHAPE, callback=lambda step: None)
    assert torch.equal(sampler.sample(SHAPE), expected)


def test_the_callers_autocast_reaches_every_layer():
    model, seen = Tied().eval(), []
    hook = model.conv.register_forward_hook(lambda layer, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        Sampler(model, PROCESS, steps=1).sample(SHAPE)
    Sampler(model, PROCESS, steps=1).sample(SHAPE)
    hook.remove()
    assert seen == [torch.bfloat16, torch.float32]


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
    assert not model.training
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


@pytest.mark.parametrize("largest, fits", [(5, "one of 5 fits"), (2, "one of 2 fits"), (0, "nor")])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("error", ["device", "host"])
def test_running_out_of_memory_names_a_batch_that_fits(largest, fits, guided, error):
    def model(x, t, y):
        assert y.shape == x.shape[:1]
        if len(x) > largest * (1 + guided):
            if error == "device":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: "
                               "can't allocate memory: you tried to allocate 9 bytes.")  # fmt: skip
        return x

    sampler = Sampler(model, PROCESS, steps=2, guidance_scale=2.0 if guided else None)
    arguments = {"model_kwargs": {"y": torch.zeros(11)}}
    arguments |= {"uncond_kwargs": {"y": torch.ones(11)}} if guided else {}
    with pytest.raises(InputError, match=f"no memory on cpu for a batch of 11.*{fits}"):
        sampler.sample((11, 2, 4, 4), **arguments)


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


def test_an_interrupt_from_outside_leaves_the_model_as_it_was(tmp_path):
    script = """
import json, os, signal, sys, threading, time, torch
sys.path.insert(0, sys.argv[1])
from sampler_tools import SHAPE, Tiny, diffusion
from fastdiff import Sampler
model = Tiny().train()
sampler = Sampler(model, diffusion(1000), dtype=torch.bfloat16)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
interrupted = False
try:
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
        [sys.executable, "-c", script, os.path.dirname(__file__)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, True, True]


# --- torch.compile, what is told --------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_samples_and_its_compile_time():
    model = Tiny().eval()
    expected = Sampler(model, PROCESS, steps=3).sample(SHAPE, seed=1)
    sampler = Sampler(model, PROCESS, steps=3, compile={"backend": "inductor"})
    actual = sampler.sample(SHAPE, seed=1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    first = sampler.stats.compile_seconds
    assert first > 0.1
    sampler.sample(SHAPE, seed=2)
    assert sampler.stats.compile_seconds == first
    assert not model.training and isinstance(sampler.model, Tiny)


def test_stats_say_where_the_time_went():
    sampler = Sampler(Tiny(), PROCESS, steps=4)
    assert sampler.explain() == "nothing was sampled yet" and sampler.stats.steps == 0
    started = time.perf_counter()
    sampler.sample(SHAPE)
    wall = time.perf_counter() - started
    stats = sampler.stats
    assert (stats.steps, stats.images) == (4, 3)
    assert set(stats.seconds) == {"prepare", "sampling", "network", "update"}
    assert stats.seconds["prepare"] + stats.seconds["sampling"] > 0.5 * wall
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
    unet = UNet(
        in_channels=3,
        model_channels=32,
        out_channels=3,
        num_res_blocks=1,
        attention_resolutions=(),
        channel_mult=(1,),
    )
    with pytest.raises(InputError, match=r"x has shape \(3, 5, 4, 4\); expected \(N, 3, H, W\)"):
        Sampler(unet, PROCESS, steps=2).sample((3, 5, 4, 4))
    # Other networks' own words, and where they said them.
    with pytest.raises(RuntimeError, match="to have 2 channels, but got 5") as caught:
        Sampler(Tiny(), PROCESS, steps=2).sample((3, 5, 4, 4))
    assert caught.value.__notes__ == ["(while fastdiff sampled: step 0, x of shape (3, 5, 4, 4))"]


# --- Packed convolutions ----------------------------------------------------------------------


class Convolutions(nn.Module):
    """Strides, groups, no bias, 1x1, a weight that two layers share, padding that is not zeros."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(2, 8, 3, padding=1),
                nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
                nn.Conv2d(8, 8, 3, padding=1, groups=4),
                nn.Conv2d(8, 8, 3, padding=2, dilation=2),
                nn.Conv2d(8, 8, 3, padding=2, dilation=2),
                nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
                nn.Conv2d(8, 8, 3, padding="same"),
                nn.Conv2d(8, 2, 1),
            ]
        )
        self.layers[4].weight = self.layers[3].weight

    def forward(self, x, t):
        size = x.shape[2:]
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.interpolate(x, size)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_packed_convolutions_compute_what_plain_ones_do(monkeypatch, channels_last, dtype):
    if not packing.serves(dtype or torch.float32):
        pytest.skip(f"this CPU packs no {dtype} convolutions")
    torch.manual_seed(0)
    model = Convolutions().eval()
    options = {"steps": 3, "channels_last": channels_last, "dtype": dtype}
    packed = Sampler(model, PROCESS, **options)
    shapes = [(3, 2, 8, 8), (2, 2, 8, 8), (2, 2, 10, 6)]
    actual = [packed.sample(shape) for shape in shapes]
    with torch.no_grad():
        model.layers[0].weight.data.mul_(1.5)  # seen by the next call
    actual.append(packed.sample(shapes[0]))
    assert not any("forward" in layer.__dict__ for layer in model.modules())
    monkeypatch.setattr(packing, "serves", lambda dtype: False)
    with torch.no_grad():
        model.layers[0].weight.data.div_(1.5)
    plain = Sampler(model, PROCESS, **options)
    expected = [plain.sample(shape) for shape in shapes]
    with torch.no_grad():
        model.layers[0].weight.data.mul_(1.5)
    expected.append(plain.sample(shapes[0]))
    assert not torch.equal(actual[0], actual[3])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_each_weight_is_packed_once_a_call(monkeypatch):
    count = []
    reorder = packing._reorder
    monkeypatch.setattr(packing, "_reorder", lambda *args: count.append(1) or reorder(*args))
    model = Convolutions().eval()
    if not packing.serves(torch.float32):
        pytest.skip("this CPU packs no convolutions")
    sampler = Sampler(model, PROCESS, steps=6)
    for run in (sampler.sample, lambda shape: list(sampler.iterate(shape))):
        count.clear()
        run((2, 2, 8, 8))
        assert len(count) == 6  # of eight layers two are none of its own
    model.layers[0].weight.requires_grad_(False)

    def change(step):
        model.layers[0].weight.mul_(1.01)

    count.clear()
    sampler.sample((2, 2, 8, 8), callback=change)
    assert len(count) == 6 + 5  # a change between two steps is seen


def test_without_the_private_operators_nothing_is_packed(monkeypatch):
    def missing(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(packing, "_reorder", missing)
    packing.serves.cache_clear()
    try:
        assert not packing.serves(torch.float32)
        model = Convolutions().eval()
        assert torch.isfinite(Sampler(model, PROCESS, steps=2).sample((2, 2, 8, 8))).all()
    finally:
        packing.serves.cache_clear()
