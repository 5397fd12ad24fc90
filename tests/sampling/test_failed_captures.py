"""What a capture that fails leaves behind on a GPU: nothing. test_cuda_graph.py has the reasons."""

import contextlib
import gc
import itertools
import threading

import pytest
import torch
from torch.backends import cudnn

from fastdiff.errors import InputError
from fastdiff.sampling.sampler import Sampler
from on_both import PROCESS, assert_close, on_both, pair
from sampler_tools import SHAPE, closed_form


def failing(how, device):
    """A model that cannot be captured."""
    capturing = device.cuda.is_current_stream_capturing

    def model(x, t):
        if how == "item":
            return x * float(x.mean() > 0)
        if how == "item in mid-capture":
            return x * (float(x.mean() > 0) if capturing() else x.mean() > 0)
        if how == "to the host":
            return x * x.mean().cpu().to(x.device)
        if how == "from the host":
            return x * torch.tensor([0.5]).to(x.device)
        if capturing():  # "error in mid-capture"
            raise RuntimeError("in mid-capture")
        return x

    return model


ON_ANY = ("item", "item in mid-capture", "error in mid-capture")


@on_both(
    "how, threads, capture",
    cpu=list(itertools.product(ON_ANY, (False, True), ("auto", True))),
    gpu=list(
        itertools.product((*ON_ANY, "to the host", "from the host"), (False, True), ("auto", True))
    ),
)
def test_after_a_capture_that_failed_all_is_as_before(device, how, threads, capture):
    """``threads``: there is another one, so that the failure is found in the capture itself."""
    before, eager = pair(closed_form(), device, steps=2)
    kept = assert_close(before, eager)
    sampler = Sampler(failing(how, device), PROCESS, steps=3, device=device.name, capture=capture)
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    if threads:
        thread.start()
    try:
        for first in (True, False):
            if capture is True:
                with pytest.raises(InputError, match="cannot be captured as a CUDA graph"):
                    sampler.sample(SHAPE)
                continue
            with (
                pytest.warns(RuntimeWarning, match="eagerly") if first else contextlib.nullcontext()
            ):
                sampler.sample(SHAPE)
            assert sampler.explain().startswith("eager: it cannot be captured as a CUDA graph")
    finally:
        over.set()
        if threads:
            thread.join()
    assert device.cuda.get_sync_debug_mode() == 0 and not cudnn.benchmark
    assert device.draw(3).isfinite().all()
    device.cuda.synchronize()
    device.cuda.empty_cache()
    captured, eager = pair(closed_form(), device, steps=3)
    assert_close(captured, eager, (2, 2, 6, 6))
    assert torch.equal(assert_close(before, eager_of(before, device)), kept)
    assert_close(before, eager_of(before, device), (5, 2, 4, 4))  # in the pool that it had
    assert device.draw(3).isfinite().all()


def eager_of(captured, device):
    return Sampler(captured.model, PROCESS, steps=2, device=device.name, capture=False)


@on_both(cpu=[])
def test_captures_that_fail_keep_no_memory(device, unet):
    def model(x, t):
        return failing("item in mid-capture", device)(unet(x, t), t)

    def fail():
        sampler = Sampler(model, PROCESS, steps=2, device="cuda", capture=True)
        with pytest.raises(InputError, match="cannot be captured"):
            sampler.sample((16, 3, 32, 32))
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    fail()
    before = fail()
    assert max(fail() for _ in range(4)) <= before + (8 << 20)
