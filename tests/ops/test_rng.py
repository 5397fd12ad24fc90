"""Counter-based noise: published vectors, distribution, layouts, streams, backends, errors."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastdiff.errors import InputError
from fastdiff.ops import backends, native
from fastdiff.ops.counters import X_T_STEP, known_step, sampling_step, training_step
from fastdiff.ops.layouts import sample_layout
from fastdiff.ops.normal import drawn_apart, normal, op
from fastdiff.ops.normal.op import _choose
from fastdiff.ops.normal.reference import philox4x32
from kernel_tools import agreements, assert_drawn_alike, each_isa, instructions_drawing

# Random123's kat_vectors: philox4x32, 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def native_words(quads, *, seed, step, sample, first_quad=0):
    out = torch.empty(quads, 4, dtype=torch.int32)
    native.library().philox_cpu(out.data_ptr(), quads, seed, step, sample, first_quad)
    return out.to(torch.int64) & 0xFFFFFFFF


def ulps(values, exact):
    """Distance of float32 ``values`` from float64 ``exact``, in float32 ulps of the latter."""
    exact = np.asarray(exact, np.float64)
    return np.abs(np.asarray(values, np.float64) - exact) / np.spacing(
        np.maximum(np.abs(exact), 1e-30).astype(np.float32)
    )


# --- Integers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_reference_meets_the_published_vectors(counter, key, expected):
    assert philox4x32(torch.tensor(counter), key).tolist() == list(expected)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_native_meets_the_published_vectors(isa, counter, key, expected):
    quad, step, low, high = counter
    words = native_words(
        1, seed=key[0] | key[1] << 32, step=step, sample=low | high << 32, first_quad=quad
    )
    assert words[0].tolist() == list(expected)


@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    sample=st.integers(0, 2**64 - 1),
    first_quad=st.integers(0, 2**32 - 64),
)
@settings(max_examples=50, deadline=None)
def test_native_words_are_the_reference_words(seed, step, sample, first_quad):
    quads = torch.arange(first_quad, first_quad + 37)
    counter = torch.stack(
        (
            quads,
            torch.full_like(quads, step),
            torch.full_like(quads, sample & 0xFFFFFFFF),
            torch.full_like(quads, sample >> 32),
        ),
        -1,
    )
    expected = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    words = native_words(37, seed=seed, step=step, sample=sample, first_quad=first_quad)
    assert torch.equal(words, expected)


# --- Values -----------------------------------------------------------------------------------


def test_elements_follow_the_documented_counter_and_box_muller():
    seed, step, sample = 2**40 + 3, sampling_step(4), 2**35 + 1
    z = normal((1, 6), seed=seed, step=step, first_sample=sample, dtype=torch.float64)
    expected = []
    for quad in (0, 1):
        counter = torch.tensor((quad, step, sample & 0xFFFFFFFF, sample >> 32))
        r = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).tolist()
        u = [(word + 0.5) / 2**32 for word in r]
        for a, b in ((u[0], u[1]), (u[2], u[3])):
            radius = math.sqrt(-2 * math.log(a))
            expected += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
    np.testing.assert_allclose(z[0].numpy(), expected[:6], rtol=1e-13)


def test_native_is_within_four_ulps_of_float64(isa):
    shape = (2, 1 << 18)
    z = normal(shape, seed=11)
    words = torch.stack([native_words(1 << 16, seed=11, step=0, sample=i) for i in range(2)])
    u = (words.to(torch.float32) * 2.0**-32 + 2.0**-33).double().view(2, -1, 2)
    radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * math.pi * u[..., 1]
    exact = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).view(shape)
    # π/2 in float64 leaves cos(2πu) an absolute error of 1e-16 near its zeros: no ulp of float32.
    assert ulps(z.numpy(), exact.numpy()).max() <= 4
    assert ulps(normal(shape, seed=11, backend="reference").numpy(), exact.numpy()).max() <= 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instruction_sets_agree_bit_for_bit(dtype):
    draws = []
    for _ in each_isa():
        out = torch.empty(5, 3, 19, 23, dtype=dtype).to(memory_format=torch.channels_last)
        draws.append(normal((5, 3, 19, 23), seed=5, out=out))
    bits = [draw.contiguous().view(torch.int8) for draw in draws]
    assert all(torch.equal(other, bits[0]) for other in bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_float32_draw(isa, dtype):
    shape = (3, 1 << 18)  # enough for float16's subnormals, 5 in 10^5
    exact = normal(shape, seed=9)
    assert (exact.abs() < 2.0**-14).sum() > 10
    assert torch.equal(normal(shape, seed=9, dtype=dtype), exact.to(dtype))
    assert torch.equal(
        normal((1, 999), seed=9, dtype=dtype, backend="reference"),
        normal((1, 999), seed=9, backend="reference").to(dtype),
    )


@pytest.mark.seconds
def test_ten_million_draws_are_standard_normal():
    z = normal((10, 1_000_000), seed=20240607, step=training_step(12)).numpy()
    n = z.size
    values = z.ravel().astype(np.float64)
    # Standard errors of the first four moments of n draws: 1, √2, √15, √96, each over √n.
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(values**power) - moment) < 4.5 * math.sqrt(spread / n), power
    assert stats.kstest(values, "norm", mode="asymp").pvalue > 1e-3
    # Neighbours in a sample, the two halves of a pair, and neighbouring samples are uncorrelated.
    for a, b in ((z[:, :-1], z[:, 1:]), (z[:, ::2], z[:, 1::2]), (z[:-1], z[1:])):
        assert abs(np.mean(a.astype(np.float64) * b)) < 4.5 / math.sqrt(a.size)
    # Box–Muller's pairs would show a dependence in their squares were the words correlated.
    squares = np.mean((values[::2] ** 2 - 1) * (values[1::2] ** 2 - 1))
    assert abs(squares) < 4.5 * 2 / math.sqrt(n / 2)


def test_seeds_steps_and_samples_give_different_streams():
    draws = {
        "base": normal((1, 4096), seed=1),
        "seed": normal((1, 4096), seed=2),
        "seed's high word": normal((1, 4096), seed=1 + 2**32),
        "step": normal((1, 4096), seed=1, step=sampling_step(0)),
        "next step": normal((1, 4096), seed=1, step=sampling_step(1)),
        "known region": normal((1, 4096), seed=1, step=known_step(0)),
        "training": normal((1, 4096), seed=1, step=training_step(0)),
        "sample": normal((1, 4096), seed=1, first_sample=1),
        "sample's high word": normal((1, 4096), seed=1, first_sample=2**32),
    }
    z = torch.cat(list(draws.values()))
    correlation = torch.corrcoef(z).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(4096)


def test_steps_of_different_uses_never_meet():
    next_step = X_T_STEP + 1
    for name, step_of, count in (
        ("sampling", sampling_step, 2**31 - 1),
        ("training", training_step, 2**30),
        ("known", known_step, 2**30),
    ):
        assert step_of(0) == next_step
        next_step = step_of(count - 1) + 1
        for outside in (-1, count):
            with pytest.raises(InputError, match=f"{name} step is {outside}"):
                step_of(outside)
    assert next_step == 2**32


# --- Batches and layouts ----------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 40), st.integers(1, 40))


@given(
    shape=shapes,
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**64 - 10),
    split=st.integers(0, 5),
    backend=st.sampled_from(["native", "reference"]),
    channels_last=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_sample_does_not_depend_on_its_batch(shape, seed, first, split, backend, channels_last):
    options = dict(seed=seed, step=3, backend=backend)
    whole = normal(shape, first_sample=first, **options)
    split = min(split, shape[0])
    out = torch.empty(shape)
    if channels_last:
        out = out.to(memory_format=torch.channels_last)
    for begin, end in ((0, split), (split, shape[0])):
        normal((end - begin, *shape[1:]), first_sample=first + begin, out=out[begin:end], **options)
    assert torch.equal(out, whole)


@pytest.mark.parametrize("shape", [(2, 3, 64, 65), (3, 5, 7, 9), (1, 1, 130, 257), (2, 70, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_values_do_not_depend_on_layout_or_threads(isa, shape, dtype, threads):
    expected = normal(shape, seed=3, step=2, dtype=dtype, backend="reference").float()
    tolerance = dict(rtol=1e-6, atol=1e-9) if dtype == torch.float32 else dict(rtol=2**-7, atol=0)
    nan = float("nan")
    outs = {
        "contiguous": torch.full(shape, nan, dtype=dtype),
        "channels_last": torch.full(shape, nan, dtype=dtype).to(memory_format=torch.channels_last),
        "reversed": torch.full(shape[::-1], nan, dtype=dtype).permute(3, 2, 1, 0),
        "sliced": torch.full((shape[0], 2 * shape[1], *shape[2:]), nan, dtype=dtype)[:, ::2],
        "rows": torch.full((*shape[:3], shape[3] + 3), nan, dtype=dtype)[..., 1:-2],
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, out in outs.items():
            assert normal(shape, seed=3, step=2, out=out) is out
            torch.testing.assert_close(
                out.float(), expected, **tolerance, msg=lambda m, n=name: n + m
            )
    finally:
        torch.set_num_threads(before)
    # What lies between the elements of a view stays as it was.
    assert outs["sliced"]._base[:, 1::2].isnan().all()
    assert outs["rows"]._base[..., [0, -1, -2]].isnan().all()


@pytest.mark.parametrize(
    "shape", [(4,), (4, 1), (3, 17), (2, 3, 11), (2, 3, 4, 5, 6), (0, 3, 8, 8)]
)
def test_any_rank(shape):
    z = normal(shape, seed=1)
    assert z.shape == shape
    torch.testing.assert_close(z, normal(shape, seed=1, backend="reference"))
    if z.ndim == 5:
        out = torch.empty(shape).to(memory_format=torch.channels_last_3d)
        assert torch.equal(normal(shape, seed=1, out=out), z)


def test_an_empty_sample_is_served():
    assert normal((3, 0, 8), seed=1).shape == (3, 0, 8)


def test_layouts_are_described():
    def layout(*shape, format=torch.contiguous_format):
        return tuple(sample_layout(torch.empty(shape).to(memory_format=format)))

    assert layout(2, 3, 4, 5) == (1, 60, 60, 0, 1)
    assert layout(2, 3, 4, 5, format=torch.channels_last) == (3, 20, 60, 1, 3)
    assert layout(7) == (1, 1, 1, 0, 1)
    assert sample_layout(torch.empty(2, 3, 5, 4).mT) is None


def test_writing_is_visible_to_autograd():
    out = torch.empty(2, 8)
    weight = torch.ones(8, requires_grad=True)
    loss = (weight * out).sum()
    normal((2, 8), seed=0, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        normal((2, 8), seed=0, out=torch.empty(2, 8))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_counters_may_be_tensors(backend):
    numbers = dict(seed=2**64 - 5, step=2**32 - 2, first_sample=2**63 + 2**33)
    tensors = dict(seed=torch.tensor(-5), step=torch.tensor([2**32 - 2]))
    tensors["first_sample"] = torch.tensor([[2**33 - 2**63]])
    expected = normal((2, 9), **numbers, backend=backend)
    assert torch.equal(normal((2, 9), **tensors, backend=backend), expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_numbers_from_a_tensor_wrap_around(backend):
    options = dict(seed=3, backend=backend)
    wrapped = normal((3, 9), first_sample=torch.tensor(-1), **options)
    assert torch.equal(wrapped[:1], normal((1, 9), first_sample=2**64 - 1, **options))
    assert torch.equal(wrapped[1:], normal((2, 9), first_sample=0, **options))


def test_numpy_integers_are_integers():
    z = normal((np.int64(2), 4), seed=np.uint64(2**64 - 1), first_sample=np.int32(3))
    assert torch.equal(z, normal((2, 4), seed=2**64 - 1, first_sample=3))


# --- Choosing and refusing --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device_type", "dtype", "cuda_kernel", "triton", "expected"),
    [
        ("cpu", torch.float32, False, True, "native"),
        ("cpu", torch.float16, True, True, "native"),
        ("cpu", torch.float64, False, False, "reference"),
        ("cuda", torch.bfloat16, True, True, "cuda"),
        ("cuda", torch.bfloat16, False, True, "triton"),
        ("cuda", torch.float32, False, False, "reference"),
        ("cuda", torch.float64, True, True, "reference"),
        ("mps", torch.float32, False, False, "reference"),
    ],
)
def test_plan(monkeypatch, device_type, dtype, cuda_kernel, triton, expected):
    monkeypatch.setattr(native, "cuda_problem", lambda device: "" if cuda_kernel else "too old")
    monkeypatch.setattr(backends, "HAS_TRITON", triton)
    out = SimpleNamespace(device=torch.device(device_type), dtype=dtype)
    assert _choose(out, None) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seed=-1), "seed is -1: expected 0 <= seed"),
        (dict(seed=2**64), "seed is 18446744073709551616"),
        (dict(seed=1.5), "seed is 1.5: expected an integer"),
        (dict(seed=torch.tensor(1.0)), "seed is a torch.float32 tensor"),
        (dict(seed=torch.tensor([1, 2])), "2 elements"),
        (dict(seed=0, step=2**32), "step is 4294967296"),
        (dict(seed=0, step=-1), "step is -1"),
        (dict(seed=0, first_sample=-1), "first_sample is -1"),
        (dict(seed=0, first_sample=2**64 - 1), "first_sample"),
        (dict(seed=0, first_sample=torch.tensor(1.0)), "first_sample is a torch.float32 tensor"),
        (dict(seed=0, first_sample=torch.tensor([1, 2])), "2 elements"),
        (dict(seed=0, first_sample=torch.tensor(1, device="meta")), "on meta: .* on cpu"),
        (dict(seed=0, dtype=torch.int32), "dtype is torch.int32"),
        (dict(seed=0, out=torch.empty(2, 9)), r"out has shape \(2, 9\): expected \(2, 8\)"),
        (dict(seed=0, out=torch.empty(2, 8, dtype=torch.int8)), "dtype is torch.int8"),
        (dict(seed=0, out=torch.empty(2, 8, requires_grad=True)), "requires grad"),
        (dict(seed=0, out=torch.empty(2, 1).expand(2, 8)), "share memory"),
        (dict(seed=0, device="gpu"), "device is 'gpu'; expected 'cpu'"),
        (dict(seed=0, backend="numpy"), "backend is 'numpy': expected one of reference, native"),
        (
            dict(seed=0, backend="cuda"),
            "the backend 'cuda' was named, but .*(without CUDA|not on cpu)",
        ),
        (
            dict(seed=0, backend="native", dtype=torch.float64),
            "the backend 'native' was named, but .* not float64",
        ),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InputError, match=message) as caught:
        normal((2, 8), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (2, -1), (2.5, 3), 7, (1, 2**34 + 1)])
def test_bad_shapes_are_named(shape):
    with pytest.raises(InputError, match="shape is"):
        normal(shape, seed=0)


# --- Triton and CUDA --------------------------------------------------------------------------


@pytest.mark.seconds
def test_triton_interpreter_agrees_with_the_cpu():
    pytest.importorskip("triton")
    assert agreements("triton_normal_check.py") == 10


@pytest.mark.seconds
@pytest.mark.sample(1)
@pytest.mark.parametrize("capability", [90, 80, 100])
def test_triton_kernels_compile_without_a_gpu(capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastdiff.kernels.normal import BLOCK, normal_kernel, philox_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, out, counter, one_run in (  # of exact normals
        (normal_kernel, "*fp32", "i64", True),
        (normal_kernel, "*bf16", "*i64", False),
        (philox_kernel, "*i32", "i64", None),
    ):
        constants = {"BLOCK": BLOCK}
        signature = dict.fromkeys(kernel.arg_names, "i64") | {"out": out}
        signature |= dict.fromkeys(("step", "seed"), counter)
        if one_run is not None:
            constants |= {"ONE_RUN": one_run, "WIDE": not one_run, "EXACT": True}
            signature["first_sample"] = counter
        signature |= {name: "constexpr" for name in constants}
        compiled = triton.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": False},
        )
        assert compiled.asm["cubin"]
        assert "fma.rn.f32" not in compiled.asm["ptx"]  # one rounding per operation, as the CPU


@pytest.mark.seconds
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_draws_in_few_instructions(dtype, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from fastdiff.kernels.normal import normal_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"out": f"*{dtype}", "seed": "i64", "first_sample": "i64"}
    flags = {"ONE_RUN": True, "WIDE": False, "EXACT": False}
    aligned = ("out", "spatial", "sample_stride")
    assert instructions_drawing(normal_kernel, types, flags, aligned, tmp_path) <= 24


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "native")]
    + [pytest.param("cuda:0", b, marks=pytest.mark.cuda) for b in ("cuda", "triton")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 3, 64, 64), (2, 3, 17, 19), (1, 4099), (70000, 2)])
def test_gpu_agrees_with_the_cpu_and_exact_normals_bit_for_bit(device, backend, dtype, shape):
    if backend == "cuda" and not native.cuda_serves(torch.device(device)):
        pytest.skip("no compiled CUDA kernel serves this device")
    options = dict(seed=2**63 + 7, step=5, first_sample=2**33)
    expected = normal(shape, dtype=dtype, **options)
    options |= {"backend": backend, "device": device}
    assert_drawn_alike(normal(shape, dtype=dtype, **options).cpu(), expected)
    drawn = normal(shape, dtype=dtype, exact=True, **options)
    assert torch.equal(drawn.cpu(), expected)
    counters = dict(seed=7 - 2**63, step=5, first_sample=2**33)
    tensors = {name: torch.tensor(value, device=device) for name, value in counters.items()}
    if len(shape) == 4:
        out = torch.full_like(drawn, float("nan"), memory_format=torch.channels_last)
        normal(shape, out=out, backend=backend, exact=True, **tensors)
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize(("said", "exact"), [("", False), ("0", False), ("1", True)])
def test_the_environment_asks_for_exact_normals(monkeypatch, said, exact):
    monkeypatch.setattr(op, "_exact", op._checked_exact(said))
    gpus = ("triton", "cuda")
    assert {backend for backend in backends.BACKENDS if drawn_apart(backend)} == set(
        gpus if exact else ()
    )


def test_another_word_in_the_environment_is_refused():
    with pytest.raises(InputError, match="FASTDIFF_EXACT_NORMALS is 'yes'; expected 0 or 1"):
        op._checked_exact("yes")
