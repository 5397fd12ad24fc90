"""A call like one before is neither checked nor planned again, and no other call passes for it."""

import pytest
import torch

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.methods.table import StepTable
from fastdiff.ops.differentiable import Kernel
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.schedules import cosine_betas

pytestmark = pytest.mark.usefixtures("natively")
TABLE = StepTable.from_process(GaussianDiffusion(cosine_betas(6)))
ROWS = torch.linspace(0.1, 0.9, 6)
WEIGHT = torch.ones(6)


def q_sample(x, **options):
    return ops.q_sample(x, torch.zeros(len(x), dtype=torch.int64), ROWS, ROWS, **options)[0]


def posterior_step(x, seed=1, step=0, **options):
    return ops.posterior_step(x, x, TABLE, step, seed=seed, **options)[0]


def group_norm_silu(x, weight=WEIGHT, groups=2, **options):
    return ops.group_norm_silu(x, groups, weight, weight, **options)


def rms_norm_silu(x, weight=WEIGHT, **options):
    return ops.rms_norm_silu(x, weight, **options)


def attention(x, heads=2, **options):
    return ops.attention(x.flatten(2), heads, **options)


CALLS = [q_sample, posterior_step, group_norm_silu, rms_norm_silu, attention]


@pytest.fixture
def natively():
    with fastdiff.backend("native"), torch.no_grad():
        yield


@pytest.fixture
def plans(monkeypatch):
    """How many plans were made, in a list of one number."""
    count, planned = [0], Kernel._planned

    def counted(self, call):
        count[0] += 1
        return planned(self, call)

    monkeypatch.setattr(Kernel, "_planned", counted)
    return count


def images(*shape, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(shape or (3, 6, 5, 7), generator=generator, device="cpu", dtype=dtype)
    return x.to(torch.get_default_device())


@pytest.mark.parametrize("call", CALLS)
def test_calls_alike_are_planned_once(plans, call):
    call(images(3, 6, 5, 9))
    made = plans[0]
    call(images(3, 6, 5, 9))
    assert plans[0] == made
    others = [images(3, 6, 5, 10), images(2, 6, 5, 9), images(3, 6, 5, 9, dtype=torch.bfloat16)]
    for x in (*others, images(3, 6, 4, 5).mT):
        before = plans[0]
        call(x)
        call(x)
        assert plans[0] in (before + 1, before + 2)  # two: the call itself, and on copies


@pytest.mark.parametrize(
    "call, options",
    [
        (q_sample, [{"noise": images(3, 6, 5, 11)}, {"seed": 1}]),
        (posterior_step, [{}, {"seed": None, "noise": images(3, 6, 5, 11)}]),
        (group_norm_silu, [{}, {"groups": 3}, {"eps": 1.0}, {"activation": None}]),
        (rms_norm_silu, [{}, {"eps": 1.0}, {"activation": None}]),
        (attention, [{}, {"heads": 1}, {"order": "qkv_first"}]),
    ],
)
def test_numbers_and_names_make_another_plan(call, options):
    """Interleaved, each answers what it answers alone, by the reference."""
    x = images(3, 6, 5, 11)
    for given in options * 2:
        with fastdiff.backend("reference"):
            expected = call(x, **given)
        torch.testing.assert_close(call(x, **given), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call, wrong",
    [
        (q_sample, {"noise": images(3, 6, 5, 8)}),
        (posterior_step, {"seed": None, "noise": images(3, 6, 5, 8)}),
        (group_norm_silu, {"weight": torch.ones(7)}),
        (group_norm_silu, {"weight": torch.ones(6, device="meta")}),
        (group_norm_silu, {"weight": torch.ones(6, dtype=torch.int32)}),
        (rms_norm_silu, {"weight": torch.ones(7)}),
        (rms_norm_silu, {"weight": torch.ones(6, device="meta")}),
    ],
)
def test_what_is_refused_is_refused_again(call, wrong):
    """After a call of the same x that was not."""
    x = images()
    for _ in range(2):
        call(x)
        with pytest.raises(InputError):
            call(x, **wrong)


def test_values_are_looked_at_in_every_call():
    x = images()
    t = torch.zeros(3, dtype=torch.int64)
    for bad in (6, -1):
        ops.q_sample(x, t, ROWS, ROWS, seed=1)
        with pytest.raises(InputError, match=f"got {bad}"):
            ops.q_sample(x, t + bad, ROWS, ROWS, seed=1)
        with pytest.raises(InputError, match="the table has rows"):
            posterior_step(x, step=torch.tensor(bad))
        posterior_step(x, step=torch.tensor(5))


@pytest.mark.parametrize("call", CALLS[2:])
def test_each_backend_has_its_own_plan(call):
    pytest.importorskip("triton")
    from harness.fake_gpu import fake_gpu

    x = images()
    expected = call(x)
    for _ in range(2):
        with fake_gpu() as gpu, fastdiff.backend("triton"):
            call(x)
            assert gpu.launches
        assert torch.equal(call(x), expected)


def test_statistics_that_nobody_keeps_are_not_written():
    pytest.importorskip("triton")
    from harness.fake_gpu import fake_gpu

    x, weight = images(), WEIGHT.clone().requires_grad_()
    with fake_gpu() as gpu, fastdiff.backend("triton"):
        for grad, number in ((False, 2), (True, 0)):
            with torch.set_grad_enabled(grad):
                group_norm_silu(x, weight)
            given = gpu.launches[-1].arguments
            assert sum(v is None for v in given[9:12]) == number  # y, mean, rstd


@pytest.mark.parametrize("call", CALLS)
def test_a_second_call_prepares_no_launch(monkeypatch, call):
    pytest.importorskip("triton")
    from fastdiff.kernels.launcher import Launch
    from harness.fake_gpu import fake_gpu

    x = images(3, 6, 5, 13)
    options = {"seed": 1} if call is q_sample else {}
    with fake_gpu(), fastdiff.backend("triton"):
        call(x, **options)
        monkeypatch.setattr(Launch, "__init__", None)
        call(x, **options)
