"""How turns are timed. The GPU's are tried on stand-ins for CUDA's events, streams and graphs."""

import contextlib

import pytest
import torch

import fastdiff
from harness import timing

CPU = torch.device("cpu")


class FakeCuda:
    """A device on which every call takes one millisecond, launched or replayed."""

    def __init__(self):
        self.clock_ms, self.capturing = 0.0, None
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.clock_ms

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def capture_begin(self):
                self.calls, cuda.capturing = [], self

            def capture_end(self):
                cuda.capturing = None

            def replay(self):
                cuda.clock_ms += len(self.calls)

        class Stream:
            def wait_stream(self, other):
                pass

        self.Event, self.CUDAGraph, self.Stream = Event, Graph, Stream

    def call(self, index):
        if self.capturing is None:
            self.clock_ms += 1
        else:
            self.capturing.calls.append(index)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in ("Event", "CUDAGraph", "Stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    before = fastdiff.ops.backends.named()
    yield fake
    fastdiff.set_backend(before)


def test_a_graph_holds_every_input_in_turn(cuda):
    turn = timing.GpuTurn(timing.Contender("ours", cuda.call), [(0,), (1,), (2,)])
    assert turn.how == "graph"
    assert turn.graph.calls == [0, 1, 2] * 7  # the 20 ms of GRAPH_S, in whole rotations
    assert turn() == turn.estimate == pytest.approx(1e-3)


def test_a_long_call_is_not_repeated_for_the_graph(cuda):
    def call(index):
        for _ in range(50):
            cuda.call(index)

    turn = timing.GpuTurn(timing.Contender("ours", call), [(0,)])
    assert turn.calls == 1 and turn() == pytest.approx(50e-3)


def test_what_cannot_be_captured_is_launched(cuda):
    def call(index):
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        cuda.call(index)

    turn = timing.GpuTurn(timing.Contender("eager", call), [(0,)])
    assert turn.how.startswith("events: not capturable (operation not permitted when")
    assert turn() == pytest.approx(1e-3)
    told = timing.GpuTurn(timing.Contender("eager", cuda.call, capturable=False), [(0,)])
    assert told.how == "events" and told.graph is None


def test_a_contender_that_fails_says_so_before_it_is_timed(cuda):
    def call():
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        timing.GpuTurn(timing.Contender("sdpa flash", call), [()])


def test_inputs_rotate_past_the_cache(monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 1 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda")

    def make(size):
        return lambda: (torch.empty(size, dtype=torch.uint8),)

    def count(size, device=gpu):
        return len(timing.input_sets(make(size)(), make(size), device))

    assert count(1 << 20) == 3
    assert count(1 << 30 >> 4) == 1
    assert count(16) == timing.CALLS_PER_GRAPH
    assert count(16, CPU) == 1


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_inputs_are_filled_whatever_their_size(layout):
    for shape in [(2, 3, 5, 7), (1, 2, 1024, 1024 + 1), (2, 6, 9)]:
        x = timing.normal(*shape, dtype=torch.float32, device=CPU, layout=layout)
        assert x.shape == shape
        assert (x.stride(1) == 1) == (layout == "channels_last")
        assert torch.isfinite(x).all() and 0.7 < x.std() < 1.3
    offset = timing.normal(2, 3, 5, dtype=torch.float32, device=CPU, offset=1)
    assert not torch.equal(offset, timing.normal(2, 3, 5, dtype=torch.float32, device=CPU))


def test_with_backward_gives_every_wanted_gradient():
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    upstream = torch.randn(3)
    gradients = timing.with_backward(lambda a, b, c: a * b + c)(x, w, torch.ones(3), upstream)
    assert len(gradients) == 2
    assert all(torch.equal(g, e * upstream) for g, e in zip(gradients, (w, x), strict=True))


def test_a_turn_names_the_backend_and_answers_seconds_per_call():
    seen = []

    def call(x):
        seen.append((fastdiff.ops.backends.named(), x))

    before = fastdiff.ops.backends.named()
    turn = timing.CpuTurn(timing.Contender("ours", call, "reference"), [(1,)])
    turn.calls = 4
    seen.clear()
    try:
        assert 0 < turn() < 1
    finally:
        fastdiff.set_backend(before)
    assert seen == [("reference", 1)] * 4
