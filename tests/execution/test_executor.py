"""A U-Net as a program of fused operations computes what its forward does."""

import functools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from executor_cases import ADM, CASES, arguments, changes, in_dtype
from fastdiff.errors import InputError
from fastdiff.models.execution.ahead import Ahead
from fastdiff.models.execution.executor import Executor
from fastdiff.ops.convolution.packed import Packed
from unet_tools import batch, small_unet


@pytest.mark.parametrize("case", CASES)
def test_the_answers_are_the_forwards(case):
    options, size = CASES[case]
    model = small_unet(**options)
    given = arguments(model, size)
    with torch.no_grad():
        single = Executor(model)(**given)
        values = Executor(model, exact=True)(**given)
        assert single.dtype == torch.float32 and single.shape[2:] == tuple(size)
        assert single.std() > 0.01
        model.double()
        exact = model(**in_dtype(given, torch.float64))
        double = Executor(model)(**in_dtype(given, torch.float64))
    assert (double - exact).abs().max() < 1e-10
    largest = exact.abs().max()
    assert (single - exact).abs().max() < 3e-4 * largest  # of pieces, where the plan takes them
    assert (values - exact).abs().max() < 2e-5 * largest


@pytest.mark.parametrize("case", ["plain", "ADM", "1-D"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_bfloat16_is_as_near_as_the_forwards_own(case, stored):
    options, size = CASES[case]
    model = small_unet(**options)
    given = arguments(model, size)
    with torch.no_grad():
        exact = model(**given)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = model(**given) - exact
        ours = Executor(model.to(stored), torch.bfloat16)(**given) - exact
    if stored == torch.float32:
        assert ours.square().mean() < 1.5 * theirs.square().mean()
    assert ours.abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("case", ["plain", "ADM", "3-D"])
def test_an_empty_batch(case):
    options, size = CASES[case]
    model = small_unet(**options)
    given = arguments(model, size, n=0)
    assert Executor(model)(**given).shape == model(**given).shape


@pytest.mark.seconds
@settings(deadline=None, max_examples=8)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    model_channels=st.integers(1, 40),
    resblock_updown=st.booleans(),
    conv_resample=st.booleans(),
)
def test_any_size_and_width(height, width, model_channels, resblock_updown, conv_resample):
    model = small_unet(
        model_channels=model_channels,
        channel_mult=(1, 1, 1),
        attention_resolutions=(4,),
        resblock_updown=resblock_updown,
        conv_resample=conv_resample,
    ).double()
    given = in_dtype(arguments(model, (height, width)), torch.float64)
    with torch.no_grad():
        assert (Executor(model)(**given) - model(**given)).abs().max() < 1e-10


@pytest.mark.seconds
def test_one_executor_serves_many_shapes_layouts_and_dtypes():
    model = small_unet()
    executor = Executor(model)
    with torch.no_grad():
        for n, size, dtype in [(2, (8, 8), torch.float32), (1, (6, 4), torch.float64)] * 2:
            x, t, _ = batch(model, *size, n=n)
            for laid_out in (x, x.contiguous(memory_format=torch.channels_last), x.mT.mT):
                found = executor(laid_out.to(dtype), t)
                assert found.dtype == dtype
                torch.testing.assert_close(found, model(x, t).to(dtype), rtol=1e-4, atol=1e-4)


def test_autocast_and_gradients_of_the_caller_change_nothing():
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model)
    expected = executor(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        found = executor(x.requires_grad_(), t)
    assert torch.equal(found, expected) and not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(executor(x, t), expected)


# --- Weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exchange", "in place", "unseen", "module"])
@pytest.mark.parametrize("inside", [False, True])
@torch.no_grad()
def test_weights_are_live(kind, inside):
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model)
    before = model(x, t)
    if inside:
        executor.begin()
    torch.testing.assert_close(executor(x, t), before, rtol=1e-4, atol=1e-4)
    changes(model)[kind]()
    if inside:
        executor.begin() if kind == "unseen" else executor.refresh()
    found = executor(x, t)
    torch.testing.assert_close(found, model(x, t), rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-3


@torch.no_grad()
def test_weights_are_packed_once_between_begin_and_end(monkeypatch):
    packed, refresh = [], Packed.refresh
    monkeypatch.setattr(Packed, "refresh", lambda self: packed.append(1) or refresh(self))
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model, exact=True)  # of one kind, whatever the batch
    executor.begin()
    for n in (1, 2, 2):
        executor(x[:n], t[:n])
        executor.refresh()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
    assert len(packed) == len(convolutions)
    executor.end()
    executor(x, t)
    assert len(packed) == 2 * len(convolutions)


def panels(executor):
    made = executor._weights._made.values()
    return [m.panels.data_ptr() for m in made if isinstance(m, Packed) and m.panels is not None]


@pytest.mark.parametrize("kind", ["exchange", "in place", "unseen", "module"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_the_next_call_computes_in_the_memory_of_the_last(kind, dtype):
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model, dtype)
    executor(x, t)
    kept, before = executor._weights, panels(executor)
    changes(model)[kind]()
    found = executor(x, t)
    assert executor._weights is kept and (kind == "module" or panels(executor) == before)
    assert torch.equal(found, Executor(model, dtype)(x, t))


@torch.no_grad()
def test_a_call_gives_back_what_is_not_for_its_own_plan():
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model)
    executor(x, t)
    alone = executor._weights.nbytes
    executor.begin()
    executor(x[:1], t[:1])
    executor(x, t)
    assert executor._weights.nbytes > alone  # two plans of one call
    executor.end()
    executor(x, t)
    assert executor._weights.nbytes == alone


@torch.no_grad()
def test_a_call_that_begins_beside_another_one_leaves_its_weights_alone():
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model)
    before = executor(x, t)
    plan = executor.plan(*x.shape)
    first = executor._weights
    with first.bound(plan) as bound:
        model.out[2].weight.mul_(3)
        executor.begin()
        after = executor(x, t)
        assert executor._weights is not first
        again, _ = bound.run([{"x": x, "timesteps": t}[n] for n in plan.inputs], Ahead())
        assert torch.equal(again, before)
    assert (after - before).abs().max() > 1e-3


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        ({"x": torch.zeros(2, 4, 8, 8)}, "expected (N, 3, H, W)"),
        ({"timesteps": torch.zeros(3)}, "timesteps have shape (3,)"),
        ({"y": torch.zeros(2, dtype=torch.long)}, "the network has no classes"),
        ({"low_res": torch.zeros(2, 3, 4, 4)}, "not built with super_res"),
    ],
)
def test_arguments_that_the_forward_refuses(given, message):
    executor = Executor(small_unet())
    arguments = {"x": torch.zeros(2, 3, 8, 8), "timesteps": torch.zeros(2), **given}
    with pytest.raises(InputError) as caught:
        executor(**arguments)
    assert message in str(caught.value)


def test_a_network_that_changed_is_refused_where_it_would_be_run():
    model = small_unet()
    executor = Executor(model)
    x, t, _ = batch(model, 8, 8)
    model.out[2].register_forward_hook(lambda *_: None)
    for call in (executor.begin, functools.partial(executor, x, t)):
        with pytest.raises(InputError, match="not executed as a program: out.2 has a hook"):
            call()


def test_a_dtype_that_is_not_served():
    with pytest.raises(InputError, match="dtype is torch.float16; expected torch.float32"):
        Executor(small_unet(), torch.float16)


def test_nothing_warns():
    model = small_unet(**ADM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Executor(model)(**arguments(model, (8, 8)))
