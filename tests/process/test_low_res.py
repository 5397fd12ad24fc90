"""The small image of a super-resolution network: sizes, area means, blur and noise in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastdiff.errors import InputError
from fastdiff.ops.counters import training_step
from fastdiff.ops.normal import normal
from fastdiff.process.edm import EDM
from fastdiff.process.gaussian import create_diffusion
from fastdiff.process.low_res import blurred, downsampled, level_of, low_res_size, noised_to

X = torch.rand((4, 3, 8, 12), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X = X * 2 - 1


def test_noise_is_that_of_the_formula():
    levels = torch.tensor([0.0, 0.25, 0.7, 1.0], dtype=torch.float64)
    noise = normal(X.shape, seed=5, step=training_step(3), first_sample=2, dtype=torch.float64)
    s = levels.view(-1, 1, 1, 1) * np.pi / 2
    found = noised_to(X, levels, seed=5, step=3, first_sample=2)
    torch.testing.assert_close(found, s.cos() * X + s.sin() * noise, rtol=0, atol=1e-14)
    assert torch.equal(found[0], X[0])
    in_float32 = noised_to(X.float(), levels, seed=5, step=3, first_sample=2)
    torch.testing.assert_close(in_float32.double(), found, rtol=0, atol=1e-6)


def test_an_image_is_noised_alike_in_any_batch():
    levels = torch.linspace(0, 1, 4)
    whole = noised_to(X.float(), levels, seed=1, step=0, first_sample=6)
    alone = noised_to(X[2:].float(), levels[2:], seed=1, step=0, first_sample=8)
    assert torch.equal(whole[2:], alone)


@pytest.mark.parametrize("process", [create_diffusion(noise_schedule="cosine"), EDM()])
def test_a_level_has_the_noise_of_a_process(process):
    """What a process noises, once its length is taken out, is z_s."""
    for signal, noise in list(zip(process.signal_scale, process.noise_scale, strict=True))[::5]:
        s = level_of(signal, noise) * np.pi / 2
        length = np.hypot(signal, noise)
        assert np.cos(s) == pytest.approx(signal / length, abs=1e-12)
        assert np.sin(s) == pytest.approx(noise / length, abs=1e-12)


def test_a_small_pixel_is_the_mean_of_those_it_covers():
    means = X.reshape(4, 3, 2, 4, 3, 4).mean((3, 5))
    torch.testing.assert_close(downsampled(X, (2, 3)), means)
    assert torch.equal(downsampled(X, (3, 5)), F.interpolate(X, (3, 5), mode="area"))


def test_blur_is_a_convolution_with_a_gaussian():
    sigma = torch.tensor([0.4, 0.5, 0.6, 0.0])
    offsets = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    for i, width in enumerate(sigma[:3].double()):
        row = torch.exp(-(offsets**2) / (2 * width**2))
        kernel = torch.outer(row, row) / row.sum() ** 2
        padded = F.pad(X[i : i + 1], (1, 1, 1, 1), mode="reflect")
        expected = F.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3)
        torch.testing.assert_close(blurred(X, sigma)[i : i + 1], expected)
    assert torch.equal(blurred(X, sigma)[3], X[3])


def test_the_shorter_side_decides_the_size():
    assert low_res_size((64, 64), 16) == (16, 16)
    assert low_res_size((8, 12), 2) == (2, 3) and low_res_size([12, 8], 4) == (6, 4)


@pytest.mark.parametrize(
    ("size", "side", "message"),
    [
        ((8, 8), 8, "8x8 cannot be upsampled from 8 pixels; .*, 1 to 7"),
        ((8, 8), 0, "from 0 pixels"),
        ((8, 10), 3, "8x10 are no whole number of pixels wide when the shorter side is 3"),
    ],
)
def test_impossible_sizes_are_one_line(size, side, message):
    with pytest.raises(InputError, match=message):
        low_res_size(size, side)
