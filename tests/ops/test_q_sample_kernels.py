"""q_sample's kernels: values on every instruction set, the noise drawn inside, gradients, torch."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.ops import native
from fastdiff.ops.counters import Counters, known_step, training_step
from fastdiff.ops.normal import normal
from fastdiff.ops.normal.op import FAST_ERROR
from kernel_tools import (
    DEVICES,
    LAYOUTS,
    agreements,
    assert_drawn_alike,
    compile_for,
    each_isa,
    examples,
    instructions_drawing,
    noise_of,
    poisoned_outputs,
    spilled,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = torch.get_default_device()
SIGNAL, SIGMA = torch.linspace(1, 0.02, 50), torch.linspace(0.03, 1, 50)

shapes = st.one_of(
    st.tuples(st.integers(0, 4), st.integers(1, 70)),
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 600)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 33), st.integers(1, 33)),
    st.tuples(*[st.integers(1, 5)] * 5),
)


def inputs(shape, dtype, layout="contiguous"):
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    x_start, noise = torch.randn(2, *shape, generator=generator, device="cpu").to(DEVICE, dtype)
    t = torch.randint(len(SIGNAL), shape[:1], generator=generator, device="cpu").to(DEVICE)
    return LAYOUTS[layout](x_start), t, LAYOUTS[layout](noise)


def coefficients(t, dimensions):
    rows = (-1,) + (1,) * (dimensions - 1)
    return SIGNAL[t].double().view(rows), SIGMA[t].double().view(rows)


@pytest.mark.seconds
@pytest.mark.any_backend
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    drawn=st.booleans(),
)
@settings(deadline=None, max_examples=examples(150))
def test_error_is_at_most_twice_that_of_pytorch(shape, dtype, layout, drawn):
    x_start, t, noise = inputs(shape, dtype, layout)
    given = {"seed": 3, "step": 7, "first_sample": 2} if drawn else {"noise": noise}
    for isa in each_isa():
        with poisoned_outputs():
            x_t, returned = ops.q_sample(x_start, t, SIGNAL, SIGMA, **given)
        if drawn:
            step = training_step(7)
            counters = dict(seed=3, step=step, first_sample=2)
            noise = noise_of(shape, dtype=dtype, device=DEVICE, **counters)
        assert torch.equal(returned, noise), isa
        signal, sigma = coefficients(t, len(shape))
        exact = signal * x_start.double() + sigma * noise.double()
        eager = signal.to(dtype) * x_start + sigma.to(dtype) * noise
        ulp = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
        if exact.numel():
            allowed = 2 * (eager.double() - exact).abs().max() + ulp
            assert ((x_t.double() - exact).abs() <= allowed).all(), isa
        assert x_t.dtype == dtype and x_t.stride() == torch.empty_like(x_start).stride()


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 3, 65, 64), (2, 5, 7, 9), (1, 150, 16, 16)])
def test_nothing_depends_on_threads_or_on_what_is_returned(dtype, layout, shape):
    x_start, t, _ = inputs(shape, dtype, layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            with poisoned_outputs():
                results.append(ops.q_sample(x_start, t, SIGNAL, SIGMA, seed=2**64 - 1)[0])
                alone, none = ops.q_sample(
                    x_start, t, SIGNAL, SIGMA, seed=2**64 - 1, return_noise=False
                )
            results.append(alone)
            assert none is None
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    contiguous = ops.q_sample(x_start.contiguous(), t, SIGNAL, SIGMA, seed=2**64 - 1)[0]
    assert torch.equal(results[0], contiguous)


@pytest.mark.any_backend
@pytest.mark.parametrize("noise_dtype", [*DTYPES, torch.float64])
def test_noise_may_have_another_dtype_and_layout(noise_dtype):
    x_start, t, noise = inputs((2, 3, 6, 5), torch.bfloat16)
    noise = noise.to(noise_dtype).contiguous(memory_format=torch.channels_last)
    x_t, returned = ops.q_sample(x_start, t, SIGNAL, SIGMA, noise=noise)
    assert returned is noise
    signal, sigma = coefficients(t, 4)
    exact = signal * x_start.double() + sigma * noise.double()
    assert ((x_t.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


@pytest.mark.any_backend
def test_counters_may_be_tensors():
    x_start, t, _ = inputs((2, 3, 5), torch.float32)
    numbers = {"seed": 2**64 - 5, "step": 9, "first_sample": 2**63 + 2**33}
    expected = ops.q_sample(x_start, t, SIGNAL, SIGMA, **numbers)
    tensors = {"seed": torch.tensor(-5), "step": torch.tensor([9])}
    tensors["first_sample"] = torch.tensor(2**33 - 2**63)
    for backend in (fastdiff.ops.backends.named(), "reference"):
        with fastdiff.backend(backend):
            actual = [ops.q_sample(x_start, t, SIGNAL, SIGMA, **tensors) for _ in range(2)][1]
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 + FAST_ERROR)
    assert not torch.equal(ops.q_sample(x_start, t, SIGNAL, SIGMA, seed=2**64 - 5)[0], expected[0])


@pytest.mark.any_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_samples_number_may_be_a_tensor(layout):
    """The same bits as from an int; numbers wrap around at 2^64."""
    x_start, t, _ = inputs((3, 4, 6, 8), torch.float32, layout)
    for first in (0, 2**32 + 1, 2**63 + 7, 2**64 - 1):
        bits = torch.tensor(first - 2**64 if first >= 2**63 else first)
        actual = ops.q_sample(x_start, t, SIGNAL, SIGMA, seed=1, first_sample=bits)
        for i in range(3):
            number, one = (first + i) % 2**64, slice(i, i + 1)
            x, row = x_start[one], t[one]
            alone = ops.q_sample(x, row, SIGNAL, SIGMA, seed=1, first_sample=number)
            assert torch.equal(actual[0][one], alone[0]) and torch.equal(actual[1][one], alone[1])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_every_step_behind_the_training_steps_base_counts(backend):
    """Those of known regions too, which come behind the training steps."""
    x_start, t, _ = inputs((2, 3, 5), torch.float32)
    for step in (known_step(0), 2**32 - 1):
        with fastdiff.backend(backend):
            _, noise = ops.q_sample(x_start, t, SIGNAL, SIGMA, seed=1, step=step - 2**31)
        torch.testing.assert_close(noise, normal((2, 3, 5), seed=1, step=step))


@pytest.mark.any_backend
def test_tables_and_timesteps_of_any_dtype_and_stride():
    x_start, t, noise = inputs((4, 3, 5), torch.float32)
    expected, _ = ops.q_sample(x_start, t, SIGNAL, SIGMA, noise=noise)
    spread = torch.stack([SIGNAL, SIGMA], dim=1).double()
    wide_t = torch.stack([t, t], dim=1)[:, 1].to(torch.int16)
    for _ in range(2):
        x_t, _ = ops.q_sample(x_start, wide_t, spread[:, 0], spread[:, 1], noise=noise)
        assert torch.equal(x_t, expected)


@pytest.mark.any_backend
def test_a_call_like_the_last_one_is_checked_again_where_it_may_differ():
    x_start, t, noise = inputs((4, 3, 5), torch.float32)
    tensor = torch.tensor(1)
    for _ in range(2):
        ops.q_sample(x_start, t, SIGNAL, SIGMA, seed=1)
        ops.q_sample(x_start, t, SIGNAL, SIGMA, seed=tensor, step=tensor)
        ops.q_sample(x_start, t, SIGNAL, SIGMA, seed=1, first_sample=tensor)
        ops.q_sample(x_start, t, SIGNAL, SIGMA, noise=noise)
    for counters, message in (
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1, "step": 2**31}, "step is 2147483648"),
        ({"seed": 1, "first_sample": 2**64 - 2}, "first_sample"),
        ({"seed": tensor.int()}, "seed is a torch.int32 tensor"),
        ({"seed": tensor, "step": tensor.expand(2)}, "step is a .* of 2 elements"),
        ({"seed": tensor, "first_sample": -1}, "first_sample"),
        ({"seed": 1, "first_sample": tensor.int()}, "first_sample is a torch.int32 tensor"),
        ({"seed": 1, "first_sample": tensor.expand(2)}, "first_sample is a .* of 2 elements"),
        ({"seed": 1, "first_sample": tensor.to("meta")}, "first_sample is a .* on meta"),
    ):
        with pytest.raises(InputError, match=message):
            ops.q_sample(x_start, t, SIGNAL, SIGMA, **counters)
    with pytest.raises(InputError, match="must have the shape"):
        ops.q_sample(x_start[:, :2], t, SIGNAL, SIGMA, noise=noise)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_on_the_cpu_a_bad_timestep_is_an_error(backend):
    x_start, t, noise = inputs((4, 3, 5), torch.float32)
    bad = t.clone()
    bad[2] = 50
    with fastdiff.backend(backend):
        for given in ({"seed": 1}, {"noise": noise}):
            for _ in range(2):
                ops.q_sample(x_start, t, SIGNAL, SIGMA, **given)
            with pytest.raises(InputError, match="t must lie in 0 … 49 .* got 50"):
                ops.q_sample(x_start, bad, SIGNAL, SIGMA, **given)


# --- Gradients and torch ------------------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_reference(dtype, compiled):
    x_start, t, noise = inputs((3, 4, 6, 5), dtype, "channels_last")
    weight = torch.randn(3, 5, 4, 6).permute(0, 2, 3, 1)  # a gradient of another layout

    def gradients(call, **given):
        x, z = x_start.clone().requires_grad_(), noise.float().requires_grad_()
        x_t, returned = call(x, t, SIGNAL, SIGMA, **({"noise": z} | given))
        assert returned is not None and (returned is z or not returned.requires_grad)
        (x_t.float() * weight).sum().backward()
        return x.grad, z.grad

    torch.compiler.reset()
    call = torch.compile(ops.q_sample, fullgraph=True, backend="aot_eager") if compiled else None
    actual = gradients(call or ops.q_sample), gradients(call or ops.q_sample, noise=None, seed=1)
    with fastdiff.backend("reference"):
        expected = gradients(ops.q_sample), gradients(ops.q_sample, noise=None, seed=1)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine[0], theirs[0], rtol=torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(mine[1], theirs[1], rtol=1e-6, atol=0)


def test_higher_derivatives_and_transforms():
    x_start, t, noise = inputs((2, 3), torch.float32)

    def call(x):
        return ops.q_sample(x, t, SIGNAL, SIGMA, noise=noise)[0]

    signal = SIGNAL[t][:, None].expand(2, 3)
    x = x_start.clone().requires_grad_()
    (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 2 * signal**2)
    torch.testing.assert_close(torch.func.grad(lambda x: call(x).sum())(x_start), signal)
    tangent = torch.func.jvp(call, (x_start,), (torch.ones_like(x_start),))[1]
    torch.testing.assert_close(tangent, signal)
    with torch.autograd.forward_ad.dual_level(), fastdiff.backend("native"):
        with pytest.raises(InputError, match="only .reference. serves"):
            call(x_start)


@pytest.mark.sample(3)
@pytest.mark.any_backend
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "given",
    [
        {"noise": True},
        {"seed": 5},
        {"seed": torch.tensor(5), "first_sample": torch.tensor(2**40)},
        {},
    ],
)
@pytest.mark.parametrize("return_noise", [True, False])
def test_it_compiles_as_one_graph(given, return_noise):
    x_start, t, noise = inputs((2, 3, 4, 4), torch.float32)
    given = given | {"return_noise": return_noise} | ({"noise": noise} if "noise" in given else {})
    torch.compiler.reset()
    compiled = torch.compile(ops.q_sample, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, ops.q_sample):
        torch.manual_seed(0)
        results.append(call(x_start, t, SIGNAL, SIGMA, **given))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.any_backend
@pytest.mark.seconds
def test_inductor_compiles_it():
    x_start, t, _ = inputs((2, 3, 4, 4), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ops.q_sample(2 * x, t, SIGNAL, SIGMA, seed=1)[0] + 1)
    torch.testing.assert_close(
        compiled(x_start), ops.q_sample(2 * x_start, t, SIGNAL, SIGMA, seed=1)[0] + 1
    )


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_operator_passes_opcheck(drawn, gradient):
    x_start, t, noise = inputs((2, 3, 4, 4), torch.float32, "channels_last")
    x_start.requires_grad_(gradient)
    counters = Counters(torch.tensor(3), 4, torch.tensor(2**40)) if drawn else Counters()
    tensors = (x_start, None if drawn else noise, t, SIGNAL, SIGMA)
    arguments = (*tensors, drawn, "native", *counters.flat())
    torch.library.opcheck(torch.ops.fastdiff.q_sample.default, arguments)


# --- The plan -----------------------------------------------------------------------------------


def test_the_plan():
    x_start, t, _ = inputs((2, 3), torch.float32)
    for x, backend, reason in (
        (x_start, "native", "C\\+\\+ kernel"),
        (x_start.double(), "reference", "not float64"),
        (x_start.to("meta"), "reference", "no kernels for meta"),
    ):
        choice = fastdiff.explain("q_sample", x, t, SIGNAL, SIGMA)
        assert choice.backend == backend
        assert re.search(reason, choice.reason)
    tracked = SIGNAL.clone().requires_grad_()
    assert fastdiff.explain("q_sample", x_start, t, tracked, SIGMA).backend == "reference"
    x_t, _ = ops.q_sample(x_start, t, tracked, SIGMA, seed=1)
    x_t.sum().backward()
    assert tracked.grad is not None
    with (
        fastdiff.backend("native"),
        pytest.raises(InputError, match="only .reference. has gradients for the tables"),
    ):
        ops.q_sample(x_start, t, tracked, SIGMA, seed=1)
    with (
        fastdiff.backend("cuda"),
        pytest.raises(InputError, match="without CUDA|not on cpu"),
    ):
        ops.q_sample(x_start, t, SIGNAL, SIGMA, seed=1)


# --- Triton -------------------------------------------------------------------------------------


@pytest.mark.seconds
def test_triton_interpreter_agrees_with_the_cpu():
    pytest.importorskip("triton")
    assert agreements("triton_elementwise_check.py", "q_sample") == 17


@pytest.mark.seconds
@pytest.mark.sample(1)
@pytest.mark.parametrize("capability", [90, 80, 100])
def test_triton_compiles_without_a_gpu_and_without_spills(capability, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from fastdiff.kernels.q_sample import WARPS, q_sample_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tables = {"signal": "*fp32", "sigma": "*fp32", "t": "*i64"}
    for dtype, one_run in (("*fp32", True), ("*bf16", False)):
        pointers = {"x_start": dtype, "noise": None, "x_t": dtype, "drawn": dtype, **tables}
        for counter in ("*i64", "i64"):
            counters = dict.fromkeys(("step", "seed", "first_sample"), counter)
            compiled = compile_for(
                capability,
                q_sample_kernel,
                pointers | counters,
                {"DRAWS": True, "ONE_RUN": one_run, "WIDE": False},
                num_warps=WARPS,
            )
            assert not spilled(compiled, tmp_path)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("dtype", "drawn", "most"),
    [("fp32", None, 29), ("fp32", "*fp32", 30), ("bf16", None, 31), ("bf16", "*bf16", 32)],
)
def test_triton_draws_in_few_instructions(dtype, drawn, most, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from fastdiff.kernels.q_sample import q_sample_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"x_start": f"*{dtype}", "x_t": f"*{dtype}", "drawn": drawn, "t": "*i64"}
    types |= {"signal": "*fp32", "sigma": "*fp32", "seed": "i64", "first_sample": "i64"}
    types["noise"] = None
    flags = {"DRAWS": True, "ONE_RUN": True, "WIDE": False}
    aligned = ("x_start", "x_t", "drawn", "x_sample", "noise_sample", "out_sample", "spatial")
    assert instructions_drawing(q_sample_kernel, types, flags, aligned, tmp_path) <= most


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gpu_agrees_with_the_cpu(dtype, layout, device):
    x_start, t, _ = inputs((3, 3, 33, 32), dtype, layout)
    expected = ops.q_sample(x_start, t, SIGNAL, SIGMA, seed=2**63 + 7, step=5, first_sample=2**33)
    on_gpu = [v.to(device) for v in (x_start, t, SIGNAL, SIGMA)]
    counters = {"seed": 7 - 2**63, "step": 5, "first_sample": 2**33}
    counters = {name: torch.tensor(value, device=device) for name, value in counters.items()}
    x_t, noise = ops.q_sample(*on_gpu, **counters)
    assert_drawn_alike(noise.cpu(), expected[1])
    of_this, _ = ops.q_sample(x_start, t, SIGNAL, SIGMA, noise=noise.cpu())
    torch.testing.assert_close(x_t.cpu(), of_this, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_sizes_of_a_sample_stay_64_bits_wide():
    x_start = torch.zeros(1, 1).expand(1, 2**33)  # no memory: only the plan is made
    from fastdiff.ops.layouts import common_layout

    shape, ((_, sample, _, spatial),) = common_layout([x_start], counted=True)
    assert shape == (1, 1, 2**33) and spatial == 0
    plan = native.library().QSample(shape, 1, *[(0, math.prod(shape), 0, 1)] * 3)
    assert plan is not None
