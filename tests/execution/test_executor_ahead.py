"""What depends on the timesteps alone is computed for a call's timesteps together."""

import pytest
import torch

from executor_cases import CASES, arguments
from fastdiff.models.execution import ahead
from fastdiff.models.execution.executor import Executor
from fastdiff.ops.convolution.fastest import units
from fastdiff.sampling.sampler import Sampler
from sampler_tools import diffusion
from unet_tools import batch, small_unet

TIMESTEPS = [999.0, 500.5, 20.0, 3.0, 0.0]


@pytest.fixture
def computed(monkeypatch):
    """How many rows were computed, each time."""
    counts, original = [], ahead._computed

    def counted(plan, held, timesteps):
        counts.append(len(timesteps))
        return original(plan, held, timesteps)

    monkeypatch.setattr(ahead, "_computed", counted)
    return counts


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 32])
@pytest.mark.parametrize("case", CASES)
def test_the_answers_are_those_of_each_timestep(case, rows, monkeypatch, computed):
    monkeypatch.setattr(ahead, "ROWS", rows)
    monkeypatch.setattr(ahead, "MOST_BLOCKS", 2)
    options, size = CASES[case]
    model = small_unet(**options)
    executor = Executor(model, exact=True)
    given = arguments(model, size)
    for timestep in TIMESTEPS:
        given["timesteps"] = torch.full_like(given["timesteps"], timestep, dtype=torch.float32)
        expected = executor(**given)
        executor.begin(timesteps=TIMESTEPS)
        found = executor(**given)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert set(computed) == {rows}


@torch.no_grad()
def test_they_are_computed_once_for_all_steps(computed):
    model = small_unet()
    Sampler(model, diffusion(20), steps=7, executor=True).sample((2, 3, 8, 8))
    assert computed == [ahead.ROWS]


@torch.no_grad()
@pytest.mark.parametrize("reuse", [2, 3])
def test_once_for_whole_and_shallow_steps(computed, reuse):
    model = small_unet()
    Sampler(model, diffusion(20), steps=7, reuse=reuse).sample((2, 3, 8, 8))
    assert computed == [ahead.ROWS]


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    """So that a call gives what it gives beside others."""
    model = small_unet()
    x, _, _ = batch(model, 8, 8)
    t = torch.full((len(x),), 3.0)
    executor, found = Executor(model), []
    for others in ([3.0], TIMESTEPS, [float(i) for i in range(100, 60, -1)]):
        executor.begin(timesteps=[*others, 3.0])
        found.append(executor(x, t))
        executor.end()
    executor.begin(timesteps=[3.0])
    executor.begin(timesteps=TIMESTEPS[:2])  # of a call that begins before that one ends
    found.append(executor(x, t))
    assert all(torch.equal(found[0], other) for other in found[1:])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_is_the_same_to_the_bit_in_any_batch(dtype):
    if not units().amx:
        pytest.skip("without AMX larger batches have larger tiles of Winograd's")
    model = small_unet()
    x, _, _ = batch(model, 32, 32, n=9)
    t = torch.full((9,), 3.0)
    executor = Executor(model, dtype)
    executor.begin(timesteps=TIMESTEPS)
    whole = executor(x, t)
    parts = [executor(part, t[: len(part)]) for part in x.split([1, 2, 6])]
    assert torch.equal(torch.cat(parts), whole)


@torch.no_grad()
@pytest.mark.parametrize(
    "timesteps", [[999.0, 3.0], [7.0, 7.0], [float("nan")] * 2], ids=["two", "unknown", "NaN"]
)
def test_other_timesteps_are_computed_as_they_come(timesteps, computed):
    model = small_unet()
    x, _, _ = batch(model, 8, 8)
    t = torch.tensor(timesteps)
    executor = Executor(model, exact=True)
    expected = executor(x[:2], t)
    executor.begin(timesteps=TIMESTEPS)
    assert torch.equal(executor(x[:2], t), expected) or expected.isnan().all()
    assert computed == []


@torch.no_grad()
def test_weights_that_change_between_steps_are_seen():
    model = small_unet()
    x, _, _ = batch(model, 8, 8)
    t = torch.full((len(x),), TIMESTEPS[1])
    executor = Executor(model, exact=True)
    executor.begin(timesteps=TIMESTEPS)
    before = executor(x, t)
    model.time_embed[0].weight.mul_(-1)
    executor.refresh()
    after = executor(x, t)
    executor.end()
    assert (after - before).abs().max() > 1e-4
    assert (after - executor(x, t)).abs().max() <= 1e-5 * after.abs().max()
