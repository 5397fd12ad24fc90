"""Launches past Triton's binder take the kernels that ``kernel[grid](...)`` would have taken."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops
from fastdiff.methods.table import StepTable
from fastdiff.ops.normal import normal
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.schedules import cosine_betas

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastdiff.kernels import launcher  # noqa: E402
from fastdiff.kernels.launcher import Launch  # noqa: E402
from harness.fake_gpu import fake_gpu  # noqa: E402


@triton.jit(do_not_specialize=["plain"])
def kernel(a, b, special, plain, real, count, strides, FLAG: tl.constexpr, SIZE: tl.constexpr):
    pass


@pytest.fixture
def gpu():
    with fake_gpu() as gpu:
        yield gpu


@pytest.fixture
def binds(monkeypatch):
    """How many launches went through Triton's binder, in a list of one number."""
    count, run = [0], JITFunction.run

    def counted(self, *args, **kwargs):
        count[0] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(launcher, "_run", counted)
    return count


def checked(gpu, launch, *changing):
    """Launch, and compare what is launched with what ``kernel[grid]`` launches."""
    launch(*changing)
    actual = gpu.launches[-1]
    launch.kernel[launch.grid](*changing, *launch.numbers, **launch.constants)
    assert actual == gpu.launches[-1]


# --- Any call -----------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]
BUFFERS = {dtype: torch.empty(64, dtype=dtype) for dtype in DTYPES}
tensors = st.builds(  # an offset of some elements keeps 16-byte alignment, or breaks it
    lambda dtype, first: BUFFERS[dtype][first:], st.sampled_from(DTYPES), st.sampled_from([0, 1, 8])
)
maybe = st.none() | tensors
edges = [0, 1, 2, 15, 16, -16, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]
integers = st.sampled_from(edges) | st.integers(-100, 100)
floats = st.sampled_from([0.0, 1.0, 16.0, float("nan")])
launches = st.builds(
    Launch,
    st.just(kernel),
    st.sampled_from([(7,), (1, 2), (3, 4, 5)]),
    st.sampled_from([1, 16, 5, 2**40]) | floats,
    st.sampled_from([(1, 16), (16, 1), (3, 5)]),
    FLAG=st.sampled_from([True, False, 1, 0]),
    SIZE=st.sampled_from([16, 32]),
    num_warps=st.sampled_from([1, 4]),
    enable_fp_fusion=st.booleans(),
)
calls = st.tuples(launches, st.integers(0, 1), maybe, maybe, integers, integers, integers)


@settings(max_examples=100, deadline=None)
@given(st.lists(calls, min_size=1, max_size=12))
def test_a_call_launches_what_triton_would(calls):
    with fake_gpu() as gpu:
        first = gpu.device
        for launch, device, *changing in calls + calls:
            gpu.device = first + 10**6 * device
            gpu.stream = 3 * device
            checked(gpu, launch, *changing)


def test_what_stays_keeps_its_type(gpu):
    for one in (1, 1.0, True):
        launch = Launch(kernel, (1,), one, (1, 2), FLAG=True, SIZE=16)
        for _ in range(2):
            checked(gpu, launch, None, None, 1, 1, 1)


@pytest.mark.parametrize("first", [0, 1])
def test_alignment_is_each_tensor_s_own(gpu, first):
    launch = Launch(kernel, (1,), 4, (1, 2), FLAG=True, SIZE=16)
    a, b = (BUFFERS[torch.float32][at:] for at in (first, 1 - first))
    for pair in ((a, b), (b, a), (a, a), (b, b)) * 2:
        checked(gpu, launch, *pair, 1, 1, 1)
    assert len(launch.found) == 4


def test_what_triton_types_otherwise_is_refused(gpu):
    launch = Launch(kernel, (1,), 4, (1, 2), FLAG=True, SIZE=16)
    for value in ((1, 2), "x", 1.0, True):
        with pytest.raises(TypeError, match="a launch changes by tensors, None and integers"):
            launch(None, None, value, 1, 1)


# --- When a launch is Triton's own ----------------------------------------------------------------


def launched_twice(binds, prepare=lambda: None):
    """How many of two more launches, after ``prepare``, are Triton's own."""
    launch = Launch(kernel, (1,), 4, (1, 2), FLAG=True, SIZE=16)
    changing = (BUFFERS[torch.float32], None, 2, 3, 1)
    launch(*changing)
    assert binds == [1]
    launch(*changing)
    assert binds == [1]
    prepare()
    launch(*changing)
    launch(*changing)
    return binds[0] - 1


def test_a_call_seen_before_goes_past_the_binder(gpu, binds):
    assert launched_twice(binds) == 0
    assert len(gpu.launches) == 4 and len(set(gpu.launches)) == 1


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called(gpu, binds, hook, monkeypatch):
    chain = type(getattr(triton.knobs.runtime, hook))()
    monkeypatch.setattr(triton.knobs.runtime, hook, chain)
    assert launched_twice(binds, lambda: chain.add(lambda metadata: None)) == 2
    chain.calls.clear()
    binds[0] = 0
    assert launched_twice(binds, lambda: setattr(triton.knobs.runtime, hook, print)) == 2


def test_hooks_of_a_kernel_are_called(gpu, binds, monkeypatch):
    monkeypatch.setattr(kernel, "pre_run_hooks", [])
    assert launched_twice(binds, lambda: kernel.add_pre_run_hook(lambda *_, **__: None)) == 2


@pytest.mark.parametrize(
    ("of", "name", "value"),
    [("runtime", "debug", True), ("compilation", "instrumentation_mode", "consan")],
)
def test_modes_are_asked_for_at_each_launch(gpu, binds, monkeypatch, of, name, value):
    switch = lambda: monkeypatch.setattr(getattr(triton.knobs, of), name, value)  # noqa: E731
    assert launched_twice(binds, switch) == 2


def test_a_patched_binder_is_not_gone_past(gpu, binds, monkeypatch):
    seen = []
    patch = lambda: monkeypatch.setattr(JITFunction, "run", lambda *a, **_: seen.append(a))  # noqa: E731
    launched_twice(binds, patch)
    assert len(seen) == 2


@pytest.mark.parametrize("reason", ["version", "target"])
def test_what_is_not_known_is_triton_s_own(gpu, binds, monkeypatch, reason):
    if reason == "version":
        monkeypatch.setattr(launcher, "KNOWN", False)
    else:
        monkeypatch.setattr(gpu, "get_current_target", lambda: GPUTarget("hip", "gfx942", 64))
    launch = Launch(kernel, (1,), 4, (1, 2), FLAG=True, SIZE=16)
    for _ in range(3):
        launch(None, None, 2, 3, 1)
    assert binds == [3] and not launch.found


# --- The operations -------------------------------------------------------------------------------

TABLES = [
    StepTable.from_process(GaussianDiffusion(cosine_betas(6), var_type=var_type), method=method)
    for var_type in ("fixed_large", "learned_range")
    for method in ("ddpm", "dpmsolver++")
]
NUMBER = torch.tensor(3)


def view(choose, *shape, dtype=None):
    """A tensor in one of the layouts and dtypes, at an address that 16 divides or not."""
    size, first = torch.Size(shape).numel(), choose([0, 1, 8])
    x = torch.zeros(size + 8, dtype=dtype or choose(DTYPES[:3]))[first : first + size]
    if len(shape) == 4 and choose([True, False]):
        n, c, h, w = shape
        return x.view(n, h, w, c).permute(0, 3, 1, 2)
    return x.view(shape)


def counters(choose):
    numbers = [0, 1, 5, 16, 2**31 - 1, NUMBER]
    return {"seed": choose([*numbers, 2**64 - 1]), "first_sample": choose(numbers)}


def call_posterior_step(choose):
    table = choose(TABLES)
    guided = choose([None, 2.5, 1, torch.tensor(2.0)])
    n, side = choose([1, 2]), choose([4, 5])
    channels = 6 if table.doubled_output else 3
    shape = (2 * n if guided is not None else n, channels, side, side)
    given = counters(choose) if choose([True, False]) else {"noise": view(choose, n, 3, side, side)}
    x_t, output, before = (
        view(choose, *s) for s in ((n, 3, side, side), shape, (n, 3, side, side))
    )
    step = choose([0, 1, 3, NUMBER])
    rest = {
        "prev_x_start": before,
        "guidance_scale": guided,
        "return_x_start": choose([True, False]),
    }
    ops.posterior_step(x_t, output, table, step, **given, **rest)


def call_q_sample(choose):
    n, side = choose([1, 2]), choose([4, 5])
    given = counters(choose) if choose([True, False]) else {"noise": None}
    signal, sigma = torch.rand(2, choose([1, 10]))
    x = view(choose, n, 3, side, side)
    ops.q_sample(x, torch.zeros(n, dtype=torch.int64), signal, sigma, **given)


def call_normal(choose):
    out = view(choose, choose([1, 2]), 3, choose([4, 5]), 4)
    step = choose([0, 1, 2**31, NUMBER])
    normal(tuple(out.shape), step=step, out=out, backend="triton", **counters(choose))


def film(choose, n, channels):
    if choose([True, False]):
        return {}
    scale, shift = view(choose, n, 2 * channels).chunk(2, 1)
    return {"scale": scale, "shift": shift}


def call_rms_norm_silu(choose):
    n, channels = choose([1, 2]), choose([1, 6, 16])
    x, weight = view(choose, n, channels, 4, choose([4, 5])), view(choose, channels)
    eps = choose([1e-12, 1, 1.0])
    activation = choose(["silu", None])
    ops.rms_norm_silu(x, weight, eps=eps, activation=activation, **film(choose, n, channels))


def call_group_norm_silu(choose):
    n, side = choose([1, 2]), choose([1, 5, 72])
    x = view(choose, n, 8, side, side).requires_grad_(choose([True, False]))
    weight = bias = None
    if choose([True, False]):
        weight, bias = view(choose, 8, dtype=torch.float32), view(choose, 8, dtype=torch.float32)
    eps = choose([1e-5, 1, 1.0])
    given = film(choose, n, 8) | {"add": choose([None, view(choose, n, 8)])}
    y = ops.group_norm_silu(x, choose([1, 4]), weight, bias, eps, **given)
    if y.requires_grad:
        y.backward(view(choose, *y.shape, dtype=y.dtype))


def call_attention(choose):
    n, heads, tokens = (choose(sizes) for sizes in ([1, 2], [1, 2], [4, 16, 33]))
    qkv = view(choose, n, 3 * 16 * heads, tokens).requires_grad_(choose([True, False]))
    out = ops.attention(qkv, heads, order=choose(["heads_first", "qkv_first"]))
    if out.requires_grad:
        out.backward(view(choose, *out.shape, dtype=out.dtype))


@pytest.mark.parametrize(
    "call",
    [
        call_posterior_step, call_q_sample, call_normal, call_rms_norm_silu, call_group_norm_silu,
        call_attention,
    ],
)  # fmt: skip
def test_operations_launch_what_triton_would(call, binds, monkeypatch):
    original = Launch.__call__
    with fake_gpu() as gpu, fastdiff.backend("triton"):

        def twice(self, *changing):
            original(self, *changing)
            actual, made = gpu.launches[-1], binds[0]
            self.kernel[self.grid](*changing, *self.numbers, **self.constants)
            assert actual == gpu.launches[-1]
            binds[0] = made

        monkeypatch.setattr(Launch, "__call__", twice)
        for seed in range(200):
            call(random.Random(seed).choice)
            before = binds[0]
            call(random.Random(seed).choice)
            assert binds[0] == before  # the second time past the binder


@pytest.mark.cuda
def test_gpu_agrees_at_every_address(binds):
    room, weight = torch.randn(2 * 16 * 25 + 8, device="cuda"), torch.rand(16, device="cuda")
    for first in (0, 1, 8, 3) * 3:
        x = room[first : first + 800].view(2, 16, 5, 5)
        with fastdiff.backend("reference"):
            expected = ops.rms_norm_silu(x, weight)
        with fastdiff.backend("triton"):
            actual = ops.rms_norm_silu(x, weight)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert binds[0] <= 2  # aligned, and not
