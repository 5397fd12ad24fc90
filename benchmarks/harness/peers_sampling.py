"""DDIM by fastdiff's Sampler, and by others in the settings that their users reach for.

One network for all, one x_T and the same timesteps, so that all make the same images: ``psnr_db``
says how nearly. The others are diffusers (UNet2DModel and DDIMScheduler), its network as a graph in
other runtimes (peers_graphs.py), and, named "plain", fastdiff's network on plain PyTorch
operations: what torch.compile would make of our own code. They are given what costs them least:
half-precision weights for half-precision products, timesteps that are on the device already.

    python -m harness.peers_sampling NAME BATCH CONTENDER THREADS

in benchmarks/ runs one of them in a process of its own and prints the process's peak memory in MB.
"""

import ctypes
import functools
import gc
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

import fastdiff
from fastdiff.models.flops import unet_flops
from harness import peers, peers_eager, peers_graphs

STEPS = 50
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EAGER = "diffusers float32"  # its default
COMPARED = 8  # images of a batch, where they are held to others

Update = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]  # (x_t, ε, t) -> x_prev
Modes = Mapping[str, dict[str, Any]]  # torch.compile's arguments by name
MODES: dict[str, Modes] = {
    "cpu": {"compiled": {"options": {"freezing": True}}},  # weights as constants, in oneDNN's order
    "cuda": {"compiled": {"mode": "default"}, "max-autotune": {"mode": "max-autotune"}},
}


@dataclass(frozen=True)
class Setting:
    """How a peer runs: the dtype of its weights, their layout, torch.compile's arguments, whether
    float32 products run in tf32 (None: as PyTorch does, convolutions alone), and the dtype that the
    CPU's autocast gives products."""

    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    compiled: dict[str, Any] | None = None
    tf32: bool | None = None
    autocast: torch.dtype = torch.float32


@dataclass
class Sampling:
    """Calls of a Sampler, each from the same x_T. ``cudnn``: a switch of torch.backends.cudnn that
    is on meanwhile."""

    sampler: fastdiff.Sampler
    noise: torch.Tensor
    cudnn: str | None = None

    def __call__(self) -> torch.Tensor:
        with switched((torch.backends.cudnn,) if self.cudnn else (), self.cudnn or "", True):
            return self.sampler.sample(self.noise.shape, noise=self.noise)


def fastdiff_sampling(
    name: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    steps: int = STEPS,
    *,
    cudnn: str | None = None,
    **options: Any,
) -> Sampling:
    """``options``: of the Sampler."""
    sampler = fastdiff.Sampler(
        peers.fastdiff_network(name).to(device),
        process(name),
        timesteps=timesteps(steps)[::-1],
        method="ddim",
        dtype=None if dtype == torch.float32 else dtype,
        **options,
    )
    return Sampling(sampler, peers.images(name, batch).to(device), cudnn)


def diffusers_sampling(
    name: str, batch: int, setting: Setting, device: torch.device, steps: int = STEPS
) -> peers.Step:
    model, update = peers.diffusers_network(name), _scheduled(steps)
    return _sampling(model, update, name, batch, setting, device, steps)


def graph_sampling(
    runtime: str, name: str, batch: int, dtype: torch.dtype, steps: int = STEPS
) -> peers.Step:
    """diffusers' network in the runtime, its scheduler around it. ImportError: it is missing."""
    network = peers_graphs.network(runtime, name, batch, dtype)
    # What a graph is given and answers is float32, whatever it computes in.
    return _loop(network, _scheduled(steps), name, batch, Setting(), torch.device("cpu"), steps)


def _scheduled(steps: int) -> Update:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=True)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps(steps)

    def update(x: torch.Tensor, output: torch.Tensor, t: int) -> torch.Tensor:
        # ε from the clipped x_0, as published and as the Sampler does.
        return scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample

    return update


def plain_sampling(
    name: str, batch: int, setting: Setting, device: torch.device, steps: int = STEPS
) -> peers.Step:
    bars = process(name).alphas_cumprod.tolist()

    def update(x: torch.Tensor, output: torch.Tensor, t: int) -> torch.Tensor:
        before = t - 1000 // steps
        return peers_eager.ddim_step(x, output, bars[t], bars[before] if before >= 0 else 1.0)

    model = peers.fastdiff_network(name)
    if not setting.channels_last:
        model = model.to(memory_format=torch.contiguous_format)
    sample = _sampling(model, update, name, batch, setting, device, steps)

    def on_plain_operations() -> object:
        with fastdiff.backend("reference"):
            return sample()

    return on_plain_operations


def _sampling(
    model: torch.nn.Module,
    update: Update,
    name: str,
    batch: int,
    setting: Setting,
    device: torch.device,
    steps: int,
) -> peers.Step:
    model = model.eval().to(device, setting.dtype)
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)
    network: Callable[..., Any] = model
    if setting.compiled is not None:
        # Of one line of code, for every peer that is compiled in this process.
        torch._dynamo.config.recompile_limit = 64
        network = torch.compile(model, dynamic=False, **setting.compiled)
    return _loop(network, update, name, batch, setting, device, steps)


def _loop(
    network: Callable[..., Any],
    update: Update,
    name: str,
    batch: int,
    setting: Setting,
    device: torch.device,
    steps: int,
) -> peers.Step:
    layout = torch.channels_last if setting.channels_last else torch.preserve_format
    noise = peers.images(name, batch).to(device, memory_format=layout)
    rows = [(t, torch.full((batch,), t, device=device)) for t in timesteps(steps)]

    @torch.no_grad()
    def sample() -> torch.Tensor:
        x = noise
        # Where a peer is to be at its best, cuDNN looks for the fastest kernels, as in a capture.
        search = switched((torch.backends.cudnn,), "benchmark", setting.channels_last or None)
        # Around all steps, so that weights are cast once.
        with products_in_tf32(setting.tf32), search, peers.autocast(setting.autocast):
            for t, on_device in rows:
                if setting.compiled is not None:
                    torch.compiler.cudagraph_mark_step_begin()
                output = network(x.to(setting.dtype, memory_format=layout), on_device)
                eps = getattr(output, "sample", output)[:, :3]  # DDIM takes no learned variance
                x = update(x, eps.float(), t)
        return x

    return sample


@contextmanager
def switched(owners: tuple[Any, ...], attribute: str, value: bool | None) -> Iterator[None]:
    """``owner.attribute = value`` for the length of a block; None leaves it as it is."""
    before = [getattr(owner, attribute) for owner in owners]
    try:
        for owner in owners if value is not None else ():
            setattr(owner, attribute, value)
        yield
    finally:
        for owner, was in zip(owners, before, strict=True):
            setattr(owner, attribute, was)


def products_in_tf32(wanted: bool | None) -> Any:
    return switched((torch.backends.cuda.matmul, torch.backends.cudnn), "allow_tf32", wanted)


def settings(device: torch.device, modes: Modes) -> dict[str, Setting]:
    """Of diffusers, by the name of the contender; the compiled ones in ``modes``."""
    made = {
        EAGER: Setting(),
        "diffusers float32 channels_last": Setting(channels_last=True),
        "diffusers bfloat16": Setting(torch.bfloat16),
        "diffusers bfloat16 channels_last": Setting(torch.bfloat16, True),
    }
    if device.type != "cpu":
        made["diffusers float32 without tf32"] = Setting(tf32=False)
        made["diffusers float32 all tf32"] = Setting(tf32=True)
    else:
        made["diffusers bfloat16 autocast"] = Setting(channels_last=True, autocast=torch.bfloat16)
    return made | compiled_settings("diffusers", modes)


def compiled_settings(peer: str, modes: Modes) -> dict[str, Setting]:
    return {
        f"{peer} {dtype_name} {mode}": Setting(dtype, True, options)
        for mode, options in modes.items()
        for dtype_name, dtype in DTYPES.items()
    }


def contenders(
    name: str,
    batch: int,
    device: torch.device,
    steps: int = STEPS,
    modes: Modes | None = None,
) -> dict[str, Callable[[], peers.Step]]:
    """By name, each made when it is called. ``modes``: of torch.compile; None: the device's."""
    modes = MODES[device.type] if modes is None else modes
    made: dict[str, Callable[[], peers.Step]] = {
        peer: lambda setting=setting: diffusers_sampling(name, batch, setting, device, steps)
        for peer, setting in settings(device, modes).items()
    }
    for peer, setting in {"plain float32": Setting(), **compiled_settings("plain", modes)}.items():
        made[peer] = lambda setting=setting: plain_sampling(name, batch, setting, device, steps)
    for dtype_name, dtype in DTYPES.items():
        for runtime, served in peers_graphs.RUNTIMES.items() if device.type == "cpu" else ():
            if dtype in served.dtypes:
                made[f"{runtime} {dtype_name}"] = lambda runtime=runtime, dtype=dtype: (
                    graph_sampling(runtime, name, batch, dtype, steps)
                )
        made[f"fastdiff {dtype_name}"] = lambda dtype=dtype: fastdiff_sampling(
            name, batch, dtype, device, steps
        )
        for mode, options in modes.items() if device.type == "cpu" else ():
            made[f"fastdiff {dtype_name} {mode}"] = lambda dtype=dtype, options=options: (
                fastdiff_sampling(name, batch, dtype, device, steps, compile=options)
            )
    return made


def on_first_call(make: Callable[[], peers.Step]) -> peers.Step:
    """A contender that is made in its first turn, where a race forgives an optional one."""
    once = functools.cache(make)
    return lambda: once()()


def reference_images(
    name: str, device: torch.device, steps: int, count: int = COMPARED
) -> tuple[str, torch.Tensor]:
    """(who made them, the first images of every batch): in float32 throughout, by diffusers where
    it is installed."""
    exact = Setting(tf32=False)
    try:
        who, sample = "diffusers", diffusers_sampling(name, count, exact, device, steps)
    except ImportError:
        who, sample = "plain", plain_sampling(name, count, exact, device, steps)
    return f"{who} float32 without tf32", sample()


def psnr_db(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Of images in [−1, 1], as far as both have them; 200 for equal ones."""
    count = min(len(images), len(reference))
    error = (images[:count].double() - reference[:count].double()).square().mean().item()
    return 200.0 if error == 0 else 10 * math.log10(4 / error)


def timesteps(steps: int) -> list[int]:
    """Descending, as DDIMScheduler and DDIM's authors space them."""
    return list(range(0, 1000, 1000 // steps))[::-1][-steps:]


def process(name: str) -> fastdiff.GaussianDiffusion:
    learned = name.startswith("iddpm")
    return fastdiff.create_diffusion(steps=1000, learn_sigma=learned)


def network_flops(name: str, batch: int) -> int:
    """Of the convolutions and matrix products of one call, two for each multiplication."""
    return batch * unet_flops(peers.NETWORKS[name], peers.size(name))


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
    """Of two sampling steps in a process of its own, after two that made ready what is kept."""
    import subprocess

    command = [sys.executable, "-m", __name__, name, str(batch), contender]
    command += [str(torch.get_num_threads())]
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def forget_what_made_the_network() -> None:
    """Memory that only led to a contender is given back, and the process's peak begins anew."""
    peers.forget()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    name, batch, contender, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    sample = contenders(name, int(batch), torch.device("cpu"), steps=2)[contender]()
    sample()
    forget_what_made_the_network()
    sample()
    # Not ru_maxrss, which begins with what the parent had when it started this process.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)
