"""What a program is made of: how many operations, what they move, and what they hold alive."""

from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import UNet
from fastdiff.models import presets
from fastdiff.models.execution import functions, lowering
from fastdiff.models.execution.ahead import Ahead
from fastdiff.models.execution.executor import Executor, planned
from fastdiff.models.execution.explanation import bytes_moved, copies, counts
from fastdiff.models.execution.lowering import CHANNELS_LAST, Lowering
from fastdiff.models.execution.lowering_cuda import CudaLowering
from fastdiff.models.execution.plan import Plan
from fastdiff.models.execution.program import Program
from fastdiff.models.execution.reading import Reading
from fastdiff.models.execution.weights import Weights
from fastdiff.models.valueless import valueless
from fastdiff.ops import backends
from fastdiff.ops.convolution.fastest import Products
from unet_tools import batch, small_unet


def shapes_of(unet: UNet, n: int, side: int) -> dict:
    shapes = {"x": (n, unet.in_channels, side, side), "timesteps": (n,)}
    if unet.num_classes is not None:
        shapes["y"] = (n,)
    if unet.super_res:
        shapes["low_res"] = (n, unet.in_channels, side // 4, side // 4)
    return shapes


def of_preset(name: str, n: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Plan, UNet]:
    with valueless():
        unet = UNet.from_preset(name)
    side = unet.image_size or 32
    return planned(unet, dtype, shapes_of(unet, n, side)), unet


def test_the_operations_of_ddpm_cifar10():
    """22 res blocks of two convolutions and two norms, 13 of them with a skip convolution; 6
    attentions of two products and a norm; 3 strided and 3 doubling convolutions; the two ends."""
    plan, _ = of_preset("ddpm-cifar10")
    expected = {
        "convolution": 2 * 22 + 13 + 2 * 6 + 3 + 3 + 2,
        "norm_coefficients": 2 * 22 + 6 + 1,
        "attention": 6,
        "linear": 2,
        "silu": 2,
        "waves": 1,
        "projections": 1,
        "convert": 1,
    }
    assert counts(plan) == expected
    found = Counter(
        kind
        for step in plan.steps
        if step.kind == "convolution"
        for kind, holds in {
            "norm": step.reads[4] is not None,
            "add": step.reads[5] is not None,
            "residual": step.reads[6] is not None,
            "second": step.reads[3] is not None,
            "upsample": step.options.get("upsample", False),
            "moments": step.options.get("moments", False),
        }.items()
        if holds
    )
    # A concatenation is read by a block's first convolution and by its skip. No norm reads the
    # skips' results, q, k and v, what is doubled, and the network's own.
    assert found == {
        "norm": 2 * 22 + 6 + 1,
        "add": 22,
        "residual": 22 + 6,
        "second": 2 * 12,
        "upsample": 3,
        "moments": 77 - 13 - 6 - 3 - 1,
    }


@pytest.mark.seconds
@pytest.mark.sample(5)
@pytest.mark.parametrize("name", presets.names("UNet"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_copied_between_layers_of_a_preset(name, dtype):
    plan, unet = of_preset(name, dtype=dtype)
    assert plan.layout == CHANNELS_LAST and copies(plan) == 0
    plain = {"plain_convolution", "concat", "moments"}
    updown = unet.config["resblock_updown"]
    assert not counts(plan).keys() & (plain if updown else plain | {"group_norm_silu", "upsample"})


def test_copies_are_counted_where_there_are_some():
    model = small_unet(dims=3)
    plan = planned(model, torch.float32, {"x": (2, 3, 4, 8, 8), "timesteps": (2,)})
    assert copies(plan) == counts(plan)["attention"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options, size",
    [
        ({}, (8, 8)),
        ({"resblock_updown": True, "use_scale_shift_norm": True, "num_classes": 3}, (7, 9)),
        ({"conv_resample": False, "super_res": True, "channel_mult": (1, 1, 1)}, (8, 6)),
        ({"dims": 3}, (2, 6, 5)),
        ({"dims": 1}, (9,)),
    ],
)
@pytest.mark.parametrize("kind", [Lowering, CudaLowering])
@torch.no_grad()
def test_every_result_has_the_shape_dtype_and_layout_that_its_reader_expects(
    options, size, dtype, kind
):
    model = small_unet(**options)
    x, t, y = batch(model, *size)
    given = {"x": x, "timesteps": t} | ({} if y is None else {"y": y})
    if model.super_res:
        given["low_res"] = torch.randn(2, 3, *(side // 2 for side in size))
    program = Program(dtype)
    values = {name: program.input(name, tensor.shape) for name, tensor in given.items()}
    names = ("x", "timesteps", "y", "low_res", "noise_level")
    lowered = kind(program, model.unroll(program, *map(values.get, names))[0])
    seen = []

    def watched(step, function):
        def run(*args, **options):
            results = function(*args, **options)
            several = results if isinstance(results, tuple) else (results,)
            for slot, result in zip(step.writes, several, strict=True):
                assert (tuple(result.shape), result.dtype) == (slot.shape, slot.dtype), step
                if result.dim() > 3:
                    layout = functions.MEMORY_FORMATS[slot.layout]
                    if result.dim() == 5 and slot.layout == CHANNELS_LAST:
                        layout = torch.channels_last_3d
                    assert result.is_contiguous(memory_format=layout), step
                seen.append(result)
            return results

        return run

    for step in lowered.steps:
        step.function = watched(step, step.function)
    plan = Plan(lowered, {})
    with Weights(Reading(model).tensors).bound(plan) as bound:
        bound.run([given[name] for name in plan.inputs], Ahead())
    assert len(seen) == sum(len(step.writes) for step in lowered.steps)


class Alive(TorchDispatchMode):
    """The bytes of results that are alive, at most."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {k: held for k, held in self.storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.storages.values()))
        return result


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["ddpm-cifar10", "iddpm-imagenet64", "adm-64"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@torch.no_grad()
def test_no_more_is_held_alive_than_by_the_forward(name, device):
    with valueless():
        unet = UNet.from_preset(name)
    shapes = shapes_of(unet, 8, 32)
    plan = planned(unet, torch.float32, shapes, device=device)
    with backends.backend(None), torch.device("meta"), Alive() as alive:
        given = {k: torch.empty(shape) for k, shape in shapes.items()}
        given |= {"y": torch.empty(8, dtype=torch.long)} if "y" in given else {}
        unet(**given)
    assert plan.peak < alive.peak


def test_bytes_are_those_of_what_is_read_and_written():
    plan, _ = of_preset("ddpm-cifar10", n=8)
    moved = bytes_moved(plan)
    image = 8 * 128 * 32 * 32 * 4
    # A res block reads x, writes and reads h, reads x again as the residual, writes its result:
    # beside five images there are moments, coefficients and the embedding.
    activations, weights = moved["input_blocks.1.0"]
    assert 5 * image < activations < 5.02 * image
    assert weights == 4 * (2 * (128 * 128 * 9 + 128) + 4 * 128)
    assert sum(w for _, w in moved.values()) >= 4 * 35.7e6
    half, _ = of_preset("ddpm-cifar10", n=8, dtype=torch.bfloat16)
    assert bytes_moved(half)["input_blocks.1.0"][0] < 0.51 * activations


@torch.no_grad()
def test_the_explanation_lists_every_operation():
    model = small_unet(conv_resample=False)
    x, t, _ = batch(model, 7, 8)
    executor = Executor(model)
    assert executor.explain() == "nothing was executed yet"
    executor(x, t)
    text = executor.explain()
    lines = text.splitlines()
    plan = executor.plan(2, 3, 7, 8)
    assert lines[0].startswith(f"{executor.count} operations in float32, channels_last: ")
    assert len(plan.steps) == executor.count < len(lines)
    for line in (
        "convolution       input_blocks.1.0.in_layers.2        (2, 32, 7, 8)  norm silu +add",
        "pool              input_blocks.2.0                    (2, 32, 4, 4)",
        "upsample          output_blocks.1.2                   (2, 64, 7, 8)",
        "convolution       output_blocks.3.0.skip_connection   (2, 32, 7, 8)  concat",
        "copies between layers, of layout or dtype: 0",
    ):
        assert line in text, line


def test_transformed_weights_are_bounded(monkeypatch):
    """Without AMX: of a large network the first layers take Winograd's algorithm alone."""
    library = lowering.native.library()
    serves = type("", (), {"convolution_panels": library.convolution_panels})
    serves.convolution_pays = staticmethod(lambda products: False)
    monkeypatch.setattr(lowering.native, "library", lambda: serves)

    def of(name):
        plan, _ = of_preset(name, n=8)
        weights = [w for w in plan.weights if w.form == "packed"]
        sizes = {
            w: library.convolution_panels(int(w.products), *w.layers[0].weight.shape[:2], 9)
            for w in weights
            if w.products in (Products.WINOGRAD2, Products.WINOGRAD4)
        }
        threes = [w for w in weights if w.layers[0].kernel_size == (3, 3)]
        return sum(sizes.values()), len(sizes), len(threes)

    total, transformed, threes = of("ddpm-cifar10")
    assert transformed == threes - 3 and total < lowering.MOST_TRANSFORMED  # but for the strided
    total, transformed, threes = of("iddpm-imagenet64")
    assert 0 < transformed < threes - 3 and total <= lowering.MOST_TRANSFORMED


def test_doublings_are_folded_where_results_are_large():
    def folded(n):
        plan, _ = of_preset("ddpm-cifar10", n, torch.bfloat16)
        return [step.reads[1].weight.doubled for step in plan.steps if "upsample" in step.options]

    assert folded(1) == folded(8) == [None, 1, 1]
    model = small_unet()
    x, t, y = batch(model, 16, 16, n=4)
    for exact in (False, True):
        executor = Executor(model, exact=exact)
        plan = executor.plan(*x.shape)
        assert any(weight.doubled == 1 for weight in plan.weights)
        with torch.no_grad():
            found, expected = executor(x, t, y), model(x, t, y)
        assert (found - expected).abs().max() < 3e-4 * expected.abs().max()
