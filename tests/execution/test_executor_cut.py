"""A network cut in two: its deep part is another call's, and what a shallow call computes of it."""

import pytest
import torch
from diffusers import UNet2DModel

from diffusers_format_tools import TINY, theirs
from executor_cases import CASES, arguments, in_dtype
from fastdiff import UNet
from fastdiff.models.execution import executor as executor_module
from fastdiff.models.execution.executor import Executor, planned
from fastdiff.models.execution.explanation import explanation
from fastdiff.models.execution.lowering import Lowering
from fastdiff.models.execution.lowering_cuda import CudaLowering
from fastdiff.models.readers import reading_of
from fastdiff.models.valueless import valueless
from published_unet import Guided, Improved, small
from unet_tools import batch, small_unet

LOWERINGS = pytest.mark.parametrize("lowering", [Lowering, CudaLowering])


@pytest.fixture
def lowered(lowering, monkeypatch):
    monkeypatch.setitem(executor_module.LOWERINGS, "cpu", lowering)


def two_calls(model, size):
    """The arguments of a call, and of one whose images and timesteps are others."""
    torch.manual_seed(1)
    given = arguments(model, size)
    x = given["x"] + 0.3 * torch.randn_like(given["x"])
    return given, {**given, "x": x, "timesteps": given["timesteps"] * 0.9}


def depths(model):
    return sorted({1, 2, len(model.input_blocks)})


@torch.no_grad()
@LOWERINGS
@pytest.mark.parametrize("case", CASES)
def test_a_shallow_call_is_the_forwards(case, lowering, lowered):
    options, size = CASES[case]
    model = small_unet(**options)
    reference = small_unet(**options).double()
    first, second = two_calls(model, size)
    executor = Executor(model, exact=True)
    for depth in depths(model):
        _, deep = reference.forward_cut(**in_dtype(first, torch.float64), depth=depth)
        expected, _ = reference.forward_cut(
            **in_dtype(second, torch.float64), depth=depth, deep=deep
        )
        _, kept = executor.forward_cut(**first, depth=depth)
        assert (kept[0] - deep).abs().max() <= 1e-4 * deep.abs().max()
        found, _ = executor.forward_cut(**second, depth=depth, deep=kept)
        whole = reference(**in_dtype(second, torch.float64))
        largest = expected.abs().max()
        assert (found - expected).abs().max() <= 1e-4 * largest
        if case != "one pixel":  # which its norms leave nothing of
            assert (whole - expected).abs().max() > 1e-3 * largest  # the deep part is the first's


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_forward_cut_in_two_is_the_forward(case):
    options, size = CASES[case]
    model = small_unet(**options)
    first, second = two_calls(model, size)
    expected = model(**first)
    for depth in range(1, len(model.input_blocks) + 1):
        output, deep = model.forward_cut(**first, depth=depth)
        again, same = model.forward_cut(**first, depth=depth, deep=deep)
        assert torch.equal(output, expected) and torch.equal(again, expected) and same is deep


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_with_its_own_deep_part_a_shallow_call_is_the_whole_one_to_the_bit(case, dtype):
    options, size = CASES[case]
    if dtype == torch.bfloat16 and options.get("dims") == 3:
        pytest.skip("PyTorch pools no such volumes")
    model = small_unet(**options).to(dtype)
    given, other = (in_dtype(g, dtype) for g in two_calls(model, size))
    executor = Executor(model)
    expected = executor(**given)
    for depth in depths(model):
        output, deep = executor.forward_cut(**given, depth=depth)
        executor.forward_cut(**other, depth=depth)  # in the same memory
        again, _ = executor.forward_cut(**given, depth=depth, deep=deep)
        assert torch.equal(output, expected)
        assert torch.equal(again, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Improved, Guided, UNet2DModel])
def test_another_codebases_network_is_cut_too(kind):
    model = theirs(TINY) if kind is UNet2DModel else small(kind)
    reading = reading_of(model)
    assert reading.difference() == ""
    executor = Executor(reading)
    torch.manual_seed(2)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([900.0, 20.0]), None
    if reading.unet.num_classes is not None:
        y = torch.tensor([0, 1])
    expected = executor(x, t, y)
    _, deep = executor.forward_cut(x, t, y, depth=1)
    again, _ = executor.forward_cut(x, t, y, depth=1, deep=deep)
    assert torch.equal(again, expected)
    shallow, _ = executor.forward_cut(x + 0.1, t, y, depth=1, deep=deep)
    assert (shallow - expected).abs().max() > 1e-4


# --- What it costs ------------------------------------------------------------------------------


@LOWERINGS
@pytest.mark.parametrize("preset", ["ddpm-cifar10", "adm-64"])
def test_a_shallow_call_runs_the_shallow_layers_alone(preset, lowering):
    with valueless():
        unet = UNet.from_preset(preset)
    shapes = {"x": (2, 3, 64, 64), "timesteps": (2,)}
    if unet.num_classes is not None:
        shapes["y"] = (2,)
    device = {Lowering: "cpu", CudaLowering: "cuda"}[lowering]
    plan = planned(unet, torch.float32, shapes, depth=2, device=device)
    run = {id(plan.steps[number]) for number in plan.shallow}
    shallow = [*unet.input_blocks[:2], *unet.output_blocks[-2:], unet.out]
    expected = {part for block in shallow for part in block.modules()}
    multiplied = {
        step.layer
        for step in plan.steps
        if id(step) in run and step.kind in ("convolution", "product", "attention")
    }
    assert multiplied <= expected
    assert {m for m in expected if isinstance(m, torch.nn.Conv2d)} <= multiplied
    assert f"of these a shallow call runs {len(plan.shallow)} operations" in explanation(plan)


@torch.no_grad()
def test_weights_are_packed_once_for_both():
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model)
    executor.begin()
    _, deep = executor.forward_cut(x, t, depth=1)
    held = executor._weights.nbytes
    executor.forward_cut(x, t, depth=1, deep=deep)
    assert executor._weights.nbytes == held


@torch.no_grad()
def test_weights_are_those_that_a_call_begins_with():
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model)
    _, deep = executor.forward_cut(x, t, depth=1)
    model.out[2].weight.data.mul_(2)
    model.out[2].bias.data.mul_(2)
    shallow, _ = executor.forward_cut(x, t, depth=1, deep=deep)
    assert torch.equal(shallow, executor(x, t))
