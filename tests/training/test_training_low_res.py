"""Training a super-resolution network: its small images, whose draws they are, and resuming."""

import numpy as np
import pytest
import safetensors.torch
import torch

from fastdiff.checkpoints.checkpoint import load
from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.data.words import LOW_RES_BLUR, LOW_RES_LEVEL, uniform
from fastdiff.errors import InputError
from fastdiff.images import to_float
from fastdiff.process.low_res import blurred, downsampled, noised_to
from fastdiff.training import TrainConfig
from fastdiff.training.low_res import LowRes
from training_tools import make_trainer, read_lines, resume_trainer

UPSAMPLER = {"super_res": True, "noise_cond": True}
AUGMENTED = {"upsample_from": 4, "cond_noise": 0.6, "cond_blur": 0.5}
N = 64
X = torch.rand((N, 3, 8, 8), generator=torch.Generator().manual_seed(0)) * 2 - 1


def drawn(part=slice(0, N), step=5, **settings):
    config = TrainConfig(seed=3, batch_size=N, **settings)

    def numbers(purpose):
        return torch.from_numpy(uniform(3, step, purpose, N)[part])

    return LowRes(config).drawn(X[part], numbers, step, part.start)


def test_another_network_gets_nothing():
    assert drawn() == {}


def test_without_augmentation_it_is_the_mean_of_the_pixels():
    given = drawn(upsample_from=4)
    assert given.keys() == {"low_res"} and torch.equal(given["low_res"], downsampled(X, (4, 4)))


def test_augmentation_written_out():
    given = drawn(**AUGMENTED)
    levels = torch.from_numpy(0.6 * uniform(3, 5, LOW_RES_LEVEL, N))
    u = torch.from_numpy(uniform(3, 5, LOW_RES_BLUR, N))
    sigma = torch.where(u < 0.5, 0.4 + 0.2 * u / 0.5, 0)
    assert 0.3 < (sigma > 0).double().mean() < 0.7 and levels.max() > 0.5
    small = blurred(downsampled(X, (4, 4)), sigma)
    seed = LowRes(TrainConfig(seed=3)).noise_seed
    torch.testing.assert_close(
        given["low_res"], noised_to(small, levels, seed=seed, step=5, first_sample=0)
    )
    assert torch.equal(given["noise_level"], levels.float())


def test_draws_do_not_depend_on_the_ranks():
    whole = drawn(**AUGMENTED)
    parts = [drawn(slice(0, 40), **AUGMENTED), drawn(slice(40, N), **AUGMENTED)]
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value)
    other = drawn(step=6, **AUGMENTED)
    assert all(not torch.equal(other[name], value) for name, value in whole.items())


def test_a_batch_has_the_small_images_of_its_mirrored_images(tmp_path):
    trainer = make_trainer(tmp_path, model={"super_res": True}, upsample_from=4)
    x, kwargs = trainer.feed.next_batch(0)
    assert torch.equal(kwargs["low_res"], downsampled(x, (4, 4)))
    images = to_float(trainer.data.gather(np.arange(24)))
    mirrored = [any(torch.equal(one.flip(-1), image) for image in images) for one in x]
    assert any(mirrored) and not all(mirrored)


@pytest.mark.seconds
def test_a_run_resumes_bit_for_bit_and_knows_what_it_was_trained_with(tmp_path):
    settings = {**AUGMENTED, "steps": 4, "log_every": 2, "save_every": 2, "nll_every": 4}
    settings |= {"nll_images": 2, "sample_every": 4, "sample_count": 3, "sample_steps": 2}
    make_trainer(tmp_path / "whole", model=UPSAMPLER, **settings).fit()
    make_trainer(tmp_path / "parts", model=UPSAMPLER, **{**settings, "steps": 2}).fit()
    resume_trainer(tmp_path / "parts", steps=4).fit()
    paths = [list_checkpoints(tmp_path / name)[-1] for name in ("whole", "parts")]
    for stem in ("model", "ema_0.99", "trainer"):
        whole, parts = (safetensors.torch.load_file(p / f"{stem}.safetensors") for p in paths)
        assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert read_lines(tmp_path / "whole")[-1] == read_lines(tmp_path / "parts")[-1]
    assert np.isfinite(read_lines(tmp_path / "whole")[-1]["bits_per_dim"])
    assert list((tmp_path / "whole" / "samples").glob("*.png"))
    found = load(paths[1])
    assert found.info["upsample_from"] == 4 and found.info["cond_noise"] == 0.6
    assert found.model.super_res and found.model.noise_cond
    with pytest.raises(InputError, match="upsample_from is 2 but the run was started with 4"):
        resume_trainer(tmp_path / "parts", upsample_from=2)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({}, {"upsample_from": 4}, "upsample_from is 4, which needs a UNet of super_res=True"),
        ({"super_res": True}, {}, "a super-resolution network needs upsample_from"),
        ({"super_res": True}, AUGMENTED, "cond_noise is 0.6, which needs a UNet of noise_cond"),
        (UPSAMPLER, {"upsample_from": 4}, "the network has noise_cond, and cond_noise is 0"),
        (UPSAMPLER, {**AUGMENTED, "upsample_from": 8}, "8x8 cannot be upsampled from 8 pixels"),
        ({}, {"cond_noise": 0.1}, "cond_noise is 0.1, expected 0 where upsample_from is below 1"),
        (UPSAMPLER, {**AUGMENTED, "cond_blur": 1.5}, "cond_blur is 1.5, expected in"),
        (UPSAMPLER, {**AUGMENTED, "upsample_from": 1}, "expected 0 where upsample_from is below 2"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, model, settings, message):
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, model=model, **settings)
