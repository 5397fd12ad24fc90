"""A program as a GPU runs it, on tensors of the CPU: its answers, its kernels, its bytes."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_format_tools import TINY, theirs
from executor_cases import ADM, CASES, arguments, changes, in_dtype, program_of
from fastdiff import UNet
from fastdiff.models.blocks import ResBlock
from fastdiff.models.execution import executor as executor_module
from fastdiff.models.execution import foreign, problems
from fastdiff.models.execution.executor import Executor, planned
from fastdiff.models.execution.explanation import (
    beside_convolutions,
    copies,
    counts,
    explanation,
    kernels,
)
from fastdiff.models.execution.launched import Launched
from fastdiff.models.execution.lowering_cuda import CudaLowering
from fastdiff.models.execution.plan import Plan
from fastdiff.models.readers import reading_of
from fastdiff.models.valueless import valueless
from fastdiff.models.wrappers import tensor_of
from fastdiff.sampling.network import execution
from fastdiff.sampling.network.network import Network
from published_unet import Guided, small
from unet_tools import batch, small_unet


@pytest.fixture(autouse=True, scope="module")
def lowered_for_gpus():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(executor_module.LOWERINGS, "cpu", CudaLowering)
        yield


def of_preset(name: str, n: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[Plan, UNet]:
    with valueless():
        unet = UNet.from_preset(name)
    side = unet.image_size or 32
    shapes = {"x": (n, 3, side, side), "timesteps": (n,)}
    shapes |= {"y": (n,)} if unet.num_classes else {}
    return planned(unet, dtype, shapes, device="cuda"), unet


# --- Answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_answers_are_the_forwards(case):
    options, size = CASES[case]
    model = small_unet(**options)
    given = arguments(model, size)
    single = Executor(model)(**given)
    assert single.dtype == torch.float32 and single.std() > 0.01
    model.double()
    exact = model(**in_dtype(given, torch.float64))
    assert (Executor(model)(**in_dtype(given, torch.float64)) - exact).abs().max() < 1e-10
    assert (single - exact).abs().max() < 2e-5 * exact.abs().max()


@pytest.mark.parametrize("case", ["plain", "ADM", "1-D", "Ho et al."])
@torch.no_grad()
def test_bfloat16_is_as_near_as_the_forwards_own(case):
    options, size = CASES[case]
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(6):
        model = small_unet(**options)
        torch.manual_seed(seed)
        given = {
            k: torch.randn_like(v) if k == "x" else v for k, v in arguments(model, size).items()
        }
        ours = Executor(model, torch.bfloat16)(**given)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = model(**given)
        exact = model.double()(**in_dtype(given, torch.float64))
        errors += torch.stack([(v - exact).square().mean() for v in (ours, theirs)])
    assert errors[0] < 1.25 * errors[1]


@pytest.mark.parametrize("case", ["plain", "3-D"])
def test_an_empty_batch(case):
    options, size = CASES[case]
    model = small_unet(**options)
    given = arguments(model, size, n=0)
    assert Executor(model)(**given).shape == model(**given).shape


@pytest.mark.seconds
@settings(deadline=None, max_examples=8)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    model_channels=st.integers(1, 40),
    resblock_updown=st.booleans(),
    conv_resample=st.booleans(),
)
@torch.no_grad()
def test_any_size_and_width(size, model_channels, resblock_updown, conv_resample):
    options = {
        "model_channels": model_channels,
        "channel_mult": (1, 2, 1),
        "attention_resolutions": (4,),
        "resblock_updown": resblock_updown,
        "conv_resample": conv_resample,
    }
    model = small_unet(**options).double()
    given = arguments(model, size)
    exact = model(**in_dtype(given, torch.float64))
    found = Executor(model)(**in_dtype(given, torch.float64))
    assert (found - exact).abs().max() < 1e-10
    # Groups of two values are normalised to their signs, which any rounding may turn: autocast's
    # own error is a third of the answer there. A norm of all channels says how exact a program is;
    # of larger images, as PyTorch 2.13 convolves widths of 1 and 2 wrongly with a stride in
    # bfloat16 on CPUs with AMX.
    model = small_unet(**options, norm_num_groups=1)
    given = arguments(model, [side + 4 for side in size])
    half = Executor(model, torch.bfloat16)(**given)
    exact = model.double()(**in_dtype(given, torch.float64))
    assert (half - exact).abs().max() < 0.1 * exact.abs().max() + 0.02


# --- Weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exchange", "in place", "unseen", "module"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_weights_are_live(kind, inside, dtype):
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model, dtype)
    if inside:
        executor.begin()
    before = executor(x, t)
    changes(model)[kind]()
    if inside:
        executor.begin() if kind == "unseen" else executor.refresh()
    found = executor(x, t)
    assert torch.equal(found, Executor(model, dtype)(x, t))
    assert (found - before).abs().max() > 1e-2


def tensors(executor: Executor) -> list[torch.Tensor]:
    return list(executor._weights._made.values())


@pytest.mark.parametrize("kind, stays", [("unseen", True), ("in place", True), ("exchange", False)])
@torch.no_grad()
def test_graphs_may_go_on_reading_the_weights_while_their_generation_stays(kind, stays):
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model)
    executor.begin()
    executor(x, t)
    places = [v.data_ptr() for v in tensors(executor)]
    generation = executor.generation
    executor.end()
    changes(model)[kind]()
    executor.begin()
    executor(x[:1], t[:1])
    assert (executor.generation == generation) == stays
    if stays:
        assert [v.data_ptr() for v in tensors(executor)] == places


@torch.no_grad()
def test_a_parameter_that_was_exchanged_is_not_written_to():
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model)
    executor(x, t)
    layer = model.middle_block[0].in_layers[2]
    before, values = layer.weight, layer.weight.clone()
    layer.weight = nn.Parameter(2 * before.contiguous())  # read in another layout: by a copy
    torch.testing.assert_close(executor(x, t), model(x, t), rtol=1e-4, atol=1e-4)
    assert torch.equal(before, values)


@torch.no_grad()
def test_copies_of_weights_that_are_cast_never_move():
    model = small_unet()
    x, t, _ = batch(model, 8, 8)
    executor = Executor(model, torch.bfloat16)
    with torch.inference_mode():
        executor(x, t)
    generation = executor.generation
    layer = model.out[0]  # of whose weight there is no copy
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=False)
    executor(x, t)
    assert executor.generation == generation
    layer.weight = nn.Parameter(layer.weight + 1)
    expected = model(x, t)
    assert (executor(x, t) - expected).abs().max() < 0.1 * expected.abs().max()
    assert executor.generation != generation


# --- Kernels and bytes --------------------------------------------------------------------------


def test_the_operations_of_ddpm_cifar10():
    """22 res blocks of two convolutions and two norms, 13 of them with a skip product, twelve of
    these of two tensors; 6 attentions of two products and a norm; 3 strided convolutions and 3
    after doublings; the two ends."""
    plan, _ = of_preset("ddpm-cifar10")
    assert counts(plan) == {
        "convolution": 2 * 22 + 3 + 3 + 2,
        "product": 13 + 2 * 6,
        "accumulate": 12,
        "residual_norm": 22 + 6 + 1,
        "group_norm_silu": 22,
        "attention": 6,
        "upsample": 3,
        # Before a resampling a block's sum is made for it: the skip, and the bias but after
        # attention, which has its own from the product.
        "add": 2 * 6 - 2,
        "linear": 2,
        "silu": 2,
        "waves": 1,
        "projections": 1,
        "widen": 1,
        "narrow": 1,
    }


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["ddpm-cifar10", "iddpm-cifar10", "iddpm-imagenet64", "adm-64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_image_is_copied_and_no_concatenation_written(name, dtype):
    plan, _ = of_preset(name, dtype=dtype)
    assert copies(plan) == 0
    assert not counts(plan).keys() & {"concat", "plain_convolution"}
    for step in plan.steps:
        if step.kind == "convolution":
            assert [slot.weight.name for slot in step.reads if slot.weight] == ["weight"]


@pytest.mark.parametrize("name, at_most", [("ddpm-cifar10", 32), ("iddpm-imagenet64", 32)])
def test_a_res_block_moves_six_images_beside_its_convolutions(name, at_most):
    """N: the bytes of the larger of what the block normalises first, both tensors of it, and what
    it answers. A sum is counted with the norm that reads it, as that writes it. Groups of larger
    images than ``at_most`` are read twice, the second time as far as it holds them from the L2."""
    n = 8
    plan, unet = of_preset(name, n=n)
    moved, seen = beside_convolutions(plan), 0
    for block, module in unet.named_modules():
        if not isinstance(module, ResBlock):
            continue
        norm = next(s for s in plan.steps if s.layer is module.in_layers[0])
        _, _, *size = norm.writes[0].shape
        image = max(norm.writes[0].nbytes, n * module.out_layers[0].num_channels * size[0] ** 2 * 2)
        limit = 6 if size[0] <= at_most else 8
        rows = n * module.out_layers[0].num_channels * 2 * 4  # of the embedding's projection
        assert moved[block] <= limit * image + rows, block
        seen += 1
    assert seen == (22 if name == "ddpm-cifar10" else 30)


def test_the_explanation_has_bytes_and_kernels():
    plan, _ = of_preset("ddpm-cifar10", n=64)
    text = explanation(plan)
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    n = 64 * 128 * 32 * 32 * 2 / 1e6
    (_, activations, _, beside, *_) = lines["input_blocks.2.0"]
    assert abs(float(beside) / n - 6) < 0.02 and abs(float(activations) / n - 10) < 0.02
    assert f"kernels of a call: {kernels(plan)}\n" in text and kernels(plan) < 180


def test_norms_of_large_groups_are_three_kernels():
    pytest.importorskip("triton")
    plan, _ = of_preset("iddpm-imagenet64")
    more = kernels(plan) - len(plan.steps)
    twice = {
        s.writes[0].shape[2]
        for s in plan.steps
        if s.kind in ("residual_norm", "group_norm_silu") and s.writes[0].shape[2] == 64
    }
    assert twice == {64} and more > 20


# --- Where it runs ------------------------------------------------------------------------------


def test_results_are_let_go_after_their_last_reader():
    model = small_unet()
    plan = Executor(model).plan(2, 3, 8, 8)
    launched = Launched(plan, [None] * len(plan.weights))
    held, last_read = set(), {}
    for step, last_needed in launched._steps:
        for slot in step.reads:
            if slot is not None and slot.weight is None:
                assert (slot.whole or slot) in held or slot in launched._inputs
                last_read[slot.whole or slot] = step
        held.update(slot.whole or slot for slot in step.writes)
        assert all(last_read.get(slot.whole or slot) in (step, None) for slot in last_needed)
        held.difference_update(last_needed)
    assert held == {plan.output.whole or plan.output}


@pytest.fixture
def elsewhere(monkeypatch):
    """Networks on "meta" count as on a device that programs know."""
    monkeypatch.setattr(problems, "DEVICES", ("cpu", "meta"))


def test_a_network_on_two_devices(elsewhere):
    model = small_unet()
    model.out[2].to("meta")
    said = problems.difference(model)
    assert said == "out.2 has weight on meta, others on cpu"


def test_a_gpu_is_asked_for_programs(elsewhere):
    model = small_unet().to("meta")
    for executor, count in (("auto", 0), (True, 1)):
        network = Network(model, torch.bfloat16, None, False, executor)
        assert len(network.programs.of(network.replica)) == count
        assert (network.programs.refused == execution.UNMEASURED) == (executor == "auto")


@pytest.mark.parametrize("make", [lambda: small(Guided), lambda: theirs(TINY)])
@torch.no_grad()
def test_another_codebases_network_is_tried_and_called_where_it_is(make, elsewhere, monkeypatch):
    model = make().to("meta")
    reading, tried = reading_of(model), []

    class Program:
        def __init__(self, reading):
            pass

        def __call__(self, **arguments):
            tried.append({v.device.type for v in arguments.values()})
            raise RuntimeError("no values")

    monkeypatch.setattr(foreign, "Executor", Program)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # "meta" has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    assert reading.difference() == ""
    assert reading.disagreement() == "tried on small inputs it fails (no values)"
    assert tried == [{"meta"}]  # after the network's own forward on the same
    x, t = torch.zeros(2, 3, 8, 8, device="meta"), torch.zeros(2, device="meta")
    assert reading.call((x, t), {}) is not None
    assert reading.call((x, 3), {}).arguments["timesteps"].device.type == "meta"
    assert reading.call((x.new_zeros(x.shape, device="cpu"), t), {}) is None
    assert reading.call((x, torch.zeros(2)), {}) is None


@pytest.mark.cuda
@pytest.mark.parametrize("make", [lambda: small(Guided), lambda: theirs(TINY)])
@torch.no_grad()
def test_on_a_gpu_the_answers_are_another_codebases_networks(make):
    model = make().cuda()
    x, t = torch.randn(2, 3, 16, 16, device="cuda"), torch.tensor([10, 900], device="cuda")
    expected = tensor_of(model(x, t))
    found = tensor_of(program_of(model)(x, t))
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, ADM], ids=["plain", "ADM"])
@torch.no_grad()
def test_on_a_gpu_the_answers_are_the_forwards(options):
    model = small_unet(**options)
    given = arguments(model, (16, 16))
    exact = model.double()(**in_dtype(given, torch.float64))
    model.float().cuda()
    given = {k: v.cuda() for k, v in given.items()}
    with torch.backends.cudnn.flags(allow_tf32=False):
        single = Executor(model)(**given).cpu()
    half = Executor(model, torch.bfloat16)(**given).cpu()
    assert (single - exact).abs().max() < 2e-5 * exact.abs().max()
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()
