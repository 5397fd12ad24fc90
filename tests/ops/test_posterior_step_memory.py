"""posterior_step with memory, another network's answers and scales, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_posterior_step import NAN, table

import fastdiff
from fastdiff.errors import InputError
from fastdiff.methods.table import StepTable
from fastdiff.ops import backends
from fastdiff.ops.counters import Counters
from fastdiff.ops.posterior_step.op import posterior_step
from kernel_tools import LAYOUTS, each_isa, examples, poisoned_outputs
from step_cases import StepCase, bits, check

DEVICE = torch.get_default_device()
SHAPES = st.one_of(
    st.tuples(st.integers(1, 3), st.integers(1, 70)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 600)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 33)),
    st.tuples(*[st.integers(1, 4)] * 5),
)
seeds = st.integers(0, 2**32)
MULTISTEP = table(6, method="dpmsolver++")
# Every row reads all slots, and each writes another one; the last leaves all as they are.
ROTATING = [
    {"timesteps": 0.0, "a": 0.5, "b": -0.3, "c": 0.4, "d": 0.2, "o": 0.1, "e0": 0.3, "e1": -0.2,
     "e2": 0.1, "sigma": 0.1, "slot": slot, "k": 0.7, "q": -0.4}
    for slot in (0, 1, 2, -1)
]  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(
        DEVICE
    )


def rotating():
    return StepTable.from_rows(ROTATING).to(DEVICE)


@pytest.mark.seconds
@pytest.mark.any_backend
@settings(deadline=None, max_examples=examples(150))
@given(seed=seeds, shape=SHAPES, by_tensor=st.booleans())
def test_every_column_is_within_float32s_rounding(seed, shape, by_tensor):
    case = StepCase.of(seed, shape, device=DEVICE)
    step = torch.tensor(case.i, device=DEVICE) if by_tensor else case.i
    with fastdiff.backend("reference"):
        check(case, step)
    for _ in each_isa():
        with poisoned_outputs():
            check(case, step)


@pytest.mark.any_backend
@settings(deadline=None, max_examples=examples(40))
@given(seed=seeds, layout=st.sampled_from(sorted(LAYOUTS)))
def test_a_loop_by_a_step_tensor_gives_what_numbers_give(seed, layout):
    """One plan serves all rows: what it writes follows the row that stands in the tensor."""
    rows = rotating()
    x = LAYOUTS[layout](random(2, 3, 5, 8, seed=seed % 1000))
    by_number, by_tensor = x, x
    held = [[torch.full_like(x, i + 1.0) for i in range(3)] for _ in range(2)]
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for i in range(len(rows)):
        by_number, _ = posterior_step(by_number, x, rows, i, seed=seed, memory=held[0])
        by_tensor, _ = posterior_step(by_tensor, x, rows, step, seed=seed, memory=held[1])
        step += 1
        assert torch.equal(by_number, by_tensor)
        assert all(map(torch.equal, *held))


@pytest.mark.any_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_multistep_memory_is_the_previous_x_start(layout):
    x = y = LAYOUTS[layout](random(2, 3, 6, 8))
    memory, before = [torch.full_like(x, NAN)], None
    for i in range(len(MULTISTEP)):
        output = torch.tanh(x)
        x, x_start = posterior_step(x, output, MULTISTEP, i, memory=memory)
        y, before = posterior_step(y, output, MULTISTEP, i, prev_x_start=before)
        assert torch.equal(x, y) and torch.equal(x_start, before)
        assert torch.equal(memory[0], x_start)


@pytest.mark.any_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_a_step_out_of_range_writes_no_memory(layout):
    x = LAYOUTS[layout](random(2, 3, 8, 8))
    memory = [torch.full_like(x, i + 1.0) for i in range(3)]
    on_gpu = x.is_cuda or backends.named() in ("cuda", "triton")
    for bad in (4, -1, 2**62):
        step = torch.tensor(bad, device=DEVICE)
        if on_gpu:
            results = posterior_step(x, x, rotating(), step, seed=1, memory=memory)
            assert all(v.isnan().all() for v in results)
        else:
            with pytest.raises(InputError, match=f"step is {bad}"):
                posterior_step(x, x, rotating(), step, seed=1, memory=memory)
    for i, kept in enumerate(memory):
        assert (kept == i + 1).all()


@pytest.mark.any_backend
def test_memory_that_no_kernel_reads_as_it_stands_is_written():
    """Five dimensions in an order that is not (samples, channels, spatial): copies are taken."""
    x = random(2, 3, 4, 5, 6)
    memory = [random(6, 5, 4, 3, 2, seed=i).permute(4, 3, 1, 0, 2) for i in range(3)]
    memory = [v.reshape(2, 3, 5, 6, 4).transpose(3, 4).transpose(2, 3) for v in memory]
    assert all(v.shape == x.shape and not v.is_contiguous() for v in memory)
    plain = [v.contiguous() for v in memory]
    for i in range(4):
        given = [posterior_step(x, x, rotating(), i, seed=1, memory=m) for m in (memory, plain)]
        assert torch.equal(given[0][0], given[1][0]) and all(map(torch.equal, memory, plain))


@pytest.mark.any_backend
def test_empty_images_leave_memory_as_it_was():
    x = torch.empty(0, 3, 4, 4)
    memory = [torch.empty_like(x) for _ in range(3)]
    x_prev, x_start = posterior_step(x, x, rotating(), torch.tensor(1), seed=0, memory=memory)
    assert x_prev.shape == x_start.shape == x.shape


# --- Guidance -------------------------------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 6])
def test_another_networks_answers_guide_like_a_second_half(layout, channels):
    rows = table(6, var_type="learned_range")
    x, z = random(2, 3, 6, 8, seed=1), random(2, 3, 6, 8, seed=2)
    output, other = random(2, 6, 6, 8, seed=3), random(2, channels, 6, 8, seed=4)
    both = torch.cat([output, torch.cat([other[:, :3], output[:, 3:]], 1)])
    for scale in (0.0, 2.5, torch.tensor(1.5, device=DEVICE)):
        given = {"noise": z, "guidance_scale": scale}
        halves = posterior_step(x, both, rows, 1, **given)
        apart = posterior_step(x, output, rows, 1, unconditional=LAYOUTS[layout](other), **given)
        assert all(map(torch.equal, halves, apart))


@pytest.mark.any_backend
def test_a_rescaled_output_has_the_conditional_ones_deviation():
    """Lin et al. 2023, eq. 15-16 with φ = 1; by a network that predicts x_0 and is not clipped."""
    rows = table(6, mean_type="x_start", clip_denoised=False)
    x, output = random(3, 3, 8, 8, seed=1), random(6, 3, 8, 8, seed=2)
    deviation = output[:3].flatten(1).std(1)
    guided = output[3:] + 4 * (output[:3] - output[3:])
    given = {"seed": 1, "guidance_scale": 4.0}
    scale = deviation / guided.flatten(1).std(1)
    _, x_start = posterior_step(x, output, rows, 2, output_scale=scale, **given)
    torch.testing.assert_close(x_start.flatten(1).std(1), deviation)
    plain = posterior_step(x, output, rows, 2, **given)
    ones = posterior_step(x, output, rows, 2, output_scale=torch.ones(3), **given)
    assert all(map(torch.equal, plain, ones))


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.seconds
def test_it_compiles_as_one_graph():
    """What is kept is seen by the graph, and by whoever reads memory after it."""

    def two_steps(x, memory, step):
        x, _ = posterior_step(x, x, rows, step, seed=1, memory=memory)
        return posterior_step(x, x, rows, step + 1, seed=1, memory=memory)[0] + memory[0]

    rows, x = rotating(), random(2, 3, 4, 4)
    torch.compiler.reset()
    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    outcomes = []
    for run in (compiled, two_steps):
        memory = [torch.full_like(x, i + 1.0) for i in range(3)]
        outcomes.append((run(x, memory, torch.tensor(0)), *memory))
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


def test_the_operator_passes_opcheck():
    x = random(2, 3, 4, 4)
    memory = [torch.full_like(x, i + 1.0) for i in range(3)]
    tensors = (x, x, rotating().packed, None, None, *memory, x, None, torch.ones(2))
    arguments = (*tensors, 2.0, False, False, True, "native")
    counters = Counters(torch.tensor(1), 4, 0).flat()
    torch.library.opcheck(torch.ops.fastdiff.posterior_step.default, (*arguments, *counters))


def test_autograd_knows_what_was_written():
    x = random(2, 3, 4, 4)
    memory = [torch.ones_like(x) for _ in range(3)]
    weight = torch.ones(1, requires_grad=True)
    product = weight * memory[1]
    posterior_step(x, x, rotating(), 1, seed=0, memory=memory)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        held = [torch.ones(2, 3, 4, 4) for _ in range(3)]
        posterior_step(x, x, rotating(), 1, seed=0, memory=held)
    assert torch.equal(bits(held[1]), bits(memory[1]))


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"memory": None}, "reads or keeps what other steps use; give memory=, 3 tensors like x_t"),
        ({"memory": [X, X]}, "memory has 2 tensors; expected the table's 3"),
        ({"memory": None, "prev_x_start": X}, "prev_x_start is given, but .* give memory=, 3 tens"),
        ({"prev_x_start": X}, "memory and prev_x_start are both given; expected one of them"),
        ({"memory": [X, X, X[:1]]}, r"memory\[2\] is \(1, 3, 4, 4\) float32 on cpu; expected"),
        ({"memory": [X, X.double(), X]}, r"memory\[1\] is .*float64.*; expected float32, bfloat16"),
        ({"memory": [X, X.to("meta"), X]}, r"memory\[1\] is .* on meta; expected"),
        ({"memory": [X[:1].expand(2, 3, 4, 4), X, X]}, r"memory\[0\] is expanded; expected a tens"),
        ({"unconditional": X}, "unconditional is given; give guidance_scale= too"),
        ({"unconditional": X[:1], "guidance_scale": 1.0}, r"unconditional is \(1, 3, 4, 4\)"),
        (
            {"unconditional": X, "guidance_scale": 1.0, "model_output": torch.zeros(4, 3, 4, 4)},
            r"model_output is \(4, 3, 4, 4\) .*; expected \(2, 3, 4, 4\) for x_t",
        ),
        ({"output_scale": torch.ones(3)}, r"output_scale is \(3,\) .*; expected .* \(2,\) on cpu"),
        ({"output_scale": 1.0}, "output_scale is a float; expected"),
    ],
)
def test_bad_arguments(changes, message):
    rows = StepTable.from_rows(ROTATING)
    arguments = {"x_t": X, "model_output": X, "table": rows, "step": 1, "noise": X}
    arguments |= {"memory": [X, X, X]} | changes
    positional = [arguments.pop(name) for name in ("x_t", "model_output", "table", "step")]
    for backend in ("native", "reference"):
        with fastdiff.backend(backend), pytest.raises(InputError, match=message) as refused:
            posterior_step(*positional, **arguments)
        assert "\n" not in str(refused.value)
