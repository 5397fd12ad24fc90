"""Where the tests of captured steps run: on a GPU, and on the CPU with a fake of torch.cuda."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.backends import cudnn

from fake_cuda import faked
from on_both import unet_on


@pytest.fixture
def device(request, monkeypatch):
    """``name``, and ``cuda``: torch.cuda or the fake. cuDNN takes the same kernels in a graph and
    eagerly."""
    monkeypatch.setattr(cudnn, "deterministic", True)
    if request.param == "cuda":
        draw = functools.partial(torch.randn, device="cuda")
        yield SimpleNamespace(name="cuda", cuda=torch.cuda, draw=draw)
        return
    with faked() as cuda:
        yield SimpleNamespace(name="cpu", cuda=cuda, draw=cuda.draw)


@pytest.fixture
def unet(device):
    return unet_on(device.name)
