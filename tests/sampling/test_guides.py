"""A guide's answers in place of the unconditional ones, and rescaled guidance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import InputError
from fastdiff.methods.registry import METHODS
from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, Tiny, closed_form, diffusion


def weaker(doubled=False):
    inner = closed_form(doubled)
    return lambda x, t, **kwargs: 0.7 * inner(0.9 * x, t) + 0.05


def rescaled(conditional, guided, share):
    """Lin et al. 2023, eq. 15 and 16."""
    factor = conditional.flatten(1).std(1) / guided.flatten(1).std(1)
    return guided * (share * factor + 1 - share).view(-1, 1, 1, 1)


@given(
    method=st.sampled_from(list(METHODS)),
    var_type=st.sampled_from(["fixed_small", "learned_range"]),
    scale=st.sampled_from([0.4, 1.0, 2.5]),
    share=st.sampled_from([0.0, 0.7, 1.0]),
    threshold=st.sampled_from([None, 0.9]),
    steps=st.integers(2, 6),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=40, deadline=None)
def test_a_guide_is_a_network_that_mixes_both(
    method, var_type, scale, share, threshold, steps, seed
):
    process = diffusion(40, var_type=var_type)
    doubled = process.learns_variance
    model, guide = closed_form(doubled), weaker(doubled)

    def mixed(x, t):
        conditional, unconditional = (f(x, t)[:, :2] for f in (model, guide))
        guided = unconditional + scale * (conditional - unconditional)
        if share:
            guided = rescaled(conditional, guided, share)
        return torch.cat([guided, model(x, t)[:, 2:]], dim=1)

    options = {"steps": steps, "method": method, "dynamic_threshold": threshold}
    guidance = {"guide": guide, "guidance_scale": scale, "guidance_rescale": share}
    found = Sampler(model, process, **options, **guidance).sample(SHAPE, seed=seed)
    wanted = Sampler(mixed, process, **options).sample(SHAPE, seed=seed)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_the_models_own_null_class_is_the_guide_that_it_is(share):
    """Guidance by two halves of a batch, and by the same network as its own guide."""
    torch.manual_seed(0)
    model, process = Tiny(), diffusion(20)
    labels = torch.tensor([0, 1, 2])
    options = {"steps": 5, "guidance_scale": 2.0, "guidance_rescale": share}
    halves = Sampler(model, process, **options)
    guided = Sampler(model, process, guide=model, **options)
    given = {"seed": 3, "model_kwargs": {"y": labels}}
    null = {"y": torch.full_like(labels, model.null_label)}
    torch.testing.assert_close(
        guided.sample(SHAPE, **given, uncond_kwargs=null),
        halves.sample(SHAPE, **given),
        rtol=1e-5,
        atol=1e-5,
    )
    # Without other arguments it is given the model's, and so guides nowhere.
    plain = Sampler(model, process, steps=5).sample(SHAPE, **given)
    torch.testing.assert_close(guided.sample(SHAPE, **given), plain, rtol=1e-5, atol=1e-5)


def test_guidance_rescaled_in_two_halves():
    model, process = closed_form(), diffusion(30)

    def with_w(x, t, w):
        return model(x, t) * (1 + w.view(-1, 1, 1, 1))

    w = torch.linspace(0.1, 0.3, 3)

    def mixed(x, t):
        conditional, unconditional = with_w(x, t, w), model(x, t)
        guided = unconditional + 3.0 * (conditional - unconditional)
        return rescaled(conditional, guided, 0.7)

    sampler = Sampler(
        with_w, process, steps=6, method="ddim", guidance_scale=3.0, guidance_rescale=0.7
    )
    kwargs = {"model_kwargs": {"w": w}, "uncond_kwargs": {"w": torch.zeros(3)}}
    found = sampler.sample(SHAPE, seed=1, **kwargs)
    wanted = Sampler(mixed, process, steps=6, method="ddim").sample(SHAPE, seed=1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # A sample's factor is its own: the same in any batch.
    alone = {"model_kwargs": {"w": w[1:2]}, "uncond_kwargs": {"w": torch.zeros(1)}}
    again = sampler.sample((1, *SHAPE[1:]), seed=1, first_sample=1, **alone)
    torch.testing.assert_close(again[0], found[1], rtol=1e-5, atol=1e-5)


def test_an_output_without_spread_is_left_as_it_is():
    sampler = Sampler(
        lambda x, t: torch.zeros_like(x),
        diffusion(20),
        steps=4,
        guide=lambda x, t: torch.zeros_like(x),
        guidance_scale=2.0,
        guidance_rescale=1.0,
    )
    assert sampler.sample(SHAPE, seed=0).isfinite().all()


def test_outside_of_the_interval_the_guide_is_not_run():
    seen = []

    def guide(x, t):
        seen.append(float(t[0]))
        return 0.5 * x

    process = diffusion(20)
    options = {"steps": 5, "guidance_scale": 2.0, "guidance_interval": (4, 12)}
    sampler = Sampler(closed_form(), process, guide=guide, **options)
    sampler.sample(SHAPE, seed=0)
    timesteps = sampler.table.timesteps.tolist()
    assert seen == [t for t in timesteps if 4 <= t <= 12] and len(seen) < len(timesteps)


def test_weights_of_a_guide_are_read_anew_and_its_mode_is_left():
    torch.manual_seed(0)
    model, guide = Tiny(), Tiny()
    sampler = Sampler(model, diffusion(20), steps=3, guide=guide, guidance_scale=2.0)
    before = sampler.sample(SHAPE, seed=1)
    assert guide.training and model.training
    with torch.no_grad():
        guide.conv.weight.mul_(0.5)
    after = sampler.sample(SHAPE, seed=1)
    assert not torch.equal(before, after)
    fresh = Sampler(model, diffusion(20), steps=3, guide=guide, guidance_scale=2.0)
    assert torch.equal(fresh.sample(SHAPE, seed=1), after)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guide": closed_form()}, "guide belongs to guidance; give guidance_scale too"),
        ({"guide": 3, "guidance_scale": 2.0}, "guide is a int; expected a module or a function"),
        ({"guidance_rescale": 0.5}, "guidance_rescale belongs to guidance; give guidance_scale"),
        (
            {"guidance_scale": 2.0, "guidance_rescale": 1.5},
            "guidance_rescale is 1.5; expected a share in 0 … 1",
        ),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        Sampler(closed_form(), diffusion(20), **options)


def test_a_guide_of_another_shape_is_named():
    sampler = Sampler(closed_form(), diffusion(20), guide=lambda x, t: x[:, :1], guidance_scale=2.0)
    with pytest.raises(InputError, match=r"unconditional.*\(3, 1, 4, 4\)"):
        sampler.sample(SHAPE)
