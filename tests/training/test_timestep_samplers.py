"""Uniform and importance-sampled timesteps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import InputError
from fastdiff.process.gaussian import create_diffusion
from fastdiff.training.timestep_samplers import (
    LossSecondMomentSampler,
    UniformSampler,
    create_timestep_sampler,
)


def warmed(losses, history=2, **kwargs):
    """A sampler whose timestep i has only ever seen losses[i]."""
    sampler = LossSecondMomentSampler(len(losses), history, **kwargs)
    for _ in range(history):
        sampler.update_with_losses(torch.arange(len(losses)), torch.tensor(losses))
    return sampler


def test_uniform_covers_every_timestep_with_weight_one():
    sampler = UniformSampler(create_diffusion(steps=50, timestep_respacing="7"))
    generator = torch.Generator().manual_seed(0)
    t, weights = sampler.sample(7000, "cpu", generator)
    assert t.dtype == torch.int64 and weights.dtype == torch.float32 and (weights == 1).all()
    counts = torch.bincount(t, minlength=7)
    assert len(counts) == 7 and (counts - 1000).abs().max() < 5 * math.sqrt(1000)
    assert torch.equal(sampler.sample(5, "cpu", generator.manual_seed(0))[0], t[:5])


def test_importance_sampling_is_uniform_until_every_timestep_has_ten_losses():
    sampler = LossSecondMomentSampler(4)
    ts, losses = torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    for _ in range(9):
        sampler.update_with_losses(ts, losses)
    sampler.update_with_losses(ts[:3], losses[:3])
    assert (sampler.weights() == 0.25).all()
    assert (sampler.sample(8, "cpu")[1] == 1).all()
    sampler.update_with_losses(ts[3:], losses[3:])
    expected = losses.double() / 10 * 0.999 + 0.001 / 4
    torch.testing.assert_close(sampler.weights(), expected)


def test_weights_are_the_root_of_the_mean_square():
    sampler = LossSecondMomentSampler(2, history_per_term=2, uniform_prob=0.0)
    sampler.update_with_losses(torch.tensor([0, 0, 1, 1]), torch.tensor([3.0, 4.0, 5.0, 5.0]))
    root = math.sqrt(12.5)
    expected = torch.tensor([root, 5.0], dtype=torch.float64) / (root + 5)
    torch.testing.assert_close(sampler.weights(), expected)


@pytest.mark.seconds
def test_draws_follow_the_weights_and_the_expected_loss_is_unchanged():
    losses = [0.5, 4.0, 1.0, 0.01, 2.5]
    sampler = warmed(losses)
    t, weights = sampler.sample(50_000, "cpu", torch.Generator().manual_seed(1))
    p = sampler.weights().numpy()
    frequencies = np.bincount(t.numpy(), minlength=5) / 50_000
    assert np.abs(frequencies - p).max() < 5 * math.sqrt(0.25 / 50_000)
    assert weights.numpy() == pytest.approx(1 / (5 * p[t.numpy()]), rel=1e-6)
    assert (weights * torch.tensor(losses)[t]).mean().item() == pytest.approx(
        np.mean(losses), rel=0.01
    )


class Published:
    """The published update, one loss after the other, oldest shifted out."""

    def __init__(self, timesteps, history):
        self.losses = [[] for _ in range(timesteps)]
        self.history = history

    def update(self, t, loss):
        self.losses[t] = [*self.losses[t], loss][-self.history :]


@pytest.mark.seconds
@settings(deadline=None)
@given(
    timesteps=st.integers(1, 5),
    history=st.integers(1, 4),
    batches=st.lists(st.lists(st.integers(0, 4), max_size=30), max_size=5),
    data=st.randoms(use_true_random=False),
)
def test_batched_updates_equal_one_loss_at_a_time(timesteps, history, batches, data):
    sampler, published = LossSecondMomentSampler(timesteps, history), Published(timesteps, history)
    for batch in batches:
        ts = [t % timesteps for t in batch]
        losses = [data.uniform(0.1, 2.0) for _ in ts]
        sampler.update_with_losses(
            torch.tensor(ts, dtype=torch.int64), torch.tensor(losses, dtype=torch.float64)
        )
        for t, loss in zip(ts, losses, strict=True):
            published.update(t, loss)
    for t, kept in enumerate(published.losses):
        stored = sampler.state_dict()["history"][t, : len(kept)]
        assert sorted(stored.tolist()) == sorted(kept)
    if all(len(kept) == history for kept in published.losses):
        p = np.array([np.sqrt(np.mean(np.square(kept))) for kept in published.losses])
        p = p / p.sum() * 0.999 + 0.001 / timesteps
        assert sampler.weights().numpy() == pytest.approx(p, rel=1e-12)
    else:
        assert (sampler.weights() == 1 / timesteps).all()


def test_no_slot_is_written_twice_in_one_update():
    sampler = LossSecondMomentSampler(4, history_per_term=3)
    sampler.update_with_losses(torch.tensor([0, 0, 2]), torch.ones(3))
    rows = torch.tensor([0] * 8 + [1] * 3 + [2] * 4 + [4] * 5)  # 4: dropped already
    kept, slots = sampler._slots(rows)
    written = [pair for pair in zip(kept.tolist(), slots.tolist(), strict=True) if pair[0] < 4]
    assert len(set(written)) == len(written) == 9
    assert kept.tolist() == [4] * 5 + [0] * 3 + [1] * 3 + [4] + [2] * 3 + [4] * 5


def test_losses_that_are_not_finite_are_left_out():
    sampler = warmed([1.0, 1.0])
    before = sampler.state_dict()
    sampler.update_with_losses(torch.tensor([0, 1]), torch.tensor([math.nan, math.inf]))
    for name, value in sampler.state_dict().items():
        assert torch.equal(value, before[name])


def test_zero_losses_fall_back_to_uniform():
    assert (warmed([0.0, 0.0, 0.0]).weights() == 1 / 3).all()


def test_a_saved_sampler_continues_exactly():
    sampler = warmed([1.0, 2.0, 3.0], history=4)
    sampler.update_with_losses(torch.tensor([1]), torch.tensor([7.0]))
    twin = LossSecondMomentSampler(3, 4)
    twin.load_state_dict({name: value.clone() for name, value in sampler.state_dict().items()})
    for one in (sampler, twin):
        one.update_with_losses(torch.tensor([1, 2]), torch.tensor([5.0, 6.0]))
    assert torch.equal(sampler.weights(), twin.weights())
    a = sampler.sample(32, "cpu", torch.Generator().manual_seed(2))[0]
    assert torch.equal(a, twin.sample(32, "cpu", torch.Generator().manual_seed(2))[0])
    uniform = UniformSampler(3)
    uniform.load_state_dict(uniform.state_dict())


def test_nothing_is_read_back_from_the_device():
    """Tensors on the meta device have no values: any read-back would raise."""
    sampler = LossSecondMomentSampler(20)
    t, weights = sampler.sample(8, "meta")
    sampler.update_with_losses(t, torch.empty(8, device="meta"))
    assert sampler.weights().device.type == weights.device.type == "meta"
    assert UniformSampler(20).sample(8, "meta")[0].device.type == "meta"


def test_losses_are_detached():
    sampler = LossSecondMomentSampler(3)
    sampler.update_with_losses(torch.tensor([0]), torch.ones(1, requires_grad=True) * 2)
    assert not sampler.weights().requires_grad


def test_samplers_by_name():
    diffusion = create_diffusion(steps=50)
    assert isinstance(create_timestep_sampler("uniform", diffusion), UniformSampler)
    sampler = create_timestep_sampler("loss-second-moment", diffusion)
    assert isinstance(sampler, LossSecondMomentSampler) and sampler.num_timesteps == 50
    assert sampler.history_per_term == 10 and sampler.uniform_prob == 0.001


BAD_CALLS = {
    "unknown timestep sampler 'importance': choose uniform or loss-second-moment": lambda: (
        create_timestep_sampler("importance", 10)
    ),
    "at least 1, got 0": lambda: UniformSampler(0),
    "a diffusion process or a number of timesteps, got 2.5": lambda: UniformSampler(2.5),
    "history_per_term must be at least 1 and an integer, got 2.5": lambda: LossSecondMomentSampler(
        3, 2.5
    ),
    "integer timesteps, got torch.float32": lambda: LossSecondMomentSampler(3).update_with_losses(
        torch.zeros(2), torch.zeros(2)
    ),
    "history_per_term must be at least 1": lambda: LossSecondMomentSampler(3, 0),
    r"uniform_prob must lie in \[0, 1\]": lambda: LossSecondMomentSampler(3, 1, 1.5),
    r"one shape \(n,\), got \(2,\) and \(3,\)": lambda: LossSecondMomentSampler(
        3
    ).update_with_losses(torch.zeros(2, dtype=torch.int64), torch.zeros(3)),
    r"'history' should have shape \(3, 10\), got \(4, 10\)": lambda: LossSecondMomentSampler(
        3
    ).load_state_dict(LossSecondMomentSampler(4).state_dict()),
    "'history' should have shape .* got nothing": lambda: LossSecondMomentSampler(
        3
    ).load_state_dict({}),
    "the uniform sampler has no state, got counts": lambda: UniformSampler(3).load_state_dict(
        {"counts": torch.zeros(3)}
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_gets_one_line(message):
    with pytest.raises(InputError, match=message) as caught:
        BAD_CALLS[message]()
    assert "\n" not in str(caught.value)
