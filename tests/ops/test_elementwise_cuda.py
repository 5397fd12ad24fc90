"""The CUDA kernels of q_sample and posterior_step: each path, in the emulation or on a GPU."""

import pytest
import torch

import fastdiff
from fastdiff import GaussianDiffusion, StepTable, ops
from fastdiff.ops import native
from fastdiff.ops.counters import TRAINING_STEP_BASE
from fastdiff.ops.normal import normal, op
from fastdiff.process.schedules import cosine_betas
from graph_tape import Tape
from harness import floors
from kernel_tools import LAYOUTS, assert_drawn_alike, poisoned_outputs
from step_cases import StepCase, check

pytestmark = pytest.mark.any_backend
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIGNAL = torch.linspace(1, 0.02, 50, device="cpu")
SIGMA = torch.linspace(0.03, 1, 50, device="cpu")
# What whole lines, whole octets, a few quads and odd numbers of elements meet in each layout; more
# channels than a block of transposed noise holds; rows with gaps, which quads may not cross.
SHAPES = [
    (3, 3, 32, 32), (2, 3, 10, 10), (1, 5, 8, 12), (2, 3, 5, 7), (5, 4), (3, 70), (2, 8, 2, 2),
    (1, 256, 4, 4), (1, 258, 2, 2), (2, 5, 7), (2, 3, 12), (33, 1, 4, 2), (2, 1, 1, 3),
]  # fmt: skip


@pytest.fixture(autouse=True)
def served():
    if not native.cuda_serves(DEVICE):
        pytest.skip(native.cuda_problem(DEVICE))
    with torch.device("cpu"):  # where `both` begins
        yield


def random(*shape, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def moved(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor | StepTable) else value


def both(call, *arguments, **options):
    """(the CPU kernel's results, the CUDA kernel's), the latter on the CPU too."""
    with fastdiff.backend("native"):
        expected = call(*arguments, **options)
    with fastdiff.backend("cuda"), poisoned_outputs():
        arguments = map(moved, arguments)
        options = {name: moved(value) for name, value in options.items()}
        actual = call(*arguments, **options)
    return expected, [None if v is None else v.cpu() for v in actual]


def assert_close(actual, expected):
    """Up to a rounding of the arithmetic, and one of the storage."""
    assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=eps, atol=4e-6)


def counted(*, seed, first_sample, step=0, **_):
    """``normal``'s counters of a call of q_sample."""
    return {"seed": seed, "step": TRAINING_STEP_BASE + step, "first_sample": first_sample}


def q_sample_noise(x_start, **given):
    counters = {name: moved(value) for name, value in counted(**given).items()}
    out = torch.empty(x_start.shape, dtype=x_start.dtype, device=DEVICE)
    return normal(tuple(out.shape), out=out, backend="cuda", **counters).cpu()


@pytest.mark.parametrize("few_blocks", [0, 1, 3], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_q_sample_agrees_with_the_cpu(shape, dtype, few_blocks):
    t = torch.arange(shape[0]) % 50
    counters = {"seed": 2**63 + 5, "step": 2**31 - 1, "first_sample": 2**40}
    from_memory = {"seed": torch.tensor(3), "first_sample": torch.tensor(-1)}
    for layout in LAYOUTS:
        x_start = LAYOUTS[layout](random(*shape, dtype=dtype))
        for given in (counters, from_memory | {"return_noise": False}, {"noise": random(*shape)}):
            expected, actual = both(ops.q_sample, x_start, t, SIGNAL, SIGMA, **given)
            if "seed" in given:  # the GPU's own noise, given to the CPU
                drawn = q_sample_noise(x_start, **given)
                assert_drawn_alike(drawn, normal(shape, dtype=dtype, **counted(**given)))
                with fastdiff.backend("native"):
                    expected = ops.q_sample(x_start, t, SIGNAL, SIGMA, noise=drawn)
            assert_close(actual[0], expected[0])
            assert given.get("return_noise") is False or torch.equal(actual[1], expected[1])


LEARNED = StepTable.from_process(GaussianDiffusion(cosine_betas(6), var_type="learned_range"))
MULTISTEP = StepTable.from_process(GaussianDiffusion(cosine_betas(6)), method="dpmsolver++")
# Every row reads the first two slots; they keep in another each, and the last in none.
KEEPING = StepTable.from_rows(
    [{"timesteps": 0.0, "a": 0.5, "b": 0.3, "c": 0.4, "d": 0.2, "e0": 0.3, "e1": 0.1, "sigma": 0.1,
      "slot": slot, "k": 0.7, "q": 0.4} for slot in (0, 1, 2, -1)]
)  # fmt: skip
FIXED = StepTable.from_process(GaussianDiffusion(cosine_betas(6), var_type="fixed_large"))


@pytest.mark.parametrize("few_blocks", [1], indirect=True)
@pytest.mark.parametrize("dtypes", [(0, 0), (0, 1), (1, 1), (2, 0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_posterior_step_agrees_with_the_cpu(shape, dtypes, few_blocks):
    dtype, output_dtype = (DTYPES[i] for i in dtypes)
    n, c, *size = shape
    noise, before = random(*shape), random(*shape, dtype=dtype)
    from_memory = {"seed": torch.tensor(-7), "first_sample": torch.tensor(-1)}
    for layout in LAYOUTS:
        x_t = LAYOUTS[layout](random(*shape, dtype=dtype))
        for rows, guided in ((LEARNED, True), (MULTISTEP, False), (FIXED, True), (FIXED, False)):
            output = random((1 + guided) * n, (1 + rows.doubled_output) * c, *size)
            output = LAYOUTS[layout](output.to(output_dtype))
            scale = torch.tensor(2.5) if guided else None
            for step, given in (
                (2, {"seed": 2**63 + 3, "first_sample": 2**40}),
                (torch.tensor(3), from_memory | {"return_x_start": False}),
                (torch.tensor([1], dtype=torch.int32), {"noise": noise}),
                (5, {"noise": noise}),
            ):
                given = given | {"prev_x_start": before, "guidance_scale": scale}
                expected, actual = both(ops.posterior_step, x_t, output, rows, step, **given)
                torch.testing.assert_close(
                    actual[0], expected[0], rtol=max(torch.finfo(dtype).eps, 1e-5), atol=2e-5
                )
                if expected[1] is not None:
                    torch.testing.assert_close(
                        actual[1], expected[1], rtol=max(torch.finfo(dtype).eps, 1e-5), atol=2e-5
                    )


@pytest.mark.parametrize("few_blocks", [1], indirect=True)
@pytest.mark.parametrize("alike", [True, False])  # one layout and dtype, or each its own
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_read_and_kept(shape, alike, few_blocks):
    for seed in range(12):
        case = StepCase.of(seed, shape, device=DEVICE)
        if alike:
            dtype, layout = DTYPES[seed % 3 : seed % 3 + 1], list(LAYOUTS)[seed % 2 : seed % 2 + 1]
            case = StepCase.of(seed, shape, dtypes=dtype, layouts=layout, device=DEVICE)
        with fastdiff.backend("cuda"), poisoned_outputs():
            check(case, moved(torch.tensor(case.i)) if seed % 2 else case.i)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_exact_normals_are_the_cpus(monkeypatch, layout):
    """As FASTDIFF_EXACT_NORMALS=1 has them, in the operations that else draw their own."""
    monkeypatch.setattr(op, "_exact", True)
    x, t = LAYOUTS[layout](random(2, 3, 16, 16)), torch.tensor([3, 40])
    expected, actual = both(ops.q_sample, x, t, SIGNAL, SIGMA, seed=1, first_sample=7)
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-6)
    for step in (1, torch.tensor(2)):
        expected, actual = both(ops.posterior_step, x, x, FIXED, step, seed=torch.tensor(3))
        torch.testing.assert_close(actual, list(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_two_runs_are_equal_bit_for_bit(layout):
    x_t = moved(LAYOUTS[layout](random(2, 3, 32, 32)))
    t, rows = moved(torch.tensor([3, 40])), moved(FIXED)
    results = []
    for order in (1, 2, 3):
        if native.emulates_cuda():
            native.library().set_emulation_order(order)
        with fastdiff.backend("cuda"):
            x_noisy, noise = ops.q_sample(x_t, t, moved(SIGNAL), moved(SIGMA), seed=1)
            results.append((x_noisy, noise, *ops.posterior_step(x_t, noise, rows, 2, seed=3)))
    for again in results[1:]:
        assert all(map(torch.equal, again, results[0]))


def test_a_timestep_or_step_out_of_range_is_nan_and_reads_nothing():
    x = moved(random(4, 3, 8, 8))
    t = moved(torch.tensor([0, 50, -1, 2**62]))
    with fastdiff.backend("cuda"):
        for layout in ("contiguous", "channels_last", "strided"):
            for given in ({"seed": 1}, {"noise": x}):
                x_t, _ = ops.q_sample(LAYOUTS[layout](x), t, moved(SIGNAL), moved(SIGMA), **given)
                assert x_t.isnan().all((1, 2, 3)).tolist() == [False, True, True, True]
            for step in (6, -1, 2**62):
                bad = moved(torch.tensor(step))
                rows, given = moved(MULTISTEP), {"seed": 1, "prev_x_start": x}
                results = ops.posterior_step(LAYOUTS[layout](x), x, rows, bad, **given)
                assert all(v.isnan().all() for v in results)
                kept = [moved(torch.zeros(4, 3, 8, 8)) for _ in range(3)]
                given = {"seed": 1, "memory": kept}
                results = ops.posterior_step(LAYOUTS[layout](x), x, moved(KEEPING), bad, **given)
                assert all(v.isnan().all() for v in results)
                assert not any(v.any() for v in kept)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_calls_in_a_row_read_their_tensors_anew(layout):
    """A plan that was kept reads counters and guidance from memory each time."""
    x, output = (LAYOUTS[layout](moved(random(n, 3, 8, 8))) for n in (2, 4))
    t, tables = moved(torch.tensor([1, 2])), (moved(SIGNAL), moved(SIGMA))
    seed, step, rows = moved(torch.tensor(4)), moved(torch.tensor(1)), moved(FIXED)
    first, scale = moved(torch.tensor(2**33)), moved(torch.tensor(1.0))
    with fastdiff.backend("cuda"):
        for _ in range(4):
            given = {"seed": seed, "first_sample": first}
            numbers = {"seed": int(seed), "first_sample": int(first)}
            actual = ops.q_sample(x, t, *tables, step=step, **given)
            expected = ops.q_sample(x, t, *tables, step=int(step), **numbers)
            assert all(map(torch.equal, actual, expected))
            actual = ops.posterior_step(x, output, rows, step, **given, guidance_scale=scale)
            numbers["guidance_scale"] = float(scale)
            expected = ops.posterior_step(x, output, rows, int(step), **numbers)
            assert all(map(torch.equal, actual, expected))
            seed += 2**40
            step += 1
            first += 2**61 + 1
            scale += 1.5


def test_samples_may_stand_far_apart():
    """Places beyond 2^31 elements, in memory that is never touched but there."""
    if not native.emulates_cuda():
        pytest.skip("on a GPU that takes the memory")
    far = torch.empty(2**31 + 2048, dtype=torch.bfloat16)
    for stride, elements in ((2**31 + 1024, 1024), (2**31 + 1, 105)):
        x = far.as_strided((2, elements), (stride, 1))
        x.copy_(random(2, elements))
        near = x.contiguous()
        for _ in range(2):
            with fastdiff.backend("cuda"):
                actual, expected = (
                    ops.q_sample(v, torch.tensor([3, 9]), SIGNAL, SIGMA, seed=1) for v in (x, near)
                )
            assert all(map(torch.equal, actual, expected))


# --- Traffic ------------------------------------------------------------------------------------


def moved_bytes(call):
    if not native.emulates_cuda():
        pytest.skip("the emulation counts bytes")
    native.library().emulated_traffic()
    with fastdiff.backend("cuda"):
        call()
    return sum(native.library().emulated_traffic())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (3, 1, 28, 28), (2, 4, 20, 20), (300, 16, 2, 2)])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_q_sample_moves_what_it_must(shape, dtype, layout):
    x = LAYOUTS[layout](random(*shape, dtype=dtype))
    t = torch.arange(len(x)) % 50
    for given, floor in (
        ({"seed": 1, "return_noise": False}, floors.q_sample(x)),
        ({"seed": 1}, floors.q_sample(x, returns_drawn=True)),
        ({"noise": x}, floors.q_sample(x, noise=x)),
        ({"noise": x.float()}, floors.q_sample(x, noise=x.float())),
    ):
        assert moved_bytes(lambda g=given: ops.q_sample(x, t, SIGNAL, SIGMA, **g)) == floor


@pytest.mark.parametrize("given_noise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_posterior_step_moves_what_it_must(layout, dtype, given_noise):
    x = LAYOUTS[layout](random(2, 3, 64, 64))
    for learned, guided in ((False, False), (False, True), (True, False), (True, True)):
        if layout == "channels_last" and learned:
            continue  # a position's three variances follow its three outputs: no 128-bit accesses
        output = random(4 if guided else 2, 6 if learned else 3, 64, 64, dtype=dtype)
        output = LAYOUTS[layout](output)
        given = {"noise": x} if given_noise else {"seed": 1}
        given["guidance_scale"] = 2.0 if guided else None
        for returned in (False, True):
            for step in (1, 5):  # the last row adds no noise: it reads neither that nor a variance

                def call(output=output, step=step, given=given, returned=returned):
                    rows = LEARNED if output.shape[1] == 6 else FIXED
                    ops.posterior_step(x, output, rows, step, **given, return_x_start=returned)

                noisy = step == 1
                noise = x if given_noise and noisy else None
                reads = {"learned": learned and noisy, "noise": noise, "returns_x_start": returned}
                assert moved_bytes(call) == floors.posterior_step(x, output, **reads)


def test_a_previous_x_start_is_read_where_the_row_uses_it():
    x = random(2, 3, 16, 16)
    for row, before in ((0, []), (2, [x])):

        def call(row=row):
            ops.posterior_step(x, x, MULTISTEP, torch.tensor(row), prev_x_start=x)

        assert moved_bytes(call) == floors.posterior_step(x, x, memory=before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_memory_moves_what_the_row_uses(dtype, layout):
    x, *memory = (LAYOUTS[layout](random(2, 3, 64, 64, dtype=dtype)) for _ in range(4))
    for row in range(4):
        kept = memory[row] if row < 3 else None
        step = torch.tensor(row)
        given = {"seed": 1, "memory": memory, "return_x_start": False}
        moves = floors.posterior_step(x, x, memory=memory[:2], kept=kept, returns_x_start=False)
        assert moved_bytes(lambda: ops.posterior_step(x, x, KEEPING, step, **given)) == moves  # noqa: B023
        given |= {"unconditional": x, "guidance_scale": 2.0}
        moves = floors.posterior_step(
            x, x, memory=memory[:2], kept=kept, unconditional=x, returns_x_start=False
        )
        assert moved_bytes(lambda: ops.posterior_step(x, x, KEEPING, step, **given)) == moves  # noqa: B023


def test_no_value_on_the_device_is_looked_at(monkeypatch):
    """That would stall the GPU and break a graph's capture. The second call has a plan."""

    def looked_at(tensor):
        raise AssertionError("a tensor's value was read on the host")

    x, t, rows = moved(random(2, 3, 4, 4)), moved(torch.tensor([1, 2])), moved(FIXED)
    seed, step, zero = moved(torch.tensor(0)), moved(torch.tensor(1)), moved(torch.tensor(0))
    tables = moved(SIGNAL), moved(SIGMA)
    with monkeypatch.context() as patch, fastdiff.backend("cuda"):
        held, keeping = [moved(random(2, 3, 4, 4)) for _ in range(3)], moved(KEEPING)
        for name in ("__bool__", "__int__", "__index__", "__float__", "item", "tolist"):
            patch.setattr(torch.Tensor, name, looked_at)
        for _ in range(2):
            counters = {"seed": seed, "step": step, "first_sample": zero}
            normal(tuple(x.shape), out=x, **counters, backend="cuda")
            ops.q_sample(x, t, *tables, seed=seed, step=zero, first_sample=step)
            ops.posterior_step(x, x, rows, step, seed=seed, first_sample=zero)
            ops.posterior_step(x, x, keeping, step, seed=seed, first_sample=zero, memory=held)


def graph_of(call):
    """What repeats ``call`` without Python: a graph, or in the emulation the stand-in for one."""
    if DEVICE.type == "cpu":
        return Tape(call, DEVICE, Tape.new_place(DEVICE)).replay
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        call()
    return graph.replay


@pytest.mark.parametrize("operation", ["q_sample", "posterior_step", "group_norm_silu"])
def test_a_captured_call_follows_its_tensors(operation):
    """The replay of a graph draws with the counters that are in memory then."""
    x, t, rows = moved(random(2, 32, 8, 8)), moved(torch.tensor([1, 2])), moved(FIXED)
    seed, step, first = (moved(torch.tensor(value)) for value in (3, 1, 0))
    tables, counters = (moved(SIGNAL), moved(SIGMA)), {"seed": seed, "first_sample": first}
    calls = {
        "q_sample": lambda: ops.q_sample(x, t, *tables, **counters)[0],
        "posterior_step": lambda: ops.posterior_step(x, x, rows, step, **counters)[0],
        "group_norm_silu": lambda: ops.group_norm_silu(x, 8, None, None),
    }
    call = calls[operation]
    with fastdiff.backend("cuda"):
        captured = torch.empty_like(call())
        replay = graph_of(lambda: captured.copy_(call()))
        for new_seed in (5, 6):
            seed.fill_(new_seed)
            first += 2**40
            x.mul_(0.5)
            replay()
            assert torch.equal(captured, call())
