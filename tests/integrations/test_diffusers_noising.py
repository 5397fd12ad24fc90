"""add_noise and get_velocity: diffusers' results in float32 and float64, the right ones below."""

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import InputError
from scheduler_tools import SHAPE, check_equal, draw, pair

BY_TIMESTEP = (diffusers.DDPMScheduler, diffusers.DDIMScheduler)
MULTISTEP = diffusers.DPMSolverMultistepScheduler
BY_INDEX = (MULTISTEP, diffusers.UniPCMultistepScheduler, diffusers.DEISMultistepScheduler)
METHODS = [(stock, "add_noise") for stock in (*BY_TIMESTEP, diffusers.PNDMScheduler, *BY_INDEX)]
METHODS += [(stock, "get_velocity") for stock in BY_TIMESTEP]
every_method = pytest.mark.parametrize("stock, method", METHODS)


@every_method
@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(-1, 999), min_size=SHAPE[0], max_size=SHAPE[0]),
    st.sampled_from(["linear", "squaredcos_cap_v2"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(["batch", "one timestep", "0-dim", "one sample", "one noise", "int32"]),
)
def test_as_in_diffusers(stock, method, timesteps, beta_schedule, dtype, form):
    t = torch.tensor(timesteps)
    sample, noise = draw(1, dtype=dtype), draw(2, dtype=dtype)
    if form == "one timestep":
        t = t[:1]
    elif form == "0-dim" and stock not in BY_INDEX:
        t = t[0]
    elif form == "int32":
        t = t.int()
    elif form == "one sample":
        sample = sample[:1]
    elif form == "one noise":
        noise = noise[:1]
    theirs, mine = pair(stock, beta_schedule=beta_schedule)
    expected, actual = (getattr(s, method)(sample, noise, t) for s in (theirs, mine))
    check_equal([actual], [expected], sample)


@pytest.mark.parametrize("sigmas", [None, "use_karras_sigmas", "use_flow_sigmas"])
@pytest.mark.parametrize("begin, steps_taken", [(None, 0), (3, 0), (3, 2)])
def test_noise_of_a_multistep_schedule(sigmas, begin, steps_taken):
    """With timesteps that occur twice (Karras's, rounded) and some that do not occur."""
    theirs, mine = pair(MULTISTEP, **({sigmas: True} if sigmas else {}))
    results = []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(200)
        if begin is not None:
            scheduler.set_begin_index(begin)
        for t in scheduler.timesteps[3 : 3 + steps_taken]:
            scheduler.step(draw(3), t, draw(4))
        twice = len(scheduler.timesteps.unique()) < len(scheduler.timesteps)
        assert twice == (sigmas == "use_karras_sigmas")
        t = torch.cat([scheduler.timesteps, torch.tensor([998, 1])])
        shape = (len(t), *SHAPE[1:])
        results.append(scheduler.add_noise(draw(1, shape), draw(2, shape), t))
    check_equal([results[1]], [results[0]], results[0])


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(stock, method, dtype):
    """Within half an ulp of float64 at every timestep; diffusers adds no noise at early ones."""
    theirs, mine = pair(stock)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(1000)
    t = mine.timesteps
    sample, noise = (draw(seed, (len(t), 2, 4), dtype) for seed in (1, 2))
    exact = getattr(theirs, method)(sample.double(), noise.double(), t)
    result = getattr(mine, method)(sample, noise, t)
    assert result.dtype == dtype
    error = (result.double() - exact).abs()
    half_ulp = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
    assert bool((error <= half_ulp + 1e-5).all())
    if dtype == torch.bfloat16 and stock not in BY_INDEX and method == "add_noise":
        early = t < 10
        assert torch.equal(theirs.add_noise(sample, noise, t)[early], sample[early])
        assert not (result[early] == sample[early]).flatten(1).all(1).any()


@every_method
def test_gradients_and_mixed_dtypes(stock, method):
    gradients, dtypes = [], []
    for scheduler in pair(stock):
        sample, noise = draw(1).requires_grad_(), draw(2).requires_grad_()
        t = torch.tensor([999, 500])
        result = getattr(scheduler, method)(sample, noise, t)
        gradients.append(torch.autograd.grad(result.square().sum(), (sample, noise)))
        dtypes.append(getattr(scheduler, method)(sample.bfloat16(), noise, t).dtype)
    check_equal(gradients[1], gradients[0], draw(1))
    assert dtypes[1] == dtypes[0]


@pytest.mark.parametrize("stock", BY_TIMESTEP)
def test_a_timestep_out_of_range(stock):
    _, mine = pair(stock)
    with pytest.raises(InputError, match="0 … 999"):
        mine.add_noise(draw(1), draw(2), torch.tensor([1000, 3]))
