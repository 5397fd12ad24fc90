"""The sampler on a GPU: real CUDA graphs, no waiting and no allocation in the loop."""

import threading

import pytest
import torch

from fastdiff.errors import TrainingError
from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, Tiny, closed_form, diffusion, small_unet

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PROCESS = diffusion(40)
LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = small_unet(3, model_channels=64, channel_mult=(1, 2), attention_resolutions=(2,))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.cuda().eval()


def pair(model, process=PROCESS, **options):
    options = {"device": "cuda"} | options
    return (
        Sampler(model, process, capture=True, **options),
        Sampler(model, process, capture=False, **options),
    )


def assert_close(captured, eager, shape=SHAPE, **arguments):
    actual, expected = captured.sample(shape, **arguments), eager.sample(shape, **arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert captured.explain().startswith("a captured CUDA graph")
    return actual


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rng", ["counter", "torch"])
@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++"])
def test_a_captured_run_is_the_eager_one(unet, method, rng, dtype):
    captured, eager = pair(unet, method=method, rng=rng, dtype=dtype, steps=6)
    for seed in (1, 2**64 - 1):
        assert_close(captured, eager, (2, 3, 16, 16), seed=seed)
    for changes in ({"steps": 11}, {"clip_denoised": False}):
        captured.configure(**changes)
        eager.configure(**changes)
        assert_close(captured, eager, (2, 3, 16, 16), seed=3)
    assert len(captured._graphs.steps) == 1


def test_conditions_are_captured():
    model = Tiny().cuda().eval()
    options = {"guidance_scale": 3.0, "guidance_interval": (5, 30), "dynamic_threshold": 0.9}
    captured, eager = pair(model, steps=8, **options)
    image, mask = torch.rand(SHAPE).cuda(), torch.eye(4).cuda()
    arguments = {"model_kwargs": {"y": LABELS.cuda()}, "image": image, "strength": 0.7}
    assert_close(captured, eager, **arguments, known=image, known_mask=mask)
    assert len(captured._graphs.steps) == 2


def test_the_loop_neither_waits_nor_allocates(unet):
    for method, rng in (("ddpm", "counter"), ("ddim", "torch"), ("dpmsolver++", "counter")):
        captured, eager = pair(unet, method=method, rng=rng, steps=20, dtype=torch.bfloat16)
        for sampler in (captured, eager):
            shape = (2, 3, 16, 16)
            sampler.sample(shape)  # captured, compiled, cached
            steps = sampler._iterate(_call(sampler, shape), watched=False)
            next(steps)
            torch.cuda.synchronize()
            allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(18):
                    next(steps)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            made = torch.cuda.memory_stats()["allocation.all.allocated"] - allocations
            if sampler is captured:
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


def test_samples_are_the_cpus_up_to_rounding():
    captured, _ = pair(closed_form(), steps=6)
    on_cpu = Sampler(closed_form(), PROCESS, steps=6, device="cpu").sample(SHAPE, seed=5)
    torch.testing.assert_close(captured.sample(SHAPE, seed=5).cpu(), on_cpu, rtol=1e-3, atol=1e-3)


def test_weights_are_read_live(unet):
    captured, eager = pair(unet, steps=3)
    shape = (1, 3, 16, 16)
    kept = {name: value.clone() for name, value in unet.state_dict().items()}
    samples = [assert_close(captured, eager, shape)]
    try:
        for parameter in unet.parameters():
            parameter.data.mul_(1.05)
        samples.append(assert_close(captured, eager, shape))
        moved = {name: value * 0.9 for name, value in kept.items()}
        unet.load_state_dict(moved, assign=True)
        samples.append(assert_close(captured, eager, shape))
        unet.to(memory_format=torch.channels_last)
        samples.append(assert_close(captured, eager, shape))
    finally:
        unet.load_state_dict(kept, assign=True)
    assert not torch.equal(samples[0], samples[1]) and not torch.equal(samples[1], samples[2])


def test_other_threads_may_use_the_gpu_during_a_capture(unet):
    stop, failed = threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                torch.zeros(1000, device="cuda").sum().item()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for size in (8, 16):
            captured, eager = pair(unet, steps=3)
            assert_close(captured, eager, (1, 3, size, size))
    finally:
        stop.set()
        thread.join()
    assert not failed


def test_another_stream_is_honoured(unet):
    captured, eager = pair(unet, steps=4)
    expected = eager.sample((1, 3, 16, 16), seed=2)
    for _ in range(3):  # a graph that another stream replayed last
        captured.sample((1, 3, 16, 16), seed=1)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            actual = captured.sample((1, 3, 16, 16), seed=2)
        captured.sample((1, 3, 16, 16), seed=3)
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(captured._graphs.steps) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    captured, eager = pair(Tiny().to("cuda:1").eval(), steps=3, device="cuda:1")
    assert assert_close(captured, eager).device == torch.device("cuda:1")


def test_close_gives_the_memory_back(unet):
    captured, _ = pair(unet, steps=2)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    captured.sample((16, 3, 32, 32))
    assert torch.cuda.memory_reserved() > before
    captured.close()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (64 << 20)  # cuBLAS keeps workspaces
    captured.sample((1, 3, 16, 16))


def test_a_model_that_waits_for_the_device_runs_eagerly():
    sampler = Sampler(lambda x, t: x * float(x.mean() > 0), PROCESS, steps=3, device="cuda")
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CUDA graph"):
        sampler.sample(SHAPE)
    assert sampler.explain().startswith("eager: it cannot be captured")
    torch.cuda.synchronize()  # the device is usable
    captured, eager = pair(closed_form(), steps=2)
    assert_close(captured, eager)


def test_auto_says_what_it_measured(unet):
    sampler = Sampler(unet, PROCESS, steps=3)
    sampler.sample((1, 3, 16, 16))
    assert "ms a step" in sampler.explain() or "ms eagerly" in sampler.explain()
    assert sampler.stats.seconds["capture"] > 0


def test_a_network_that_answers_nan_is_named_with_its_step():
    def model(x, t):
        return torch.where((t <= 10).view(-1, 1, 1, 1), float("nan"), x)

    for sampler in pair(model, diffusion(20), steps=3):
        with pytest.raises(TrainingError, match=r"not finite after step 1 \(timestep 10\)"):
            sampler.sample(SHAPE)
