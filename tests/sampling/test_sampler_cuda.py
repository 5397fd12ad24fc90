"""The sampler on a GPU: real CUDA graphs, no waiting and no allocation in the loop.

Every body that can runs on the CPU too, on the fake of fake_cuda.py.
"""

import contextlib
import itertools
import threading

import pytest
import torch
from torch import nn
from torch.backends import cudnn

import fastdiff
from fastdiff import ops
from fastdiff.errors import TrainingError
from fastdiff.ops import native
from fastdiff.sampling.cuda_graph import Side
from fastdiff.sampling.sampler import Sampler
from on_both import LABELS, PROCESS, SIZE, assert_close, on_both, pair
from sampler_tools import SHAPE, Tiny, closed_form, diffusion

METHODS = ("ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++")
DTYPES = (None, torch.bfloat16, torch.float16)


@pytest.mark.seconds
@on_both(
    "method, rng, dtype",
    cpu=[("ddpm", "counter", None), ("dpmsolver++", "torch", torch.bfloat16)],
    gpu=list(itertools.product(METHODS, ("counter", "torch"), DTYPES)),
)
def test_a_captured_run_is_the_eager_one(device, unet, method, rng, dtype):
    captured, eager = pair(unet, device, method=method, rng=rng, dtype=dtype, steps=6)
    for seed in (1, 2**64 - 1):
        assert_close(captured, eager, (2, 3, 16, 16), seed=seed)
    for changes in ({"steps": 11}, {"clip_denoised": False}):
        captured.configure(**changes)
        eager.configure(**changes)
        assert_close(captured, eager, (2, 3, 16, 16), seed=3)
    assert len(captured._graphs.steps) == 1


@on_both()
def test_conditions_are_captured(device):
    model = Tiny().to(device.name).eval()
    options = {"guidance_scale": 3.0, "guidance_interval": (5, 30), "dynamic_threshold": 0.9}
    captured, eager = pair(model, device, steps=8, **options)
    image, mask = torch.rand(SHAPE).to(device.name), torch.eye(4).to(device.name)
    arguments = {"model_kwargs": {"y": LABELS.to(device.name)}, "image": image, "strength": 0.7}
    assert_close(captured, eager, **arguments, known=image, known_mask=mask)
    assert len(captured._graphs.steps) == 2


@pytest.mark.seconds
@on_both("method, rng", [("ddpm", "counter"), ("ddim", "torch"), ("dpmsolver++", "counter")])
def test_the_loop_neither_waits_nor_allocates(device, unet, method, rng):
    shape = (2, 3, 16, 16)
    for sampler in pair(unet, device, method=method, rng=rng, steps=20, dtype=torch.bfloat16):
        sampler.sample(shape)  # captured, compiled, cached
        steps = sampler._iterate(_call(sampler, shape), watched=False)
        next(steps)
        device.cuda.synchronize()
        allocations = device.cuda.memory_stats()["allocation.all.allocated"]
        device.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(18):
                next(steps)
        finally:
            device.cuda.set_sync_debug_mode("default")
        made = device.cuda.memory_stats()["allocation.all.allocated"] - allocations
        if sampler._graphs.capture is True:
            assert made == 0
        steps.close()


def _call(sampler, shape):
    """The call that sample(shape) makes."""
    kept = []
    iterate = sampler._iterate
    sampler._iterate = lambda call, watched: kept.append(call) or iter(())
    try:
        list(sampler.iterate(shape))
    finally:
        sampler._iterate = iterate
    return kept[0]


@on_both()
def test_samples_are_the_cpus_up_to_rounding(device):
    captured, _ = pair(closed_form(), device, steps=6)
    on_cpu = Sampler(closed_form(), PROCESS, steps=6, device="cpu", capture=False)
    expected = on_cpu.sample(SHAPE, seed=5)
    actual = captured.sample(SHAPE, seed=5).cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@on_both()
def test_weights_are_read_live(device, unet):
    captured, eager = pair(unet, device, steps=3)
    kept = {name: value.clone() for name, value in unet.state_dict().items()}
    samples = [assert_close(captured, eager, SIZE)]
    try:
        for parameter in unet.parameters():
            parameter.data.mul_(1.05)
        samples.append(assert_close(captured, eager, SIZE))
        moved = {name: value * 0.9 for name, value in kept.items()}
        unet.load_state_dict(moved, assign=True)
        samples.append(assert_close(captured, eager, SIZE))
        unet.to(memory_format=torch.channels_last)
        samples.append(assert_close(captured, eager, SIZE))
    finally:
        unet.load_state_dict(kept, assign=True)
    assert not torch.equal(samples[0], samples[1]) and not torch.equal(samples[1], samples[2])


@pytest.mark.seconds
@on_both()
def test_other_threads_may_use_the_gpu_during_a_capture(device, unet):
    stop, failed = threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                torch.zeros(1000, device=device.name).sum().item()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for size in (8, 16):
            captured, eager = pair(unet, device, steps=3)
            assert_close(captured, eager, (1, 3, size, size))
    finally:
        stop.set()
        thread.join()
    assert not failed


@on_both()
def test_another_stream_is_honoured(device, unet):
    captured, eager = pair(unet, device, steps=4)
    expected = eager.sample(SIZE, seed=2)
    for _ in range(3):  # a graph that another stream replayed last
        captured.sample(SIZE, seed=1)
        stream = device.cuda.Stream()
        with device.cuda.stream(stream):
            actual = captured.sample(SIZE, seed=2)
        captured.sample(SIZE, seed=3)
        device.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(captured._graphs.steps) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@on_both(cpu=[])
def test_a_device_that_is_not_current(device):
    captured, eager = pair(Tiny().to("cuda:1").eval(), device, steps=3, device="cuda:1")
    assert assert_close(captured, eager).device == torch.device("cuda:1")


@on_both()
def test_close_gives_the_memory_back(device, unet):
    captured, _ = pair(unet, device, steps=2)
    device.cuda.synchronize()
    device.cuda.empty_cache()
    before = device.cuda.memory_reserved()
    captured.sample((16, 3, 32, 32) if device.name == "cuda" else SIZE)
    assert device.cuda.memory_reserved() > before
    captured.close()
    device.cuda.empty_cache()
    assert device.cuda.memory_reserved() <= before + (64 << 20)  # cuBLAS keeps a workspace
    captured.sample(SIZE)


@on_both()
def test_auto_says_what_it_measured(device, unet):
    sampler = Sampler(unet, PROCESS, steps=3)
    sampler.sample(SIZE)
    assert "ms a step" in sampler.explain() or "ms eagerly" in sampler.explain()
    assert sampler.stats.seconds["capture"] > 0


@on_both()
def test_a_network_that_answers_nan_is_named_with_its_step(device):
    def model(x, t):
        return torch.where((t <= 10).view(-1, 1, 1, 1), float("nan"), x)

    for sampler in pair(model, device, diffusion(20), steps=3):
        with pytest.raises(TrainingError, match=r"not finite after step 1 \(timestep 10\)"):
            sampler.sample(SHAPE)


# --- What a capture rests on ------------------------------------------------------------------


class Normed(nn.Module):
    """Convolutions, and norms as one kernel each."""

    def __init__(self, channels=32):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(2))
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x, t):
        h = self.first(x)
        for norm in self.norms:
            h = ops.group_norm_silu(h, norm.num_groups, norm.weight, norm.bias)
        return self.last(h)


@on_both("channels_last, dtype", list(itertools.product((False, True), DTYPES[:2])))
def test_cuda_norms_inside_of_a_captured_step(device, channels_last, dtype):
    """Launched past PyTorch, on the stream that captures; on the CPU the C++ kernels."""
    name = "cuda" if device.name == "cuda" else "native"
    if name == "cuda" and native.cuda_problem(torch.device("cuda", 0)):
        pytest.skip(f"no CUDA C++ kernels: {native.cuda_problem(torch.device('cuda', 0))}")
    torch.manual_seed(0)
    model = Normed().to(device.name).eval()
    options = {"steps": 4, "channels_last": channels_last, "dtype": dtype}
    captured, eager = pair(model, device, **options)
    with fastdiff.backend(name):
        for seed in (1, 2):
            samples = assert_close(captured, eager, (2, 3, 16, 16), seed=seed)
    assert len(captured._graphs.steps) == 1
    with fastdiff.backend("reference"):
        expected = eager.sample((2, 3, 16, 16), seed=2)
    tolerance = 1e-3 if dtype is None else 0.1
    torch.testing.assert_close(samples, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.seconds
@on_both(
    "batch, dtype",
    cpu=[(64, None)],
    gpu=[(64, None), (64, torch.bfloat16), (65, torch.bfloat16), (256, torch.bfloat16)],
)
def test_large_batches_through_upsampling(device, unet, batch, dtype):
    shape = (batch, 3, 8, 8)
    options = {"steps": 2, "dtype": dtype, "channels_last": True}
    captured, eager = pair(unet, device, **options)
    whole = assert_close(captured, eager, shape, seed=3)
    last = eager.sample((2, *shape[1:]), seed=3, first_sample=batch - 2)
    tolerance = 1e-3 if dtype is None else 0.1
    torch.testing.assert_close(whole[-2:], last, rtol=tolerance, atol=tolerance)


@on_both("dtype", [(None,), (torch.bfloat16,)])
def test_cudnn_measures_for_the_graph_and_answers_the_same(device, unet, dtype, monkeypatch):
    monkeypatch.setattr(cudnn, "deterministic", False)
    monkeypatch.setattr(cudnn, "allow_tf32", False)
    captured, eager = pair(unet, device, steps=3, dtype=dtype)
    samples = (captured.sample((2, 3, 16, 16)), eager.sample((2, 3, 16, 16)))
    tolerance = 1e-3 if dtype is None else 0.1
    torch.testing.assert_close(*samples, rtol=tolerance, atol=tolerance)
    assert captured.explain().startswith("a captured CUDA graph") and not cudnn.benchmark


@on_both()
def test_all_samplers_capture_on_one_stream(device):
    before = len(Side._all)
    for size in (4, 8):
        assert_close(*pair(closed_form(), device, steps=2), (1, 2, size, size))
    assert len(Side._all) <= before + 1


@pytest.mark.seconds
@on_both()
def test_samplers_of_several_threads(device, unet):
    """Their captures come one after the other, and so do replays on streams of their own."""
    sizes = (8, 16, 8, 16)
    expected = [
        pair(unet, device, steps=3)[1].sample((1, 3, s, s), seed=i) for i, s in enumerate(sizes)
    ]
    actual, failed = {}, []

    def work(i, size):
        try:
            # The fake knows one thread's streams.
            own = contextlib.nullcontext()
            if device.name == "cuda":
                own = torch.cuda.stream(torch.cuda.Stream())
            with own:
                sampler = pair(unet, device, steps=3)[0]
                for _ in range(3):
                    actual[i] = sampler.sample((1, 3, size, size), seed=i)
                device.cuda.current_stream().synchronize()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=each) for each in enumerate(sizes)]
    for thread in threads:
        thread.start()
        if device.name == "cpu":
            thread.join()
    for thread in threads:
        thread.join()
    assert not failed
    for i, samples in enumerate(expected):
        torch.testing.assert_close(actual[i], samples, rtol=1e-4, atol=1e-4)
