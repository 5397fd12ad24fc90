"""posterior_step's kernels: values on every instruction set, layouts, calls in a row, torch."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_posterior_step import direct, table

import fastdiff
from fastdiff.errors import InputError
from fastdiff.methods.table import COLUMNS
from fastdiff.ops import backends
from fastdiff.ops.counters import Counters, sampling_step
from fastdiff.ops.posterior_step.op import posterior_step
from kernel_tools import (
    DEVICES,
    LAYOUTS,
    agreements,
    compile_for,
    each_isa,
    examples,
    instructions_drawing,
    noise_of,
    poisoned_outputs,
    spilled,
)
from paths import ROOT

DEVICE = torch.get_default_device()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOT_NAMES = ("memory0", "memory1", "memory2")  # Triton's arguments
TABLES = {
    "ddpm": table(6, var_type="fixed_large"),
    "learned": table(6, var_type="learned"),
    "learned_range": table(6, var_type="learned_range", clip_denoised=False),
    "ddim": table(6, method="ddim", eta=0.7),
    "quiet": table(6, method="ddim"),
    "dpmsolver++": table(6, method="dpmsolver++"),
    "sde-dpmsolver++": table(6, method="sde-dpmsolver++"),  # noise and the x_0 before, both
    "previous_x": table(6, mean_type="previous_x"),
    "v": table(6, mean_type="v"),
}


def inputs(shape, rows, dtype, output_dtype=None, layout="contiguous", guided=False):
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    options = {"generator": generator, "device": "cpu"}
    x_t, noise, before = torch.randn(3, *shape, **options).to(DEVICE, dtype)
    doubled = 2 if rows.doubled_output else 1
    batch = shape[0] * (2 if guided else 1)
    output = torch.randn(batch, shape[1] * doubled, *shape[2:], **options)
    output = output.to(DEVICE, output_dtype or dtype)
    return [LAYOUTS[layout](value) for value in (x_t, output, noise, before)]


def exact(rows, i, x_t, output, noise, before, scale=None):
    """(x_prev, x_0) in float64, and the size of what cancels in x_0."""
    x_t, output, noise, before = (v.double().cpu().numpy() for v in (x_t, output, noise, before))
    channels, batch = x_t.shape[1], x_t.shape[0]
    v = output[:batch, channels:] if rows.learned_variance else None
    output = output[:, :channels]
    if scale is not None:
        output = output[batch:] + float(scale) * (output[:batch] - output[batch:])
    cancels = np.abs(float(rows.a[i]) * x_t) + np.abs(float(rows.b[i]) * output)
    return *direct(rows, i, x_t, output, v=v, z=noise, before=before), cancels


@pytest.mark.seconds
@pytest.mark.any_backend
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(1, 70)),
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 600)),
        st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 33)),
        st.tuples(*[st.integers(1, 4)] * 5),
    ),
    name=st.sampled_from(sorted(TABLES)),
    dtype=st.sampled_from(DTYPES),
    output_dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    i=st.integers(0, 5),
    scale=st.sampled_from([None, 0.0, 3.0, torch.tensor(1.5)]),
)
@settings(deadline=None, max_examples=examples(200))
def test_error_is_at_most_twice_that_of_the_reference(
    shape, name, dtype, output_dtype, layout, i, scale
):
    rows = TABLES[name]
    x_t, output, noise, before = inputs(
        shape, rows, dtype, output_dtype, layout, guided=scale is not None
    )
    options = {"noise": noise, "prev_x_start": before, "guidance_scale": scale}
    *wanted, cancels = exact(rows, i, x_t, output, noise, before, scale)
    # Where a few elements escape the clip, the largest error of either is luck.
    luck = torch.finfo(torch.float32).eps * cancels
    with fastdiff.backend("reference"):
        reference = posterior_step(x_t, output, rows, i, **options)
    for isa in each_isa():
        with poisoned_outputs():
            actual = posterior_step(x_t, output, rows, i, **options)
        for mine, theirs, value in zip(actual, reference, wanted, strict=True):
            assert mine.dtype == dtype and mine.stride() == torch.empty_like(x_t).stride()
            if not value.size:
                continue
            error = np.abs(mine.double().cpu().numpy() - value)
            allowed = 2 * np.abs(theirs.double().cpu().numpy() - value).max()
            ulp = torch.finfo(dtype).eps * (np.abs(value) + 1)
            assert (error <= allowed + ulp + luck).all(), isa


@pytest.mark.any_backend
@pytest.mark.parametrize("name", ["ddpm", "learned_range", "dpmsolver++"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 3, 65, 64), (1, 150, 16, 16), (2, 5, 3, 3)])
def test_nothing_depends_on_threads_layouts_or_on_what_is_returned(name, layout, shape):
    rows = TABLES[name]
    x_t, output, _, before = inputs(shape, rows, torch.float32, torch.bfloat16, layout)
    options = {"seed": 2**64 - 1, "first_sample": 3, "prev_x_start": before}
    plain = [v.contiguous() for v in (x_t, output)]
    counters = dict(seed=2**64 - 1, step=sampling_step(2), first_sample=3)
    noise = noise_of(shape, device=DEVICE, **counters)
    given = {"noise": noise, "prev_x_start": before}
    expected = posterior_step(*plain, rows, 2, **given)
    before_threads = torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            for mixed in ((x_t, output), (plain[0], output), (x_t, plain[1])):
                with poisoned_outputs():
                    actual = posterior_step(*mixed, rows, 2, **options)
                    alone = posterior_step(*mixed, rows, 2, **options, return_x_start=False)
                assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
                assert torch.equal(alone[0], expected[0]) and alone[1] is None
    finally:
        torch.set_num_threads(before_threads)


@pytest.mark.any_backend
@pytest.mark.parametrize("reference", [False, True])
def test_tensors_in_place_of_numbers(reference):
    """step, counters and guidance_scale, each read where the step is computed."""
    rows = TABLES["learned_range"]
    numbers = {"seed": 2**64 - 7, "first_sample": 2**63 + 2**33, "guidance_scale": 2.5}
    x_t, output, _, _ = inputs((2, 3, 5, 4), rows, torch.float32, guided=True)
    with fastdiff.backend("reference" if reference else backends.named()):
        for i in range(6):
            expected = posterior_step(x_t, output, rows, i, **numbers)
            for dtype in (torch.int32, torch.int64):
                scale = torch.tensor([2.5], dtype=torch.float32 if i % 2 else torch.float64)
                actual = posterior_step(
                    x_t,
                    output,
                    rows,
                    torch.tensor(i, dtype=dtype),
                    seed=torch.tensor([-7]),
                    first_sample=torch.tensor(2**33 - 2**63),
                    guidance_scale=scale,
                )
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.any_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_samples_number_may_be_a_tensor(layout):
    """The same bits as from an int; numbers wrap around at 2^64."""
    rows = TABLES["ddpm"]
    x_t, output, _, _ = inputs((3, 4, 6, 8), rows, torch.float32, layout=layout)
    for first in (0, 2**32 + 1, 2**63 + 7, 2**64 - 1):
        bits = torch.tensor(first - 2**64 if first >= 2**63 else first)
        actual = posterior_step(x_t, output, rows, 2, seed=1, first_sample=bits)[0]
        for i in range(3):
            number, one = (first + i) % 2**64, slice(i, i + 1)
            alone = posterior_step(x_t[one], output[one], rows, 2, seed=1, first_sample=number)[0]
            assert torch.equal(actual[one], alone)


@pytest.mark.any_backend
def test_a_step_tensor_may_count():
    """A plan that was kept reads the tensor's value anew."""
    rows = TABLES["ddpm"]
    x_t, output, _, _ = inputs((2, 3, 5, 4), rows, torch.float32)
    step = torch.zeros((), dtype=torch.int64)
    for i in range(6):
        expected = posterior_step(x_t, output, rows, i, seed=5)[0]
        assert torch.equal(posterior_step(x_t, output, rows, step, seed=5)[0], expected)
        step += 1
    for bad in (6, -1):
        step.fill_(bad)
        if x_t.is_cuda or backends.named() in ("cuda", "triton"):  # no error can come from a GPU
            assert all(v.isnan().all() for v in posterior_step(x_t, output, rows, step, seed=5))
            continue
        with pytest.raises(InputError, match=f"step is {bad}; the table has rows 0 … 5"):
            posterior_step(x_t, output, rows, step, seed=5)


@pytest.mark.any_backend
def test_a_call_like_the_last_one_is_checked_again_where_it_may_differ():
    rows = TABLES["dpmsolver++"]
    x_t, output, _, before = inputs((2, 3, 5, 4), rows, torch.float32, guided=True)
    plain = {"guidance_scale": 2.0, "prev_x_start": before}
    for _ in range(2):
        posterior_step(x_t, output, rows, 2, **plain)
        posterior_step(x_t, output, rows, torch.tensor(2), **plain)
        posterior_step(x_t, output[:2], TABLES["ddpm"], 2, seed=1)
        posterior_step(x_t, output[:2], TABLES["ddpm"], 2, seed=torch.tensor(1))
        posterior_step(x_t, output[:2], TABLES["ddpm"], 2, seed=1, first_sample=torch.tensor(1))
        posterior_step(x_t, output[:2], TABLES["quiet"], 2)
    for arguments, options, message in (
        ((x_t, output, rows, 2), plain | {"guidance_scale": float("nan")}, "a finite number"),
        ((x_t, output, rows, 2), plain | {"prev_x_start": None}, "second-order multistep"),
        ((x_t, output, rows, 6), plain, "step is 6"),
        ((x_t, output[:2], rows, 2), plain, r"is \(2, 3, 5, 4\) .*; expected \(4, 3, 5, 4\)"),
        ((x_t, output[:2], TABLES["learned"], 2), {"seed": 1}, "2C channels"),
        ((x_t, output[:2], TABLES["ddpm"], 2), {}, "draws noise; give noise="),
        ((x_t, output[:2], TABLES["ddpm"], 2), {"seed": -1}, "seed is -1"),
        ((x_t, output[:2], TABLES["ddpm"], 2), {"seed": torch.tensor(1.0)}, "seed is a torch.fl"),
        ((x_t, output[:2], TABLES["ddpm"], 2), {"seed": 1, "first_sample": -1}, "first_sample"),
        *(
            ((x_t, output[:2], TABLES["ddpm"], 2), {"seed": 1, "first_sample": bad}, message)
            for bad, message in (
                (torch.tensor(1).int(), "first_sample is a torch.int32 tensor"),
                (torch.tensor([1, 2]), "first_sample is a .* of 2 elements"),
                (torch.tensor(1, device="meta"), "first_sample is a .* on meta"),
            )
        ),
    ):
        with pytest.raises(InputError, match=message):
            posterior_step(*arguments, **options)


@pytest.mark.any_backend
def test_values_that_are_not_finite_reach_the_result():
    rows = TABLES["learned"]
    x_t, output, noise, _ = inputs((2, 3, 8, 8), rows, torch.float32)
    output[0, 0, 0, 0] = float("nan")
    output[1, 3, 0, 0] = float("nan")  # of the variance
    output[1, 4, 0, 0] = 1e4  # exp overflows
    for isa in each_isa():
        x_prev, x_start = posterior_step(x_t, output, rows, 1, noise=noise)
        assert x_prev.isnan().nonzero().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]], isa
        assert x_prev.isinf().nonzero().tolist() == [[1, 1, 0, 0]], isa
        assert x_start.isnan().sum() == 1


@pytest.mark.any_backend
def test_a_learned_deviation_is_the_exponential_over_all_of_float32():
    """Where x_t and the output are 0, exp(v/2) of the noise is left: with noise 1, itself."""
    rows, inf = TABLES["learned"], float("inf")
    x = torch.tensor([inf, -inf, float("nan"), 1e30, -1e30, 1.7e38, -1.7e38, 0, 1e-45, -1e-38])
    x = torch.cat([x, torch.linspace(-120, 95, 4000), torch.linspace(87.9, 88.8, 4000)])
    f = x + 0.5  # (v + 1)/2, of which a small v's last bits are lost
    expected = (0.5 * (f - (1 - f))).double().exp().float()
    quiet = torch.zeros(1, 1, len(x))
    output = torch.stack([torch.zeros_like(x), 2 * x])[None]
    for isa in each_isa():
        x_prev, _ = posterior_step(quiet, output, rows, 1, noise=quiet + 1)
        torch.testing.assert_close(
            x_prev.flatten(), expected, rtol=2e-6, atol=2**-126, equal_nan=True, msg=isa
        )


# --- torch --------------------------------------------------------------------------------------


def test_gradients_choose_the_reference():
    rows = TABLES["ddpm"]
    x_t, output, noise, _ = inputs((2, 3, 4), rows, torch.float32)
    x_t.requires_grad_()
    choice = fastdiff.explain("posterior_step", x_t, output, rows, 1, noise=noise)
    assert choice.backend == "reference" and "only 'reference' has gradients" in choice.reason
    assert posterior_step(x_t, output, rows, 1, noise=noise)[0].requires_grad
    with fastdiff.backend("native"):
        with pytest.raises(InputError, match="has gradients .*use torch.no_grad()"):
            posterior_step(x_t, output, rows, 1, noise=noise)
        with torch.no_grad():
            assert not posterior_step(x_t, output, rows, 1, noise=noise)[0].requires_grad
            choice = fastdiff.explain("posterior_step", x_t, output, rows, 1, noise=noise)
    assert choice.backend == "native"
    detached = x_t.detach()
    tangent = torch.func.jvp(
        lambda x: posterior_step(x, output, rows, 1, noise=noise)[0],
        (detached,),
        (torch.ones_like(detached),),
    )[1]
    assert (tangent != 0).all()


@pytest.mark.sample(2)
@pytest.mark.seconds
@pytest.mark.any_backend
@pytest.mark.parametrize("name", ["learned_range", "dpmsolver++"])
@pytest.mark.parametrize("step", [2, torch.tensor(2)])
def test_it_compiles_as_one_graph(name, step):
    rows = TABLES[name]
    x_t, output, _, before = inputs((2, 3, 4, 4), rows, torch.float32, guided=True)
    torch.compiler.reset()
    options = {"prev_x_start": before, "guidance_scale": 1.5, "seed": 1}
    if isinstance(step, torch.Tensor):
        options["first_sample"] = torch.tensor(2**40)
    results = []
    for call in (
        torch.compile(posterior_step, fullgraph=True, backend="aot_eager"),
        posterior_step,
    ):
        both = call(x_t, output, rows, step, **options)
        alone = call(x_t, output, rows, step, **options, return_x_start=False)
        results.append((*both, *alone))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("returns_x_start", [True, False])
@pytest.mark.parametrize("draws", [True, False])
def test_the_operator_passes_opcheck(returns_x_start, draws):
    rows = TABLES["learned_range"]
    x_t, output, _, before = inputs((2, 3, 4, 4), rows, torch.float32, layout="channels_last")
    step = torch.tensor(1)
    counters = Counters(step, 4, torch.tensor(2**40)) if draws else Counters(step)
    tensors = (x_t, output, rows.packed, None, before, *[None] * 6)
    arguments = (*tensors, None, True, True, returns_x_start, "native", *counters.flat())
    torch.library.opcheck(torch.ops.fastdiff.posterior_step.default, arguments)


def test_the_kernels_read_the_columns_where_the_table_writes_them():
    """Triton's places are made of COLUMNS; C++ names its own in the struct that reads a row."""
    header = (ROOT / "csrc" / "common" / "step.h").read_text()
    (fields,) = re.findall(r"struct StepRow \{\s*float ([^;]*);", header)
    names = tuple(re.split(r",\s*", fields))
    assert names == COLUMNS[: len(names)] and "clip" in names
    assert f"constexpr int kStepColumns = {len(COLUMNS)};" in header
    (places,) = re.findall(r"return \{(r\[0\][^}]*)\};", header)
    assert re.findall(r"r\[(\d+)\]", places) == [str(i) for i in range(len(names))]


def test_the_plan():
    x_t, output, noise, _ = inputs((2, 3), TABLES["ddpm"], torch.float32)
    for device, backend, reason in (
        ("cpu", "native", "C\\+\\+ kernel"),
        ("meta", "reference", "no kernels for meta"),
    ):
        choice = fastdiff.explain(
            "posterior_step", x_t.to(device), output.to(device), TABLES["ddpm"], 1
        )
        assert choice.backend == backend and re.search(reason, choice.reason)


# --- Triton -------------------------------------------------------------------------------------


@pytest.mark.seconds
def test_triton_interpreter_agrees_with_the_cpu():
    pytest.importorskip("triton")
    assert agreements("triton_elementwise_check.py", "posterior_step") == 7


@pytest.mark.seconds
@pytest.mark.sample(1)
@pytest.mark.parametrize("capability", [90, 80, 100])
def test_triton_compiles_without_a_gpu_and_without_spills(capability, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from fastdiff.kernels import posterior_step as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    numbers = {"step": "i32", "seed": "i64", "first_sample": "i64", "guidance": "fp32"}
    states = ("x_t", "x_prev", "x_start", "packed", "guidance_address", "output_scale", *SLOT_NAMES)
    pointers = dict.fromkeys(states, "*fp32") | {"unconditional": None}
    pointers |= dict.fromkeys(("step", "seed", "first_sample"), "*i64")
    for output, extra, one_run in (
        ("*bf16", {"noise": None}, True),
        ("*fp32", {"noise": None}, False),
        ("*fp32", {"noise": "*fp32", "step": "i32"} | dict.fromkeys(SLOT_NAMES), True),
        ("*bf16", {"noise": None} | numbers, True),
        (
            "*bf16",
            {"noise": None, "unconditional": "*bf16"} | dict.fromkeys(SLOT_NAMES, "*bf16"),
            False,
        ),
    ):
        flags = dict.fromkeys(("LEARNED", "GUIDED"), extra["noise"] is None)
        flags |= {
            "DRAWS": extra["noise"] is None,
            "KEEPS": (keeps := extra.get("memory0", "*fp32") is not None),
            "ONE_RUN": one_run,
            "WIDE": False,
            "PLACE": kernels.PLACE,
        }
        types = pointers | {"guidance": "fp32", "output": output} | extra
        warps = {"num_warps": kernels.WARPS_KEEPING if keeps else kernels.WARPS}
        compiled = compile_for(capability, kernels.posterior_step_kernel, types, flags, **warps)
        assert not spilled(compiled, tmp_path)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("dtype", "x_start", "most"),
    [("fp32", None, 37), ("fp32", "*fp32", 38), ("bf16", None, 39), ("bf16", "*bf16", 40)],
)
def test_triton_draws_in_few_instructions(dtype, x_start, most, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from fastdiff.kernels.posterior_step import PLACE, posterior_step_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("x_t", "output", "x_prev"), f"*{dtype}") | {"x_start": x_start}
    types |= {"packed": "*fp32", "seed": "i64", "first_sample": "i64", "guidance": "fp32"}
    absent = ("guidance_address", "noise", "unconditional", "output_scale", *SLOT_NAMES)
    types |= dict.fromkeys(absent)
    flags = dict.fromkeys(("LEARNED", "GUIDED", "KEEPS", "WIDE"), False)
    flags |= {"DRAWS": True, "ONE_RUN": True, "PLACE": PLACE}
    strides = (f"{name}_sample" for name in ("x", "output", "prev", "start"))
    aligned = ("x_t", "output", "x_prev", "x_start", "spatial", *strides)
    assert instructions_drawing(posterior_step_kernel, types, flags, aligned, tmp_path) <= most


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gpu_agrees_with_the_cpu(name, layout, device):
    rows = TABLES[name]
    x_t, output, _, before = inputs((3, 3, 33, 32), rows, torch.float32, torch.bfloat16, layout)
    on_gpu = [v.to(device) for v in (x_t, output)]
    for i in range(6):
        given = {"seed": 3, "first_sample": 2**33, "prev_x_start": before}
        expected = posterior_step(x_t, output, rows, i, **given)
        actual = posterior_step(
            *on_gpu,
            rows.to(device),
            torch.tensor(i, device=device),
            seed=torch.tensor(3, device=device),
            first_sample=torch.tensor(2**33, device=device),
            prev_x_start=before.to(device),
        )
        for mine, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=2e-5)
