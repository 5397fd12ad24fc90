"""DDIM by fastdiff's Sampler, and by diffusers in the settings that its users reach for.

    python -m harness.peers_sampling NAME BATCH CONTENDER

in benchmarks/ runs one of them in a process of its own and prints the process's peak memory in MB.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._inductor.config
from diffusers import DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from harness import peers

STEPS = 50
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EAGER = "diffusers float32"  # its default
TF32_PEERS = {
    "diffusers float32 without tf32": (torch.float32, {"tf32": False}),
    "diffusers float32 all tf32": (torch.float32, {"tf32": True}),
}


def fastdiff_sampling(
    name: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    steps: int = STEPS,
    compile: bool | dict = False,
) -> peers.Step:
    model = peers.fastdiff_network(name).to(device)
    sampler = fastdiff.Sampler(
        model,
        process(name),
        steps=steps,
        method="ddim",
        dtype=None if dtype == torch.float32 else dtype,
        compile=compile,
    )
    shape = (batch, 3, size(name), size(name))
    return lambda: sampler.sample(shape)


def diffusers_sampling(
    name: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    steps: int = STEPS,
    *,
    channels_last: bool = False,
    compiled: dict | None = None,
    tf32: bool | None = None,
) -> peers.Step:
    """``tf32``: whether float32 products run in it; None: as PyTorch does, convolutions alone."""
    model = peers.diffusers_network(name).eval().to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    network = model
    if compiled is not None:
        if device.type == "cpu":  # weights as constants, in oneDNN's order
            torch._inductor.config.freezing = True
        network = torch.compile(model, **compiled)
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=True)
    scheduler.set_timesteps(steps)
    generator = torch.Generator(device).manual_seed(0)

    @torch.no_grad()
    def sample() -> torch.Tensor:
        x = torch.randn(batch, 3, size(name), size(name), generator=generator, device=device)
        low = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        with low, products_in_tf32(tf32):
            for t in scheduler.timesteps:
                output = network(x, t).sample[:, :3]  # a learned variance is not DDIM's
                x = scheduler.step(output.float(), t, x).prev_sample
        return x

    return sample


@contextmanager
def products_in_tf32(wanted: bool | None) -> Iterator[None]:
    if wanted is None:
        yield
        return
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = wanted
    try:
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.allow_tf32 = was


def contenders(
    name: str, batch: int, device: torch.device, steps: int = STEPS, compiles: bool = True
) -> dict[str, Callable[[], peers.Step]]:
    """By name, each made when it is called."""
    how = {} if device.type == "cpu" else {"mode": "max-autotune"}
    settings: dict[str, tuple[torch.dtype, dict]] = {
        EAGER: (torch.float32, {}),
        **({} if device.type == "cpu" else TF32_PEERS),
        "diffusers float32 channels_last": (torch.float32, {"channels_last": True}),
        "diffusers bfloat16": (torch.bfloat16, {}),
        "diffusers bfloat16 channels_last": (torch.bfloat16, {"channels_last": True}),
    }
    if compiles:
        last = {"channels_last": True, "compiled": how}
        settings["diffusers float32 compiled"] = (torch.float32, last)
        settings["diffusers bfloat16 compiled"] = (torch.bfloat16, last)
    made: dict[str, Callable[[], peers.Step]] = {
        peer: lambda dtype=dtype, options=options: diffusers_sampling(
            name, batch, dtype, device, steps, **options
        )
        for peer, (dtype, options) in settings.items()
    }
    for dtype_name, dtype in DTYPES.items():
        made[f"fastdiff {dtype_name}"] = lambda dtype=dtype: fastdiff_sampling(
            name, batch, dtype, device, steps
        )
        if compiles and device.type == "cpu":
            made[f"fastdiff {dtype_name} compiled"] = lambda dtype=dtype: fastdiff_sampling(
                name, batch, dtype, device, steps, compile={"options": {"freezing": True}}
            )
    return made


def process(name: str) -> fastdiff.GaussianDiffusion:
    learned = name.startswith("iddpm")
    return fastdiff.create_diffusion(steps=1000, learn_sigma=learned)


def size(name: str) -> int:
    return 64 if name.endswith("64") else 32


def network_flops(name: str, batch: int) -> int:
    """Of the convolutions and matrix products of one call, two for each multiplication."""
    side = size(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), fastdiff.backend("reference"):
        peers.fastdiff_network(name)(torch.zeros(1, 3, side, side), torch.zeros(1))
    return batch * counter.get_total_flops()


def matrix_product_share(call: peers.Step) -> float:
    """The part of a call's time that is convolutions and matrix products, by the profiler."""
    with torch.profiler.profile() as profile:
        call()
    products = ("conv", "addmm", "aten::mm", "bmm", "linear", "attention", "scaled_dot")
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    spent = sum(
        event.self_cpu_time_total
        for event in events
        if any(product in event.key for product in products) and "reorder" not in event.key
    )
    return spent / total


def peak_memory_mb(name: str, batch: int, contender: str) -> float:
    """Of two sampling steps in a process of its own."""
    import subprocess

    command = [sys.executable, "-m", __name__, name, str(batch), contender]
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    made = contenders(sys.argv[1], int(sys.argv[2]), torch.device("cpu"), steps=2)
    sample = made[sys.argv[3]]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of what made the network is forgotten
    sample()
    # Not ru_maxrss, which begins with what the parent had when it started this process.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)
