"""The layout that the library's convolution reads and writes, and one launch of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.layouts import Maybe


def to_channels_last(v: Maybe, dtype: torch.dtype) -> Any:
    """``v`` itself where it is so already."""
    if v is None or (v.dtype == dtype and v.is_contiguous(memory_format=torch.channels_last)):
        return v
    return v.to(dtype).contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: Tensor, size: Sequence[int]) -> Tensor:
    """No view of another layout: what autograd answers may then be written to."""
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def run(shape: Any, addresses: list[int], moments: bool) -> None:
    """One launch in torch's threads."""
    library, threads = native.library(), torch.get_num_threads()
    workspace = native.borrow(library.convolution_workspace(shape, moments, threads))
    library.convolution_cpu(shape, *addresses, workspace.data_ptr(), threads)
    native.give_back(workspace)
