"""How a CUDA graph is captured, and what is left of a capture that failed, on a fake torch.cuda
(fake_cuda.py); test_failed_captures.py has the same on a GPU."""

import threading
import warnings

import pytest
import torch
from torch.backends import cudnn

from capture_tools import PROCESS, assert_equal, pair
from fake_cuda import faked
from fastdiff.errors import InputError
from fastdiff.sampling import cuda_graph
from fastdiff.sampling.cuda_graph import CudaGraph, Side, fastest_convolutions, waiting_refused
from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, closed_form

CPU = torch.device("cpu", 0)


@pytest.fixture
def cuda(monkeypatch):
    """Threads that other tests left (a progress bar's) are none of a test's own."""
    count, before = threading.active_count, threading.active_count()
    monkeypatch.setattr(threading, "active_count", lambda: count() - before + 1)
    with faked() as fake:
        yield fake


@pytest.fixture
def another_thread():
    """A second thread, so that the mode which refuses to wait cannot be used."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    yield
    over.set()
    thread.join()


def sampled_eagerly(model, reason):
    sampler = Sampler(model, PROCESS, steps=3)
    with pytest.warns(RuntimeWarning, match=f"cannot be captured as a CUDA graph: {reason}"):
        samples = sampler.sample(SHAPE)
    assert torch.equal(samples, Sampler(model, PROCESS, steps=3, capture=False).sample(SHAPE))
    return sampler


def assert_as_before(cuda):
    assert not cuda.recording and cuda.capturing is None
    assert cuda.entered == cuda.streams[:1]
    cuda.draw(3)
    assert_equal(*pair(closed_form(), steps=2))
    assert (cuda.sync_mode, cudnn.benchmark) == (0, False)


def reads_back(x, t):
    return x * float(x.mean() > 0)


# --- What is captured -------------------------------------------------------------------------


def test_a_model_that_waits_is_found_before_a_capture_begins(cuda):
    sampled_eagerly(reads_back, "called a synchronizing CUDA operation")
    assert not cuda.graphs and cuda.modes == [2, 0]
    assert_as_before(cuda)


def test_a_model_may_wait_when_it_is_called_for_the_first_time(cuda):
    kept = {}

    def model(x, t):
        if "scale" not in kept:
            kept["scale"] = float(x.abs().max())
        return x / kept["scale"]

    Sampler(model, PROCESS, steps=3, capture=True).sample(SHAPE)
    assert len(cuda.graphs) == 1


def test_other_threads_may_wait_meanwhile(cuda, another_thread):
    assert_equal(*pair(closed_form(), steps=2))
    assert cuda.modes == []


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_mode_is_put_back(cuda, mode, error):
    cuda.sync_mode = mode
    try:
        with waiting_refused():
            assert cuda.sync_mode == 2
            if error:
                raise error
    except BaseException as caught:
        assert type(caught) is error
    assert cuda.sync_mode == mode


def test_the_modes_own_warning_is_not_the_users(cuda, monkeypatch):
    given = cuda.set_sync_debug_mode

    def set_mode(mode):
        if mode == "error":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        given(mode)

    monkeypatch.setattr(cuda, "set_sync_debug_mode", set_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(*pair(closed_form(), steps=2))


# --- A capture that fails ---------------------------------------------------------------------


def breaks(cuda):
    """A model in whose captures a value is read back, and not before."""

    def model(x, t):
        return reads_back(x, t) if cuda.capturing is not None else x * (x.mean() > 0)

    return model


def test_after_a_capture_that_broke_all_is_as_before(cuda):
    for count in (1, 2):
        sampled_eagerly(breaks(cuda), "CUDA error: operation not permitted when stream is captur")
        assert len(cuda_graph._failed) == count
        assert_as_before(cuda)


def test_threads_that_keep_the_mode_from_use_leave_it_to_the_capture(cuda, another_thread):
    sampled_eagerly(reads_back, "CUDA error: operation not permitted when stream is capturing")
    assert cuda.modes == []
    assert_as_before(cuda)


@pytest.mark.parametrize("error", [RuntimeError, InputError, KeyboardInterrupt])
def test_an_error_in_mid_capture_leaves_nothing(cuda, error):
    def model(x, t):
        if cuda.capturing is not None:
            raise error("in mid-capture")
        return x

    if error is RuntimeError:
        sampled_eagerly(model, "in mid-capture")
    else:
        with pytest.raises(error):
            Sampler(model, PROCESS, steps=2).sample(SHAPE)
    assert not cuda_graph._failed  # PyTorch ended it itself
    assert_as_before(cuda)


def test_a_capture_that_is_insisted_on_fails_and_the_next_one_does_not(cuda):
    with pytest.raises(InputError, match="cannot be captured as a CUDA graph: CUDA error: operat"):
        Sampler(breaks(cuda), PROCESS, steps=2, capture=True).sample(SHAPE)
    assert_as_before(cuda)


def test_the_pool_of_a_capture_that_failed_is_not_used_again(cuda):
    fail = []
    inner = closed_form()

    def model(x, t):
        return inner(x, t) * (float(x.mean() > 0) if fail and cuda.capturing is not None else 1.0)

    captured, eager = pair(model, steps=2)
    kept = assert_equal(captured, eager)
    first = cuda.graphs[0].pool
    fail.append(True)
    with pytest.raises(InputError, match="cannot be captured"):
        captured.sample((1, 2, 4, 4))
    assert not captured._graphs.places and cuda.uses[first] == 1  # the graph from before
    fail.clear()
    assert torch.equal(assert_equal(captured, eager), kept)
    assert_equal(captured, eager, 2, 2, 4, 4)
    assert cuda.graphs[-1].pool != first


def test_a_capture_that_could_not_begin_is_cleaned_up_after(cuda, monkeypatch):
    kind = type(cuda.CUDAGraph())
    begin = kind.capture_begin

    def broken(graph, pool):
        begin(graph, pool)
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "capture_begin", broken)
        sampled_eagerly(closed_form(), "CUDA error: out of memory")
    assert_as_before(cuda)


@pytest.mark.parametrize("missing", ["_cuda_endAllocateToPool", "_cuda_releasePool"])
def test_without_the_private_functions_the_cause_is_named_all_the_same(cuda, monkeypatch, missing):
    monkeypatch.delattr(torch._C, missing)
    sampled_eagerly(breaks(cuda), "CUDA error: operation not permitted when stream is capturing")


# --- One stream per device --------------------------------------------------------------------


def test_all_samplers_of_a_device_capture_on_one_stream(cuda):
    for steps in (2, 3):
        for size in (4, 6):
            assert_equal(*pair(closed_form(), steps=steps), 1, 2, size, size)
    assert len(cuda.streams) == 2 and len({graph.pool for graph in cuda.graphs}) == 4
    assert Side.of(CPU) is not Side.of(torch.device("cpu", 1))


def test_captures_of_two_threads_do_not_interleave(cuda):
    """And nothing is replayed while something is captured on its stream."""
    inside, most, sides = [], [], [Side.of(CPU), Side.of(torch.device("cpu", 1))]

    def call():
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()

    def capture(side):
        graph = CudaGraph(call, CPU, (cuda.graph_pool_handle(), side))
        graph.replay()

    threads = [threading.Thread(target=capture, args=(sides[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 12 and len(cuda.graphs) == 4


def test_what_is_replayed_on_another_stream_comes_after_what_was_before(cuda):
    one, two = (pair(closed_form(), timesteps=[39])[0] for _ in range(2))
    one.sample(SHAPE)
    two.sample(SHAPE)
    other = cuda.Stream()
    cuda.log.clear()
    with cuda.stream(other):
        one.sample(SHAPE)
    two.sample(SHAPE)
    default = cuda.streams[0]
    replays = [i for i, entry in enumerate(cuda.log) if entry[0] == "replay"]
    assert [cuda.log[i][1] for i in replays] == [other, default]
    assert cuda.log.index(("wait", other, default)) < replays[0]
    assert replays[0] < cuda.log.index(("wait", default, other)) < replays[1]


def test_every_replay_waits_for_the_one_before(cuda):
    place = CudaGraph.new_place(CPU)
    one, two = (CudaGraph(lambda: None, CPU, place) for _ in range(2))
    default, other = cuda.streams[0], cuda.Stream()
    cuda.log.clear()
    with cuda.stream(other):
        one.replay()
    two.replay()
    two.replay()
    kinds = [(kind, stream) for kind, stream, _ in cuda.log]
    assert kinds == [
        *(("wait", other), ("replay", other)),
        *(("wait", default), ("replay", default), ("replay", default)),
    ]


def test_the_memory_of_a_step_that_failed_is_not_given_away_too_early(cuda):
    sampled_eagerly(reads_back, "called a synchronizing")
    default, side = cuda.streams
    assert cuda.log[-1] == ("wait", default, side)


# --- cuDNN ------------------------------------------------------------------------------------


def seen_benchmark(fails=False):
    seen = []

    def model(x, t):
        seen.append(cudnn.benchmark)
        if fails:
            raise RuntimeError("no")
        return x

    return seen, model


def test_cudnn_measures_in_the_warm_ups_and_the_capture_alone(cuda):
    seen, model = seen_benchmark()
    Sampler(model, PROCESS, steps=2, capture=True).sample(SHAPE)
    assert seen[:3] == [True] * 3 and not any(seen[3:])  # and not where eager is measured
    assert cudnn.benchmark is False
    seen, model = seen_benchmark(fails=True)
    with pytest.raises(InputError, match="cannot be captured"):
        Sampler(model, PROCESS, steps=2, capture=True).sample(SHAPE)
    assert seen == [True] and cudnn.benchmark is False


@pytest.mark.parametrize("how", ["cudnn", "torch", "frozen"])
def test_cudnn_does_not_measure_where_the_user_forbids_it(cuda, monkeypatch, how):
    if how == "cudnn":
        monkeypatch.setattr(cudnn, "deterministic", True)
    elif how == "torch":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    else:
        monkeypatch.setattr(torch.backends, "flags_frozen", lambda: True)
    seen, model = seen_benchmark()
    Sampler(model, PROCESS, steps=2, capture=True).sample(SHAPE)
    assert not any(seen)


def test_where_cudnn_measures_already_it_goes_on(monkeypatch):
    monkeypatch.setattr(cudnn, "benchmark", True)
    with fastest_convolutions():
        pass
    assert cudnn.benchmark is True
