"""What the scripts ask of a GPU and, in a dry run, of the CPU: nothing else here is of CUDA alone.

The turns that are timed by CUDA's events and graphs are harness.timing's.
"""

import gc
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def chosen(dry: bool) -> torch.device:
    """Raises SystemExit without a GPU, unless the run is dry."""
    if dry:
        return CPU
    if not torch.cuda.is_available():
        raise SystemExit("no NVIDIA GPU that PyTorch can use was found here; --dry runs on the CPU")
    return GPU


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float | None:
    """The most memory that was in use since this was asked for last; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def release(device: torch.device) -> None:
    """Give back the memory of what is no longer referred to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def watched_by_ncu(device: torch.device) -> AbstractContextManager[Any]:
    """A block whose kernels ncu --profile-from-start off measures."""
    return torch.cuda.profiler.profile() if device.type == "cuda" else nullcontext()


def activity(device: torch.device) -> ProfilerActivity:
    return ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU


def kernels(profile: torch.profiler.profile, device: torch.device) -> list[FunctionEventAvg]:
    """What ran on the device: kernels, copies and fills; a CPU's operators."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    return [event for event in profile.key_averages() if event.device_type == kind]


def microseconds(event: FunctionEventAvg) -> float:
    """In all its calls, without what it called."""
    if event.device_type == DeviceType.CUDA:
        return event.self_device_time_total
    return event.self_cpu_time_total
