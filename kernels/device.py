"""What of a GPU the choice of tiles rests on."""

import functools

import torch

H200 = 132  # multiprocessors, as of an H100


@functools.cache
def processors_of(device: torch.device) -> int:
    """The multiprocessors of a GPU; of an H200 for the interpreter and the compile tests."""
    if device.type != "cuda":
        return H200
    return torch.cuda.get_device_properties(device).multi_processor_count
