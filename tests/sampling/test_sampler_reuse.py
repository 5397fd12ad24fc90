"""Rows that run a part of the network: as the forward cut in two would, in any batch and graph."""

import itertools

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from capture_tools import taped
from diffusers_format_tools import TINY, theirs
from fake_cuda import faked
from fastdiff.errors import InputError
from fastdiff.methods.table import StepTable
from fastdiff.models.execution import executor as executor_module
from fastdiff.models.execution.lowering_cuda import CudaLowering
from fastdiff.process.edm import EDM
from fastdiff.sampling.reuse import Reuse
from fastdiff.sampling.sampler import Sampler
from published_unet import Guided, Improved, small
from sampler_tools import Tiny, diffusion
from thread_tools import at_once
from unet_tools import small_unet

PROCESS = diffusion(20)
SHAPE = (2, 3, 8, 8)
LABELS = {"y": torch.tensor([0, 2])}
EVERY = Reuse(tuple(range(7)), depth=1)  # rows that run whole, but could be cut


def calm_unet(**options):
    """A network with answers so small that its rounding is not amplified from step to step."""
    model = small_unet(**options)
    with torch.no_grad():
        for parameter in model.out[2].parameters():
            parameter.mul_(0.1)
    return model


def sampler_of(model, **options):
    return Sampler(model, PROCESS, **{"steps": 7, "method": "ddim", **options})


def with_classes():
    return calm_unet(num_classes=3, null_class=True)


class ByHand:
    """The forward cut in two: whole at every ``n``-th call, at others on the deep value of before.
    Under guidance of ``scale``, the unconditional half runs at every ``m``-th call."""

    def __init__(self, model, n=1, depth=1, scale=None, m=1):
        self.model, self.n, self.m, self.depth, self.scale = model, n, m, depth, scale
        self.calls, self.deep, self.difference = 0, None, None

    def __call__(self, x, t, y=None):
        both, count = self.scale is not None and self.calls % self.m == 0, len(x)
        if both:
            null = torch.full_like(y, self.model.null_label)
            x, t, y = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])
        deep = None if self.calls % self.n == 0 else self.deep[: len(x)]
        output, made = self.model.forward_cut(x, t, y, depth=self.depth, deep=deep)
        if deep is None:
            old = made[:0] if self.deep is None else self.deep[len(made) :]
            self.deep = torch.cat([made, old])
        self.calls += 1
        if self.scale is None:
            return output
        if both:
            output, other = output[:count], output[count:]
            self.difference = output - other
        return output + (self.scale - 1) * self.difference


# --- What the rows compute ----------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("method", ["ddim", "ddpm", "dpmsolver++"])
def test_the_samples_are_those_of_the_forward_cut_by_hand(n, depth, method):
    model = calm_unet()
    ours = sampler_of(model, method=method, reuse=Reuse(n, depth))
    by_hand = sampler_of(ByHand(model, n, depth), method=method, executor=False)
    plain = sampler_of(model, method=method, executor=True)
    found, expected, other = (s.sample(SHAPE, seed=1) for s in (ours, by_hand, plain))
    assert (found - expected).abs().max() < 1e-4
    assert (found - other).abs().max() > 1e-3
    assert ours.explain().endswith(f"operations, cut at depth {depth}")


@pytest.mark.parametrize("n, m", [(3, 1), (1, 2), (2, 3), (3, 2), (2, 2)])
def test_guidance_by_hand(n, m):
    model = with_classes()
    reuse = {"reuse": Reuse(n, 1), "guidance_reuse": m}
    ours = sampler_of(model, guidance_scale=2.0, **reuse)
    by_hand = sampler_of(ByHand(model, n, 1, 2.0, m), executor=False)
    plain = sampler_of(model, guidance_scale=2.0)
    found, expected, other = (
        s.sample(SHAPE, seed=1, model_kwargs=LABELS) for s in (ours, by_hand, plain)
    )
    assert (found - expected).abs().max() < 1e-3
    assert (found - other).abs().max() > 3e-3


@pytest.mark.parametrize("reuse", [None, 1, EVERY])
@pytest.mark.parametrize("guidance", [None, 1, range(7)])
def test_where_all_rows_run_whole_nothing_changes(reuse, guidance):
    options = {"guidance_scale": 2.0, "executor": True}
    plain = sampler_of(with_classes(), **options)
    ours = sampler_of(with_classes(), **options, reuse=reuse, guidance_reuse=guidance)
    expected, found = (s.sample(SHAPE, seed=1, model_kwargs=LABELS) for s in (plain, ours))
    assert torch.equal(found, expected)


def test_guidance_that_begins_or_ends_runs_whole():
    model = with_classes()
    interval = {"guidance_scale": 2.0, "guidance_interval": (5, 12)}
    ours = sampler_of(model, **interval, reuse=Reuse((0,), 1), guidance_reuse=7, steps=20)
    seen = []
    run = ours.network.replica  # what the network is called with, row by row
    original = type(run).__call__

    def watched(self, x, t, **kwargs):
        seen.append((int(t[0]), len(x)))
        return original(self, x, t, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run), "__call__", watched)
        ours.sample(SHAPE, model_kwargs=LABELS)
    assert [t for t, n in seen if n == 4] == [12, 5]  # where guidance begins, and row 14
    assert len(seen) == 20


def test_learned_variances_and_samples_near_those_of_all_rows():
    model = calm_unet(num_classes=3, null_class=True, out_channels=6)
    process = diffusion(40, var_type="learned_range")
    options = {"steps": 20, "method": "ddpm", "guidance_scale": 1.5}
    expected, near, far = (
        Sampler(model, process, **options, **reuse).sample(SHAPE, seed=1, model_kwargs=LABELS)
        for reuse in ({}, {"reuse": 2, "guidance_reuse": 2}, {"reuse": 20, "guidance_reuse": 20})
    )
    assert 0 < (near - expected).square().mean() < (far - expected).square().mean()


def test_an_image_to_image_call_takes_the_tables_rows():
    model, image = calm_unet(), torch.rand(SHAPE) * 2 - 1
    by_list = sampler_of(model, steps=10, reuse=Reuse((0, 7), 1))
    found = by_list.sample(SHAPE, image=image, strength=0.5)
    by_hand = sampler_of(ByHand(model), steps=10, executor=False)
    by_hand.model.n = 2  # rows 5, 7 and 9
    expected = by_hand.sample(SHAPE, image=image, strength=0.5)
    by_every = sampler_of(model, steps=10, reuse=Reuse((0, 7, 9), 1))
    assert (by_every.sample(SHAPE, image=image, strength=0.5) - expected).abs().max() < 1e-4
    assert (found - expected).abs().max() > 1e-4  # row 9 is not whole


@pytest.mark.parametrize("kind", [Improved, Guided, UNet2DModel])
def test_another_codebases_network(kind):
    model = theirs(TINY) if kind is UNet2DModel else small(kind)
    ours, whole = (sampler_of(model, reuse=reuse) for reuse in (Reuse(2, 1), EVERY))
    plain = sampler_of(model, executor=True)
    assert torch.equal(whole.sample(SHAPE), plain.sample(SHAPE))
    apart = (ours.sample(SHAPE) - plain.sample(SHAPE)).abs().max()
    assert apart > 1e-4 and "cut at depth 1" in ours.explain()


def test_a_network_inside_of_another():
    unet = calm_unet()
    expected = Sampler(unet, EDM(20), steps=4, method="ddim", reuse=Reuse(2, 1)).sample(SHAPE)
    wrapped = Sampler(lambda x, t: unet(x, t), EDM(20), steps=4, method="ddim", reuse=Reuse(2, 1))
    assert torch.equal(wrapped.sample(SHAPE), expected)


# --- Whose features they are --------------------------------------------------------------------

BOTH = {"guidance_scale": 2.0, "reuse": Reuse(2, 1), "guidance_reuse": 3}


@pytest.mark.parametrize("guided", [False, True])
def test_a_sample_is_the_same_in_any_batch(guided):
    sampler = sampler_of(with_classes(), **BOTH) if guided else sampler_of(calm_unet(), reuse=2)
    shape, y = (5, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    together = sampler.sample(shape, seed=3, model_kwargs={"y": y} if guided else {})
    for first, count in ((0, 2), (2, 3), (4, 1)):
        own = slice(first, first + count)
        labels = {"y": y[own]} if guided else {}
        counted = {"seed": 3, "first_sample": first}
        alone = sampler.sample((count, *shape[1:]), model_kwargs=labels, **counted)
        # A product of the labels' embeddings rounds otherwise for another batch, reuse or not.
        assert (alone - together[own]).abs().max() <= (1e-2 if guided else 0)


def two_iterations(sampler, inputs):
    """Two calls whose rows take turns, and each alone."""
    alone = [sampler.sample(SHAPE, seed=seed, **inputs) for seed in (1, 2)]
    calls = [sampler.iterate(SHAPE, seed=seed, **inputs) for seed in (1, 2)]
    next(calls[0])  # one is a row ahead
    ended = [None, None]
    for steps in itertools.zip_longest(*calls):
        for i, step in enumerate(steps):
            ended[i] = step["sample"] if step else ended[i]
    return alone, ended


def test_features_belong_to_the_call():
    sampler = sampler_of(with_classes(), **BOTH)
    assert all(map(torch.equal, *two_iterations(sampler, {"model_kwargs": LABELS})))
    found = at_once(
        *(lambda s=s: sampler.sample(SHAPE, seed=s, model_kwargs=LABELS) for s in (1, 2))
    )
    assert all(map(torch.equal, found, two_iterations(sampler, {"model_kwargs": LABELS})[0]))


@torch.no_grad()
def test_weights_are_live_between_calls():
    model = calm_unet()
    sampler = sampler_of(model, reuse=Reuse(3, 1))
    before = sampler.sample(SHAPE)
    model.middle_block[0].in_layers[2].weight.data.mul_(3)
    found = sampler.sample(SHAPE)
    assert torch.equal(found, sampler_of(model, reuse=Reuse(3, 1)).sample(SHAPE))
    assert (found - before).abs().max() > 1e-4


def test_what_is_reused_can_be_configured():
    model = with_classes()
    sampler = sampler_of(model, guidance_scale=2.0, executor=True)
    plain = sampler.sample(SHAPE, model_kwargs=LABELS)
    cut = sampler.configure(reuse=Reuse(2, 1), guidance_reuse=3).sample(SHAPE, model_kwargs=LABELS)
    assert torch.equal(cut, sampler_of(model, **BOTH).sample(SHAPE, model_kwargs=LABELS))
    sampler.configure(reuse=None, guidance_reuse=None)
    with pytest.raises(InputError, match="reuse and executor=False or compile exclude"):
        sampler_of(model, executor=False).configure(reuse=2)
    assert torch.equal(sampler.sample(SHAPE, model_kwargs=LABELS), plain)


# --- Captured -----------------------------------------------------------------------------------


@pytest.fixture
def for_gpus(monkeypatch):
    monkeypatch.setitem(executor_module.LOWERINGS, "cpu", CudaLowering)


class Shifted(nn.Module):
    """A network with a condition that is not looked at on the host, as labels on a CPU are."""

    def __init__(self):
        super().__init__()
        self.inner = calm_unet()

    def forward(self, x, t, shift):
        return self.inner(x + shift, t)


SHIFTS = {
    "model_kwargs": {"shift": torch.linspace(-0.5, 0.5, 2).reshape(2, 1, 1, 1)},
    "uncond_kwargs": {"shift": torch.zeros(2, 1, 1, 1)},
}


@pytest.mark.parametrize(
    "reuse, count",
    [
        ({"reuse": Reuse(3, 1)}, 2),
        ({"guidance_reuse": 2}, 2),
        ({"reuse": Reuse(2, 1), "guidance_reuse": 3}, 4),
    ],
)
def test_captured_rows_are_the_eager_ones(reuse, count, for_gpus):
    options = {"guidance_scale": 2.0, "executor": True, **reuse}
    with taped() as graphs:
        eager, captured = (
            sampler_of(Shifted(), capture=capture, **options) for capture in (False, True)
        )
        for seed in (1, 2):
            found, expected = (s.sample(SHAPE, seed=seed, **SHIFTS) for s in (captured, eager))
            assert torch.equal(found, expected)
        assert graphs() == count
        assert captured.explain().startswith("a captured CUDA graph")
        assert all(map(torch.equal, *two_iterations(captured, SHIFTS)))
        captured.configure(steps=5)
        eager.configure(steps=5)
        found, expected = (s.sample(SHAPE, **SHIFTS) for s in (captured, eager))
        assert torch.equal(found, expected)
        assert graphs() == count


def test_captured_as_cuda_does(for_gpus):
    options = {"guidance_scale": 2.0, "guidance_interval": (4, 15), "reuse": Reuse(2, 1)}
    with faked() as cuda:
        eager, captured = (
            sampler_of(Shifted(), capture=capture, **options, guidance_reuse=2)
            for capture in (False, True)
        )
        found, expected = (s.sample(SHAPE, **SHIFTS) for s in (captured, eager))
        assert torch.equal(found, expected)
        kept = captured.sample(SHAPE, **SHIFTS)
        assert torch.equal(kept, expected)
        steps = captured._graphs.steps.values()
        assert len(cuda.graphs) == sum(len(step.graphs) for step in steps) >= 4


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reuse": 0}, "reuse is 0; expected an integer, 1 or more"),
        ({"reuse": "3"}, "reuse is '3'; expected an integer, 1 or more"),
        ({"reuse": True}, "reuse is True; expected an integer"),
        ({"reuse": [0, 2.5]}, "a row of reuse is 2.5; expected an integer, 0 or more"),
        ({"reuse": [0, 4, 4]}, r"reuse has rows \[0, 4, 4\]; expected each once, ascending"),
        ({"guidance_reuse": 2}, "guidance_reuse belongs to guidance; give guidance_scale too"),
        ({"reuse": 3, "compile": True}, "reuse and executor=False or compile exclude each other"),
        ({"reuse": 3, "executor": False}, "reuse and executor=False or compile exclude each other"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        sampler_of(calm_unet(), **options)


def hooked():
    model = calm_unet()
    model.out[2].register_forward_hook(lambda *_: None)
    return model


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = calm_unet()

    def forward(self, x, t):
        return self.inner(x, t) + self.inner(x, t)


class Pair(Twice):
    def __init__(self):
        super().__init__()
        self.other = calm_unet()


@pytest.mark.parametrize(
    "model, options, message",
    [
        (Tiny(3), {}, "reuse needs a program of a U-Net: the model has no U-Net that is known"),
        (hooked(), {}, "reuse needs a program of a U-Net: out.2 has a hook"),
        (calm_unet(), {"dtype": torch.float16}, "its weights are float32, to be run in float16"),
        (calm_unet(), {"reuse": Reuse(2, 9)}, "depth is 9; expected 1 … 4, as the U-Net's input"),
        (calm_unet().forward, {}, "reuse: at a step its forward was called by itself"),
        (Twice(), {}, "reuse: at a step the U-Net ran 2 times"),
        (Pair(), {}, "reuse is of one U-Net; the model has 2"),
        (calm_unet(), {"reuse": [0, 7]}, "row 7 is to run whole; the table has rows 0 … 6"),
    ],
)
def test_a_network_that_cannot_be_cut(model, options, message):
    sampler = sampler_of(model, **{"reuse": 2, **options})
    with pytest.raises(InputError, match=message):
        sampler.sample(SHAPE)


def test_a_network_that_becomes_one_that_cannot_be_cut():
    model = calm_unet()

    def hook(step):
        model.middle_block[1].register_forward_hook(lambda *_: None)

    with pytest.raises(InputError, match="reuse needs a program of a U-Net: middle_block.1 has a"):
        sampler_of(model, reuse=2).sample(SHAPE, callback=hook)


def test_a_call_under_autocast():
    with pytest.raises(InputError, match="reuse needs a program .* the caller's autocast"):
        with torch.autocast("cpu", torch.bfloat16):
            sampler_of(calm_unet(), reuse=2).sample(SHAPE)


def test_a_table_of_ones_own():
    process = diffusion(6)
    table = StepTable.from_process(process, method="ddim", clip_denoised=True)
    model = calm_unet()
    ours = Sampler(model, table, reuse=Reuse(2, 1))
    expected = Sampler(model, process, method="ddim", reuse=Reuse(2, 1))
    x = torch.randn(SHAPE)
    assert torch.equal(ours.sample(SHAPE, noise=x), expected.sample(SHAPE, noise=x))
