"""Samplers, pipelines and diffusion objects of other codebases on programs: the same samples."""

import copy
import pickle

import diffusers
import pytest
import torch

import fastdiff
from diffusers_format_tools import TINY, theirs
from fastdiff.errors import InputError
from fastdiff.integrations.diffusers import accelerate_pipeline
from fastdiff.integrations.improved_diffusion import accelerate
from fastdiff.sampling.network import execution
from fastdiff.sampling.sampler import Sampler
from improved_diffusion_tools import CODEBASES
from published_unet import Guided, Improved, small
from sampler_tools import diffusion
from thread_tools import at_once

PROCESS = diffusion(20)
SHAPE = (2, 3, 8, 8)
ON_PROGRAM = "; the network as a program of"


def calm(**options):
    """With answers so small that rounding is not amplified from step to step."""
    model = theirs(TINY | options)
    with torch.no_grad():
        for parameter in model.conv_out.parameters():
            parameter.mul_(0.1)
    return model


def samplers(model, **options):
    options = {"steps": 3, "method": "ddim", **options}
    return [Sampler(model, PROCESS, executor=executor, **options) for executor in (False, True)]


def assert_same(model, most=1e-3, inputs=None, **options):
    stock, ours = samplers(model, **options)
    expected, found = (s.sample(SHAPE, seed=1, **(inputs or {})) for s in (stock, ours))
    assert ON_PROGRAM in ours.explain()
    assert (found - expected).abs().max() < most
    return ours


# --- Samplers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [calm, lambda: small(Improved), lambda: small(Guided)])
@pytest.mark.parametrize("dtype, most", [(None, 1e-3), (torch.bfloat16, 0.1)])
def test_the_samples_are_the_same(make, dtype, most):
    assert_same(make(), dtype=dtype, most=most)


def test_labels_and_guidance():
    inputs = {"model_kwargs": {"class_labels": torch.tensor([0, 2])}}
    assert_same(calm(num_class_embeds=3), inputs=inputs)
    model = small(Guided, num_classes=3, use_scale_shift_norm=True)
    assert_same(model, inputs={"model_kwargs": {"y": torch.tensor([0, 2])}})


def test_a_network_inside_of_a_function():
    model = calm()
    assert_same(lambda x, t: model(x, t[0]).sample)
    assert_same(lambda x, t: model(x, t, return_dict=False)[0] * 0.9)


@pytest.mark.seconds
@pytest.mark.parametrize("make", [calm, lambda: small(Guided, resblock_updown=True)])
def test_an_accelerated_network(make):
    model = make()
    sampler = assert_same(model)
    expected = sampler.sample(SHAPE)
    fastdiff.accelerate(model, channels_last=True)
    assert (sampler.sample(SHAPE) - expected).abs().max() < 1e-3 and ON_PROGRAM in sampler.explain()
    assert_same(model)
    fastdiff.restore(model)
    assert (sampler.sample(SHAPE) - expected).abs().max() < 1e-3 and ON_PROGRAM in sampler.explain()


def snapshot(model):
    """All that a call could leave in a network."""
    tensors = [(name, p.data_ptr(), p._version, p.dtype) for name, p in model.named_parameters()]
    return tensors, [(type(m), m.training, dict(vars(m))) for m in model.modules()]


@pytest.mark.parametrize("make", [calm, lambda: small(Improved)])
def test_the_network_is_left_as_it_is(make):
    model = make().train()
    before, state = snapshot(model), torch.get_rng_state()
    assert_same(model)
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), state)


def test_changed_weights_are_seen():
    model = calm()
    stock, ours = samplers(model)
    before = ours.sample(SHAPE)
    average = {name: 1.1 * tensor for name, tensor in model.state_dict().items()}
    to_q = model.mid_block.attentions[0].to_q

    def in_place():
        to_q.weight.data.mul_(30)

    def exchange():
        torch.manual_seed(2)
        model.conv_in = torch.nn.Conv2d(3, 8, 3, padding=1)

    def averaged():
        model.load_state_dict(average, assign=True)

    def train():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(SHAPE), torch.tensor([3, 5])).sample.square().sum().backward()
        optimizer.step()

    for change in (in_place, exchange, averaged, train):
        change()
        found = ours.sample(SHAPE)
        with torch.no_grad():
            assert (found - stock.sample(SHAPE)).abs().max() < 1e-3, change
        assert (found - before).abs().max() > 1e-4, change
        before = found
    assert ON_PROGRAM in ours.explain()


@pytest.mark.parametrize("make", [calm, lambda: small(Improved)])
def test_a_hook_brings_the_modules_back(make, monkeypatch):
    monkeypatch.setattr(execution, "slower", lambda dtype: "")
    model, seen = make(), []
    sampler = Sampler(model, PROCESS, steps=3, method="ddim")
    expected = sampler.sample(SHAPE)
    assert ON_PROGRAM in sampler.explain()
    part = next(model.children())
    handle = part.register_forward_hook(lambda *_: seen.append(1))
    found = sampler.sample(SHAPE)
    assert len(seen) == 3 and "has a hook" in sampler.explain()
    assert (found - expected).abs().max() < 1e-3
    handle.remove()
    assert torch.equal(sampler.sample(SHAPE), expected) and ON_PROGRAM in sampler.explain()


def test_what_its_own_forward_answers():
    model = calm()
    ours = samplers(model)[1]
    with pytest.raises(ValueError, match="class_embedding needs to be initialized"):
        ours.sample(SHAPE, model_kwargs={"class_labels": torch.zeros(2).long()})
    assert ours.explain().endswith("as it is: its program is not for such arguments")
    stock, ours = samplers(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.sample(SHAPE), stock.sample(SHAPE))
    assert ours.explain().endswith("as it is: it is under the caller's autocast")


def test_who_insists_on_a_program_is_told_why_there_is_none():
    model = theirs(TINY | {"act_fn": "gelu"})
    with pytest.raises(InputError) as caught:
        samplers(model)[1].sample(SHAPE)
    assert str(caught.value) == (
        "executor=True: act_fn='gelu'; fastdiff's U-Net needs 'silu' or 'swish'; "
        "take executor='auto' or False"
    )


def test_threads_share_a_network():
    model = calm()
    several = [Sampler(model, PROCESS, steps=3, executor=True) for _ in range(2)]
    expected = [several[0].sample(SHAPE, seed=seed) for seed in range(4)]
    found = at_once(*(lambda s=seed: several[s % 2].sample(SHAPE, seed=s) for seed in range(4)))
    assert all(map(torch.equal, found, expected))


@pytest.mark.seconds
def test_copies_and_pickles_hold_nothing_of_a_program():
    model = calm()
    assert_same(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(twin)


# --- Pipelines ------------------------------------------------------------------------------------

KINDS = {
    "ddpm": (diffusers.DDPMPipeline, diffusers.DDPMScheduler),
    "ddim": (diffusers.DDIMPipeline, diffusers.DDIMScheduler),
}


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    options = {"batch_size": 2, "num_inference_steps": 5, "output_type": "pt"}
    return torch.as_tensor(pipe(generator=generator, **options).images)


@pytest.mark.parametrize(
    "kind, variance", [("ddpm", None), ("ddpm", "learned_range"), ("ddim", None)]
)
def test_pipelines(kind, variance):
    pipeline, scheduler = KINDS[kind]
    options = {} if variance is None else {"variance_type": variance}
    model = calm(out_channels=3 if variance is None else 6)
    stock, pipe = (pipeline(model, scheduler(beta_end=0.004, **options)) for _ in range(2))
    expected = images(stock)
    found = images(accelerate_pipeline(pipe, executor=True))
    assert ON_PROGRAM in pipe.explain()
    assert (found - expected).abs().max() < 1e-3


# --- improved-diffusion's loops -------------------------------------------------------------------


@pytest.mark.seconds
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("name, kind", [("improved", Improved), ("guided", Guided)])
def test_published_loops(loop, name, kind):
    model = small(kind, out_channels=6, num_classes=3, use_scale_shift_norm=True)
    stock = CODEBASES[name].diffusion(variance="LEARNED_RANGE")
    kwargs = {"model_kwargs": {"y": torch.tensor([0, 2])}}
    ours = accelerate(stock, executor=True)
    drawn = []
    for each in (stock, ours):
        torch.manual_seed(0)
        with torch.no_grad():
            drawn.append(getattr(each, loop)(model, SHAPE, **kwargs))
    assert (drawn[0] - drawn[1]).abs().max() < 1e-3
    (sampler,) = vars(model)["_fastdiff_samplers"].kept.values()
    assert ON_PROGRAM in sampler.explain()
