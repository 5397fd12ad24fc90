import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastdiff.checkpoints.checkpoint import load, save
from fastdiff.cli import main
from fastdiff.images import load_samples_npz, to_uint8
from fastdiff.models.ema import EMA
from fastdiff.models.unet import UNet
from fastdiff.process.edm import EDM
from fastdiff.process.gaussian import create_diffusion
from fastdiff.sampling.sampler import Sampler

INFO = {"image_size": [8, 8], "channels": 1, "num_classes": 3, "class_names": ["ant", "bee", "cat"]}


def unet(**options):
    torch.manual_seed(0)
    arguments = {
        "in_channels": 1,
        "model_channels": 32,
        "out_channels": 1,
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "channel_mult": (1, 1),
        "image_size": 8,
    }
    model = UNet(**arguments | options)
    for parameter in model.parameters():  # the last layer starts at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint without classes, with two averages that differ from the weights."""
    model = unet()
    ema = EMA(model, (0.9, 0.99))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    ema.update()
    ema.updates = 1000  # as many as make an average that has forgotten its start
    diffusion = create_diffusion(steps=100, noise_schedule="cosine")
    return save(
        tmp_path_factory.mktemp("plain") / "ckpt",
        model,
        diffusion=diffusion,
        ema=ema,
        step=7,
        info={"image_size": [8, 8], "channels": 1},
    )


@pytest.fixture(scope="module")
def classy(tmp_path_factory):
    """A checkpoint with three classes and a null class."""
    # FiLM: with one channel a group, GroupNorm would take an added embedding out again.
    model = unet(num_classes=3, null_class=True, use_scale_shift_norm=True)
    diffusion = create_diffusion(steps=100, noise_schedule="cosine")
    folder = tmp_path_factory.mktemp("classy") / "ckpt"
    return save(folder, model, diffusion=diffusion, info=INFO)


def sample(checkpoint, out, *options):
    return main(["sample", "--checkpoint", str(checkpoint), "--out", str(out), *options])


def test_everything_it_leaves(plain, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    options = ["--num", "5", "--batch-size", "2", "--steps", "4", "--columns", "3", "--scale", "2"]
    assert sample(plain, out, *options, "--trajectory", "3", "--seed", "9") == 0
    printed = capsys.readouterr()
    for name in ("samples_5x8x8x1.npz", "png", "grid.png", "trajectory.png"):
        assert str(out / name) in printed.out
    assert "images/s" in printed.out and "EMA 0.99 of step 7" in printed.out
    assert "12/12" in printed.err  # three batches of four steps

    images, labels = load_samples_npz(out / "samples_5x8x8x1.npz")
    assert images.shape == (5, 8, 8, 1) and labels is None
    pngs = sorted((out / "png").iterdir())
    assert [png.name for png in pngs] == [f"sample_{i:06d}.png" for i in range(5)]
    for image, png in zip(images, pngs, strict=True):
        assert np.array_equal(np.asarray(Image.open(png)), image[:, :, 0])
    assert Image.open(out / "grid.png").size == (3 * 18 + 2, 2 * 18 + 2)
    trajectory = Image.open(out / "trajectory.png")
    assert trajectory.size == (4 * 18 + 2, 3 * 18 + 2)  # four moments of three images
    finished = np.asarray(trajectory)[2:18:2, 3 * 18 + 2 : 4 * 18 : 2]
    assert np.array_equal(finished, images[0, :, :, 0])

    checkpoint = load(plain)
    expected = Sampler(checkpoint.model, checkpoint.diffusion, steps=4).sample((5, 1, 8, 8), seed=9)
    difference = to_uint8(expected)[:, 0].int() - torch.from_numpy(images)[..., 0].int()
    assert difference.abs().max() <= 1  # batches of another size may round otherwise


def test_a_trajectory_of_what_the_network_expects(plain, tmp_path):
    size = ["--num", "3", "--batch-size", "2", "--steps", "4", "--scale", "1", "--no-pngs"]
    assert sample(plain, tmp_path, *size, "--trajectory", "3", "--trajectory-of", "x0") == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"samples_3x8x8x1.npz", "grid.png", "trajectory_x0.png"}
    picture = np.asarray(Image.open(tmp_path / "trajectory_x0.png")).astype(int)
    checkpoint = load(plain)
    steps = Sampler(checkpoint.model, checkpoint.diffusion, steps=4).iterate((3, 1, 8, 8))
    for column, step in enumerate(steps):
        for row, expected in enumerate(to_uint8(step["pred_xstart"])[:, 0].int().numpy()):
            top, left = 2 + 10 * row, 2 + 10 * column
            found = picture[top : top + 8, left : left + 8]
            assert np.abs(found - expected).max() <= 1


def test_an_edm_checkpoint_is_sampled(tmp_path, capsys):
    info = {"image_size": [8, 8], "channels": 1}
    path = save(tmp_path / "ckpt", unet(), diffusion=EDM(sigma_data=0.4), info=info)
    assert sample(path, tmp_path / "out", "--num", "2", "--steps", "4", "--method", "ddim") == 0
    assert "2 images, 4 steps each" in capsys.readouterr().out
    checkpoint = load(path)
    sampler = Sampler(checkpoint.model, checkpoint.diffusion, steps=4, method="ddim")
    expected = to_uint8(sampler.sample((2, 1, 8, 8), seed=0))[:, 0].numpy()
    assert np.abs(arrays(tmp_path / "out")[0][..., 0].astype(int) - expected).max() <= 1


def arrays(folder):
    (file,) = folder.glob("samples_*.npz")
    return load_samples_npz(file)


def test_first_sample_continues_a_run(plain, tmp_path):
    options = ("--steps", "3", "--no-pngs", "--seed", "2")
    sample(plain, tmp_path / "whole", "--num", "4", *options)
    sample(plain, tmp_path / "tail", "--num", "2", "--first-sample", "2", *options)
    whole, tail = arrays(tmp_path / "whole")[0], arrays(tmp_path / "tail")[0]
    assert np.abs(whole[2:].astype(int) - tail).max() <= 1
    assert not (tmp_path / "whole" / "png").exists()
    assert not (tmp_path / "whole" / "trajectory.png").exists()


@pytest.mark.seconds
def test_options_reach_the_sampler(plain, tmp_path):
    runs = {
        "ddpm": [],
        "ddim": ["--method", "ddim"],
        "noisy": ["--method", "ddim", "--eta", "1"],
        "solver": ["--method", "dpmsolver++"],
        "order": ["--method", "unipc", "--method-option", "order=1"],
        "auto": ["--method", "auto"],
        "seed": ["--seed", "1"],
        "sections": ["--steps", "2,2"],
        "weights": ["--weights", "model"],
        "rate": ["--weights", "0.9"],
        "bfloat16": ["--dtype", "bfloat16"],
        "truncated": ["--truncate"],
    }
    found = {}
    for name, options in runs.items():
        arguments = ["--num", "2", "--steps", "4", "--no-pngs", "--device", "cpu", *options]
        assert sample(plain, tmp_path / name, *arguments) == 0
        found[name] = arrays(tmp_path / name)[0]
    assert len({images.tobytes() for images in found.values()}) == len(runs)
    lost = found["ddpm"].astype(int) - found["truncated"]
    assert set(np.unique(lost)) == {0, 1}
    assert np.abs(found["bfloat16"].astype(int) - found["ddpm"]).mean() < 10


def test_default_steps(plain, tmp_path, capsys):
    assert sample(plain, tmp_path, "--num", "1") == 0
    assert "50 steps each" in capsys.readouterr().out
    short = create_diffusion(steps=6, noise_schedule="cosine")
    save(tmp_path / "short", unet(), diffusion=short, info={"image_size": 8})
    assert sample(tmp_path / "short", tmp_path, "--num", "1") == 0
    assert "6 steps each" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, expected",
    [
        ([], [0, 1, 2, 0, 1]),
        (["--classes", "all"], [0, 1, 2, 0, 1]),
        (["--classes", "2"], [2] * 5),
        (["--classes", "2,0"], [2, 0, 2, 0, 2]),
        (["--classes", "cat, bee"], [2, 1, 2, 1, 2]),
        (["--classes", "2,0", "--first-sample", "1"], [0, 2, 0, 2, 0]),
    ],
)
def test_classes_in_turn(classy, tmp_path, option, expected):
    arguments = ["--num", "5", "--batch-size", "3", "--steps", "8", "--no-pngs", *option]
    assert sample(classy, tmp_path, *arguments) == 0
    images, labels = arrays(tmp_path)
    assert labels.tolist() == expected
    checkpoint = load(classy)
    first = 1 if "--first-sample" in option else 0
    sampler = Sampler(checkpoint.model, checkpoint.diffusion, steps=8)

    def difference(labels):
        x = sampler.sample((5, 1, 8, 8), first_sample=first, model_kwargs={"y": labels})
        return np.abs(to_uint8(x)[:, 0].numpy().astype(int) - images[..., 0]).max()

    assert difference(torch.tensor(expected)) <= 1
    assert difference((torch.tensor(expected) + 1) % 3) > 1


def test_guidance(classy, tmp_path):
    arguments = ["--num", "2", "--steps", "8", "--no-pngs", "--classes", "1"]
    sample(classy, tmp_path / "plain", *arguments)
    sample(classy, tmp_path / "guided", *arguments, "--guidance-scale", "4")
    plain, guided = (arrays(tmp_path / name)[0].astype(int) for name in ("plain", "guided"))
    assert np.abs(plain - guided).max() > 1


def test_a_weaker_network_guides(plain, classy, tmp_path, capsys):
    diffusion = create_diffusion(steps=100, noise_schedule="cosine")
    guide = save(
        tmp_path / "guide", unet(channel_mult=(1,)), diffusion=diffusion, info={"image_size": 8}
    )
    given = ["--num", "2", "--steps", "4", "--no-pngs"]
    guided = [*given, "--guide", str(guide), "--guidance-scale"]
    assert sample(plain, tmp_path / "plain", *given) == 0
    assert sample(plain, tmp_path / "one", *guided, "1") == 0
    assert "guided by" in capsys.readouterr().out
    assert sample(plain, tmp_path / "three", *guided, "3") == 0
    assert sample(plain, tmp_path / "reused", *guided, "3", "--guidance-reuse", "2") == 0
    names = ("plain", "one", "three", "reused")
    found = [arrays(tmp_path / name)[0].astype(int) for name in names]
    assert np.abs(found[0] - found[1]).max() <= 1  # a scale of 1 is the network alone
    assert np.abs(found[0] - found[2]).max() > 1 and np.abs(found[3] - found[2]).max() > 0
    other = create_diffusion(steps=100, noise_schedule="linear")
    save(tmp_path / "other", unet(), diffusion=other, info={"image_size": 8})
    for options, message in (
        (["--guide", str(guide)], "--guide goes with --guidance-scale, which is not given"),
        (["--guide", str(classy), "--guidance-scale", "2"], "is for 3 classes"),
        (["--guide", str(tmp_path / "other"), "--guidance-scale", "2"], "is for another process"),
    ):
        assert sample(plain, tmp_path / "refused", *given, *options) == 2
        assert message in capsys.readouterr().err


def test_a_run_directory_means_its_newest_checkpoint(tmp_path, capsys):
    diffusion = create_diffusion(steps=4, noise_schedule="cosine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"lr": 1}))
    for step in (5, 20):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        save(folder, unet(), diffusion=diffusion, step=step, info={"image_size": 8})
    assert sample(tmp_path / "run", tmp_path / "out", "--num", "1") == 0
    assert "step_00000020: weights of step 20" in capsys.readouterr().out


def test_many_images_make_a_grid_of_the_first_hundred(tmp_path):
    diffusion = create_diffusion(steps=2, noise_schedule="cosine")
    save(tmp_path / "ckpt", unet(), diffusion=diffusion, info={"image_size": 8})
    assert sample(tmp_path / "ckpt", tmp_path, "--num", "101", "--no-pngs", "--scale", "1") == 0
    assert Image.open(tmp_path / "grid.png").size == (102, 102)
    assert (tmp_path / "samples_101x8x8x1.npz").exists()


@pytest.mark.seconds
def test_two_channels_have_no_picture(tmp_path, capsys):
    model = unet(in_channels=2, out_channels=2)
    diffusion = create_diffusion(steps=2, noise_schedule="cosine")
    save(tmp_path / "ckpt", model, diffusion=diffusion, info={"image_size": [8, 6]})
    assert sample(tmp_path / "ckpt", tmp_path / "out", "--num", "2") == 0
    assert "no pictures" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples_2x8x6x2.npz"]


@pytest.mark.seconds
def test_an_interrupted_run_keeps_its_finished_batches(plain, tmp_path, monkeypatch, capsys):
    draw = Sampler.sample

    def interrupted(self, shape, **options):
        if options["first_sample"] == 2:
            raise KeyboardInterrupt
        return draw(self, shape, **options)

    monkeypatch.setattr(Sampler, "sample", interrupted)
    assert sample(plain, tmp_path, "--num", "4", "--batch-size", "2", "--steps", "2") == 130
    assert len(list((tmp_path / "png").iterdir())) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--steps", "101"], "101"),
        (["--steps", "ddim33"], "no integer stride takes exactly 33 of 100 steps"),
        (["--steps", "fast"], "fast"),
        (["--eta", "0.5"], "belongs to method 'ddim'"),
        (["--method-option", "order=2"], "--method-option is 'order=2'; of --method ddpm is none"),
        (["--method", "unipc", "--method-option", "order"], "is order=…, variant=…, corrector=…"),
        (["--method", "unipc", "--method-option", "order=9"], "order is 9; expected an integer"),
        (["--guidance-rescale", "0.5"], "goes with --guidance-scale"),
        (["--reuse", "0"], "reuse is 0; expected an integer, 1 or more"),
        (["--method", "ddim", "--eta", "-1"], "eta is -1.0"),
        (["--classes", "1"], "--classes 1 for a network without classes"),
        (["--guidance-scale", "2"], "needs a network that was trained with label dropout"),
        (["--weights", "0.5"], "has no weights '0.5'; there are model, 0.9, 0.99"),
        (["--device", "cuda:99"], "no device 'cuda:99'"),
        (["--num", "0"], "--num is 0; expected 1 or more"),
        (["--batch-size", "-2"], "--batch-size is -2"),
        (["--scale", "0"], "--scale is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--first-sample", "-1"], "--first-sample is -1"),
    ],
)
def test_bad_options(plain, tmp_path, capsys, options, message):
    assert sample(plain, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdiff sample: error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()  # refused before anything is made


@pytest.mark.parametrize("classes", ["3", "-1", "1,dog", "1.5", ""])
def test_bad_classes(classy, tmp_path, capsys, classes):
    assert sample(classy, tmp_path, f"--classes={classes}") == 2
    assert "is no class; there are 0 … 2 (ant, bee, cat)" in capsys.readouterr().err


def test_bad_places(plain, tmp_path, capsys):
    assert sample(tmp_path / "nowhere", tmp_path) == 2
    assert "nowhere is not a checkpoint directory" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert sample(plain, out) == 2
        assert f"cannot write into --out {out}" in capsys.readouterr().err


def test_checkpoints_it_cannot_sample(tmp_path, capsys):
    diffusion = create_diffusion(steps=4, noise_schedule="cosine")
    save(tmp_path / "bare", unet())
    assert sample(tmp_path / "bare", tmp_path) == 2
    assert "without its diffusion process" in capsys.readouterr().err
    save(tmp_path / "super", unet(super_res=True), diffusion=diffusion)
    assert sample(tmp_path / "super", tmp_path) == 2
    assert "is a super-resolution network" in capsys.readouterr().err
    save(tmp_path / "line", unet(dims=1), diffusion=diffusion)
    assert sample(tmp_path / "line", tmp_path) == 2
    assert "is no image network" in capsys.readouterr().err
    save(tmp_path / "size", unet(image_size=None), diffusion=diffusion)
    assert sample(tmp_path / "size", tmp_path) == 2
    assert "does not say its image size" in capsys.readouterr().err


def test_a_network_gone_nan_is_named(tmp_path, capsys):
    model = unet()
    nn.init.constant_(model.out[2].bias, float("nan"))
    diffusion = create_diffusion(steps=4, noise_schedule="cosine")
    save(tmp_path / "ckpt", model, diffusion=diffusion)
    assert sample(tmp_path / "ckpt", tmp_path / "out", "--num", "1") == 2
    assert "not finite after step 0 (timestep 3)" in capsys.readouterr().err
