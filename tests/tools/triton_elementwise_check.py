"""Run by the kernels' tests in a process of its own: Triton's interpreter is chosen at import."""

import contextlib
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff import ops  # noqa: E402
from fastdiff.kernels.posterior_step import exp  # noqa: E402
from fastdiff.methods.table import StepTable  # noqa: E402
from fastdiff.ops.normal import op as normal_op  # noqa: E402
from fastdiff.ops.normal.op import FAST_ERROR  # noqa: E402
from fastdiff.process.gaussian import GaussianDiffusion  # noqa: E402
from fastdiff.process.schedules import cosine_betas  # noqa: E402
from kernel_tools import LAYOUTS, poisoned_outputs  # noqa: E402
from step_cases import StepCase, check  # noqa: E402

# The interpreter truncates to bfloat16 where the GPU rounds: one ulp, 2^-7 of the value.
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-7},
}
DTYPES = list(TOLERANCES)
torch.manual_seed(0)


def both(call):
    """(native's results, Triton's)."""
    with poisoned_outputs():
        expected = call()
        with fastdiff.backend("triton"):
            return expected, call()


def assert_noise(actual, expected):
    """Given, or drawn within the bound of fast normals and a rounding of the dtype."""
    tolerances = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerances["rtol"], atol=FAST_ERROR)


@contextlib.contextmanager
def exact_normals():
    """FASTDIFF_EXACT_NORMALS=1 for the length of a block."""
    normal_op._exact = True
    yield
    normal_op._exact = False


def check_q_sample():
    signal, sigma = torch.rand(2, 10)
    seed, first = torch.tensor(-5), torch.tensor(-1)  # numbers 2^64 − 1, and then 0
    for dtype in DTYPES[:2]:
        for shape, layout in (
            ((2, 3, 5, 7), "contiguous"),
            ((2, 3, 5, 7), "channels_last"),
            ((3, 1025), "misaligned"),
            ((2, 3, 4, 5), "transposed"),
        ):
            x_start, t = LAYOUTS[layout](torch.randn(shape).to(dtype)), torch.arange(shape[0])
            given = [
                {"seed": 2**63 + 5, "step": 2**31 - 1, "first_sample": 2**63 + 1},
                {"seed": seed, "step": torch.tensor(9), "first_sample": first},
                {"noise": torch.randn(shape)},
                {"seed": 1, "return_noise": False},
            ]
            for arguments in given:
                (x_t, noise), (triton_x_t, triton_noise) = both(
                    lambda a=arguments: ops.q_sample(x_start, t, signal, sigma, **a)  # noqa: B023
                )
                if noise is not None:
                    assert_noise(triton_noise, noise)
                torch.testing.assert_close(triton_x_t, x_t, **TOLERANCES[dtype])
                if arguments is given[0] or arguments is given[2]:
                    print("agrees")
    x_start = torch.randn(2, 3, 5, 7)
    with exact_normals():
        (_, noise), (_, triton_noise) = both(
            lambda: ops.q_sample(x_start, t[:2], signal, sigma, seed=seed, first_sample=first)
        )
    assert torch.equal(triton_noise, noise)
    print("agrees")
    x_start = torch.randn(2, 5).bfloat16()
    expected, actual = both(lambda: ops.q_sample(x_start, t[:2], signal, sigma, seed=1))
    torch.testing.assert_close(actual, expected, **TOLERANCES[torch.bfloat16])
    x = torch.randn(2, 5, requires_grad=True)
    with fastdiff.backend("triton"):
        ops.q_sample(x, t[:2], signal, sigma, seed=1)[0].sum().backward()
    torch.testing.assert_close(x.grad, signal[:2, None].expand(2, 5))
    # A t out of range, which the operation does not let by.
    from fastdiff.kernels.q_sample import launch_for

    x_t, layout = torch.empty(2, 5), (0, 5, 0, 1)
    tensors = (torch.randn(2, 5), None, torch.tensor([10, 3]), signal, sigma, x_t, None)
    launch = launch_for((2, 1, 5), 10, layout, layout, layout, draws=False)
    launch(*tensors, 0, None, 0)
    assert x_t.isnan().all(1).tolist() == [True, False]


def check_posterior_step():
    seed, first = torch.tensor(-3), torch.tensor(-1)  # numbers 2^64 − 1, and then 0
    for var_type, method, guidance in (
        ("fixed_large", "ddpm", None),
        ("learned", "ddpm", 2.5),
        ("learned_range", "ddpm", torch.tensor(1.5)),
        ("learned_range", "dpmsolver++", None),
    ):
        process = GaussianDiffusion(cosine_betas(6), var_type=var_type)
        table = StepTable.from_process(process, method=method)
        channels = 6 if table.doubled_output else 3
        count = 2 if guidance is None else 4
        for dtype, output_dtype in zip(DTYPES, reversed(DTYPES), strict=True):
            for layouts in (("contiguous", "channels_last"), ("channels_last", "channels_last")):
                x_t = LAYOUTS[layouts[0]](torch.randn(2, 3, 5, 7).to(dtype))
                output = torch.randn(count, channels, 5, 7).to(output_dtype)
                output = LAYOUTS[layouts[1]](output)
                noise, before = torch.randn(2, 2, 3, 5, 7)
                for step, given in (
                    (0, {"seed": 2**63 + 3, "first_sample": 2}),
                    (3, {"noise": noise, "return_x_start": False}),
                    (torch.tensor(2), {"seed": seed, "first_sample": first}),
                    (torch.tensor([5], dtype=torch.int32), {"noise": noise}),
                ):
                    given = given | {"prev_x_start": before, "guidance_scale": guidance}
                    expected, actual = both(
                        lambda s=step, g=given: ops.posterior_step(x_t, output, table, s, **g)  # noqa: B023
                    )
                    torch.testing.assert_close(actual[0], expected[0], **TOLERANCES[dtype])
                    assert (actual[1] is None) == ("return_x_start" in given)
                    if actual[1] is not None:
                        torch.testing.assert_close(actual[1], expected[1], **TOLERANCES[dtype])
        print("agrees")
    x, rows = torch.randn(2, 3, 5, 7), StepTable.from_process(GaussianDiffusion(cosine_betas(6)))
    with exact_normals():  # the CPU's noise, to which float32's arithmetic is all that is added
        for step in (1, torch.tensor(2)):
            expected, actual = both(lambda s=step: ops.posterior_step(x, x, rows, s, seed=seed))
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    # A zero coefficient contributes nothing, NaN passes the clip, a step out of range is NaN.
    nans = torch.full_like(x_t, float("nan"))
    output = output.float()
    with fastdiff.backend("triton"):
        first = ops.posterior_step(x_t, output, table, torch.tensor(0), prev_x_start=nans)
        assert first[0].isfinite().all()
        output[0, 0, 0, 0] = float("nan")
        x_prev, _ = ops.posterior_step(x_t, output, table, 2, prev_x_start=before)
        assert x_prev.isnan().sum() == 1
        far = ops.posterior_step(x_t, output, table, torch.tensor(6), prev_x_start=before)
        assert far[0].isnan().all()
    print("agrees")
    check_random_rows()
    check_exp()


def check_random_rows():
    """Every column, slot and operand; a step out of range writes no memory."""
    shapes = ((2, 3, 5, 7), (1, 2, 40, 33), (3, 70), (2, 3, 2, 3, 4))
    with fastdiff.backend("triton"):
        for seed in range(80):
            case = StepCase.of(seed, shapes[seed % len(shapes)])
            with poisoned_outputs():
                check(case, torch.tensor(case.i) if seed % 3 else case.i, ulp=2.0)
        far = torch.tensor(3)
        for case in (StepCase.of(seed, (2, 3, 5, 7)).fresh() for seed in range(5)):
            before = case.fresh().memory
            assert all(v.isnan().all() for v in case.run(far))
            for now, was in zip(case.memory, before, strict=True):
                torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
    print("agrees")


@triton.jit
def exp_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, exp(tl.load(x + i)))


def check_exp():
    """posterior_step's exponential beside torch's, over all of float32."""
    every = torch.arange(-(2**31), 2**31, 2**13).to(torch.int32).view(torch.float32)
    ends = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-45, -1e-45])
    x = torch.cat([every, ends, torch.linspace(88, 89, 30000), torch.linspace(-105, -86, 30000)])
    x = torch.cat([x, x.new_zeros(-len(x) % 65536)])
    y = torch.empty_like(x)
    exp_kernel[(len(x) // 65536,)](x, y, BLOCK=65536)
    torch.testing.assert_close(y, x.exp(), rtol=2**-21, atol=2**-126, equal_nan=True)
    print("agrees")


{"q_sample": check_q_sample, "posterior_step": check_posterior_step}[sys.argv[1]]()
