"""A cascade: what each network is given, whose noise it draws, and where a smaller one stops."""

import numpy as np
import pytest
import torch

from fastdiff.data.words import UPSAMPLING, words
from fastdiff.errors import InputError
from fastdiff.images import to_float, to_uint8
from fastdiff.methods.registry import METHODS
from fastdiff.methods.table import StepTable
from fastdiff.ops.counters import training_step
from fastdiff.ops.normal import normal
from fastdiff.process.edm import EDM
from fastdiff.process.gaussian import create_diffusion
from fastdiff.sampling.cascade import Cascade, Stage
from fastdiff.sampling.sampler import Sampler

PROCESS = create_diffusion(steps=100, noise_schedule="cosine")


class Network:
    """Predicts what depends on all that it is given; keeps the last ``low_res`` and its level."""

    def __init__(self):
        self.low_res, self.noise_level = None, None

    def __call__(self, x, t, low_res=None, noise_level=None, y=None):
        self.low_res, self.noise_level = low_res, noise_level
        shift = 0.0 if low_res is None else low_res.mean((1, 2, 3), keepdim=True)
        if y is not None:
            shift = shift + y.view(-1, 1, 1, 1)
        return 0.9 * x + 0.1 * shift + t.view(-1, 1, 1, 1) / 1000


def base(size=2, process=PROCESS, steps=8, **options):
    return Stage(Sampler(Network(), process, steps=steps), (1, size, size), name="base", **options)


def upsampler(size=4, small=2, steps=5, cond_noise=0.0, noise_level=0.0, channels=1):
    sampler = Sampler(Network(), PROCESS, steps=steps)
    shape, low_res_size = (channels, size, size), (small, small)
    return Stage(sampler, shape, low_res_size, cond_noise, noise_level, name="upsampler")


def small_of(stage):
    return stage.sampler.model.low_res


def test_the_next_network_gets_what_the_one_before_drew_as_bytes():
    stages = [base(), upsampler(), upsampler(8, 4)]
    done = []
    x = Cascade(stages).sample(3, seed=4, progress=lambda: done.append(1))
    assert x.shape == (3, 1, 8, 8) and len(done) == sum(Cascade(stages).steps) == 8 + 5 + 5
    first = stages[0].sampler.sample((3, 1, 2, 2), seed=4)
    assert torch.equal(small_of(stages[1]), to_float(to_uint8(first)))
    second = Cascade(stages[1:2]).sample(3, seed=4, low_res=small_of(stages[1]))
    third = Cascade(stages[2:]).sample(3, seed=4, low_res=to_float(to_uint8(second)))
    assert torch.equal(x, third)  # one by one or together


@pytest.mark.parametrize("truncated", [False, True])
def test_an_image_is_the_same_in_any_batch(truncated):
    stages = [base(), upsampler(cond_noise=0.5, noise_level=0.4)]
    cascade = Cascade(stages, truncated=truncated)
    whole = cascade.sample(4, seed=2, first_sample=3)
    parts = [cascade.sample(1, seed=2, first_sample=3), cascade.sample(3, seed=2, first_sample=4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    assert not torch.allclose(cascade.sample(4, seed=3, first_sample=3), whole, atol=1e-2)


def test_no_two_networks_draw_the_same_noise():
    """Small images that are black, whatever their size, and a network that is given none: the
    samples differ by their noise alone."""
    seen = [base(6).sampler.sample((1, 1, 6, 6), seed=9)]
    for small in (2, 4):
        black = torch.zeros(1, 1, small, small)
        seen.append(Cascade([upsampler(6, small, steps=8)]).sample(1, seed=9, low_res=black))
    for i in range(3):
        assert not torch.allclose(seen[i], seen[i - 1], atol=0.1)


def seed_of(seed, size):
    return int(words(seed, (size[0] << 32) + size[1], UPSAMPLING, 1)[0])


def test_small_images_are_noised_to_the_level_by_the_upsamplers_own_noise():
    stage = upsampler(cond_noise=0.5, noise_level=0.3)
    low_res = torch.rand(2, 1, 2, 2) * 2 - 1
    Cascade([stage]).sample(2, seed=7, first_sample=5, low_res=low_res)
    seed = seed_of(7, (2, 2))
    noise = normal((2, 1, 2, 2), seed=seed, step=training_step(0), first_sample=5)
    angle = 0.3 * np.pi / 2
    torch.testing.assert_close(small_of(stage), np.cos(angle) * low_res + np.sin(angle) * noise)
    assert torch.equal(stage.sampler.model.noise_level, torch.full((2,), 0.3))
    stage = upsampler(cond_noise=0.5)
    Cascade([stage]).sample(2, seed=7, low_res=low_res)
    assert torch.equal(small_of(stage), low_res)
    assert torch.equal(stage.sampler.model.noise_level, torch.zeros(2))


@pytest.mark.parametrize("process", [PROCESS, EDM()], ids=["cosine", "EDM"])
def test_a_truncated_network_stops_at_its_first_step_with_no_more_noise(process):
    stages = [base(process=process), upsampler(cond_noise=0.5, noise_level=0.5)]
    cascade = Cascade(stages, truncated=True)
    cascade.sample(2, seed=1)
    strided, (rows, _) = stages[0].sampler.diffusion, cascade.steps
    t = 8 - 1 - rows  # what remains
    ratio = strided.noise_scale / strided.signal_scale
    assert 0 < rows < 8 and ratio[t] <= 1 + 1e-12 < ratio[t + 1]  # level 0.5: noise = signal
    angle = float(stages[1].sampler.model.noise_level[0]) * np.pi / 2
    assert np.tan(angle) == pytest.approx(ratio[t], rel=1e-6)
    x = list(stages[0].sampler.iterate((2, 1, 2, 2), seed=1))[rows - 1]["sample"]
    length = np.hypot(strided.signal_scale[t], strided.noise_scale[t])
    torch.testing.assert_close(small_of(stages[1]), x / float(length))


@pytest.mark.parametrize("method", METHODS)
def test_a_network_is_stopped_at_a_sample_and_on_its_way_down(method):
    stages = [base(steps=10), upsampler(cond_noise=0.5, noise_level=0.4)]
    stages[0].sampler.configure(method=method)
    cascade = Cascade(stages, truncated=True)
    cascade.sample(2, seed=1)
    table, rows = stages[0].sampler.table, cascade.steps[0]
    ratios = table.levels[:, 1] / table.levels[:, 0]
    level = np.tan(0.4 * np.pi / 2)
    assert table.begins[rows] and (ratios[rows:] <= level + 1e-12).all()
    earlier = [i for i in range(1, rows) if table.begins[i]]
    assert all((ratios[i:] > level).any() for i in earlier)
    x = list(stages[0].sampler.iterate((2, 1, 2, 2), seed=1))[rows - 1]["sample"]
    torch.testing.assert_close(small_of(stages[1]), x / float(np.hypot(*table.levels[rows])))


def test_each_network_has_arguments_of_its_own():
    stages = [base(), upsampler()]
    y = torch.tensor([0, 3])
    plain = Cascade(stages).sample(2)
    labelled = Cascade(stages).sample(2, model_kwargs=[{}, {"y": y}])
    assert torch.allclose(plain[0], labelled[0]) and not torch.allclose(plain[1], labelled[1])


TABLE = StepTable.from_rows([{"timesteps": t, "d": 0.5} for t in (3.0, 2.0, 1.0, 0.0)])
NOISY = upsampler(cond_noise=0.5, noise_level=0.1)
ALMOST_CLEAN = upsampler(cond_noise=0.5, noise_level=1e-4)


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ([], {}, "needs a network at least"),
        ([base(), base(4)], {}, "base is no super-resolution network: it cannot follow base"),
        ([base(4), upsampler()], {}, "upsamples images of 2x2, and base makes 4x4"),
        ([base(), upsampler(channels=3)], {}, "upsampler has 3 channels, and base 1"),
        ([base(), upsampler()], {"truncated": True}, "needs a cascade and the noise_level to stop"),
        ([NOISY], {"truncated": True}, "truncated needs a cascade"),
        ([base(), ALMOST_CLEAN], {"truncated": True}, "cannot be stopped at .*, or more steps"),
        (
            [base(process=TABLE, steps=None), NOISY],
            {"truncated": True},
            "needs the process of base, which has a StepTable",
        ),
    ],
)
def test_networks_that_do_not_fit_are_one_line(stages, options, message):
    with pytest.raises(InputError, match=message):
        Cascade(stages, **options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (upsampler, {"noise_level": 0.1}, "upsampler was trained on clean images alone"),
        (upsampler, {"cond_noise": 0.5, "noise_level": 0.6}, "is 0.6, and .* up to 0.5"),
        (upsampler, {"noise_level": 1.5}, r"noise_level is 1.5; expected a number in \[0"),
        (base, {"noise_level": 0.1}, "that of small images, which base is not given"),
    ],
)
def test_a_level_that_was_not_trained_is_one_line(make, options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("stage", "low_res", "message"),
    [
        (base(), torch.zeros(2, 1, 2, 2), "low_res was given, and base takes no small images"),
        (upsampler(), None, r"it needs low_res \(2, 1, 2, 2\)"),
        (upsampler(), torch.zeros(2, 1, 3, 3), r"shape \(2, 1, 3, 3\); expected \(2, 1, 2, 2\)"),
        (upsampler(), torch.zeros(2, 1, 2, 2, dtype=torch.uint8), "low_res"),
    ],
)
def test_small_images_that_do_not_fit_are_one_line(stage, low_res, message):
    with pytest.raises(InputError, match=message):
        Cascade([stage]).sample(2, low_res=low_res)
