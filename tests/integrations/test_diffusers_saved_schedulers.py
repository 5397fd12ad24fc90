"""Pipelines with our schedulers: swapped in, saved, loaded without fastdiff; diffusers' figures."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

from fastdiff.integrations import diffusers as ours
from scheduler_tools import pair

CLASSES = [getattr(diffusers, name) for name in ours.__all__ if name.endswith("Scheduler")]
every_class = pytest.mark.parametrize("stock", CLASSES)


def tiny_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).eval()


def images(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        batch_size=2, num_inference_steps=4, generator=generator, output_type="np", **options
    ).images


def python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "pipeline, options",
    [("DDPMPipeline", {}), ("DDIMPipeline", {"eta": 0.0}), ("DDIMPipeline", {"eta": 0.7})],
)
def test_a_pipeline_gives_the_same_images(pipeline, options):
    stock = getattr(diffusers, pipeline.replace("Pipeline", "Scheduler"))
    pipe = getattr(diffusers, pipeline)(tiny_unet(), stock(beta_end=0.03))
    expected = images(pipe, **options)
    pipe.scheduler = getattr(ours, stock.__name__).from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.beta_end == 0.03
    np.testing.assert_allclose(images(pipe, **options), expected, atol=2e-5)


LOAD = """
import sys
sys.modules["fastdiff"] = None  # an import of it fails
import diffusers, torch
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np").images
alone = diffusers.DDPMScheduler.from_pretrained(sys.argv[2])
print(type(pipe.scheduler).__module__, alone.config == pipe.scheduler.config, images.sum())
"""


@pytest.mark.seconds
def test_what_is_saved_loads_without_fastdiff(tmp_path):
    pipe = diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler())
    pipe.scheduler = ours.DDPMScheduler.from_config(pipe.scheduler.config, clip_sample_range=2.0)
    expected = images(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    module, same, total = python(LOAD, tmp_path / "pipe", tmp_path / "scheduler")
    assert (module, same) == ("diffusers.schedulers.scheduling_ddpm", "True")
    assert float(total) == pytest.approx(float(expected.sum()), abs=1e-2)
    ours_again = diffusers.DDPMPipeline.from_pretrained(
        tmp_path / "pipe", scheduler=ours.DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    )
    assert type(ours_again.scheduler) is ours.DDPMScheduler
    np.testing.assert_allclose(images(ours_again), expected, atol=1e-6)


@every_class
def test_what_is_saved_names_diffusers(stock, tmp_path):
    mine = getattr(ours, stock.__name__)(num_train_timesteps=50)
    pipe = diffusers.DDPMPipeline(tiny_unet(), mine)
    assert pipe.config["scheduler"] == ("diffusers", stock.__name__)
    mine.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    stock(num_train_timesteps=50).save_pretrained(tmp_path / "stock")
    assert saved == json.loads((tmp_path / "stock" / "scheduler_config.json").read_text())
    assert type(mine).__module__.startswith("fastdiff.")  # which pickle goes by


def test_a_users_subclass_is_saved_under_its_own_name():
    class Mine(ours.DDPMScheduler):
        pass

    pipe = diffusers.DDPMPipeline(tiny_unet(), Mine())
    assert pipe.config["scheduler"] == (__name__, "Mine")


@every_class
def test_configurations_go_round(stock):
    config = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    theirs, mine = pair(stock, **config)
    assert dict(type(mine).from_config(theirs.config).config) == dict(theirs.config)
    assert dict(stock.from_config(mine.config).config) == dict(mine.config)
    assert mine.compatibles and len(mine) == len(theirs)
    for other in CLASSES:
        assert getattr(ours, other.__name__).from_config(mine.config).config.prediction_type == (
            "v_prediction"
        )


def ramp(*, reverse=False):
    values = torch.arange(768).flip(0) if reverse else torch.arange(768)
    return (values.reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


SIGMA_MIN = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
FIGURES = [
    ("DDPM", {}, None, 0, 258.9606),
    ("DDPM", {"prediction_type": "v_prediction"}, None, 0, 202.0296),
    ("DDPM", {}, None, 998, 387.9466),
    ("DDIM", {}, 10, 0, 172.0067),
    ("DDIM", {"prediction_type": "v_prediction"}, 10, 0, 52.5302),
    ("DDIM", {"set_alpha_to_one": True, "beta_start": 0.01}, 10, 0, 149.8295),
    ("DDIM", {"set_alpha_to_one": False, "beta_start": 0.01}, 10, 0, 149.0784),
    ("DDIM", {}, 10, 8, 354.5418),
    ("DPMSolverMultistep", SIGMA_MIN, 10, 5, 318.4111),
]


@pytest.mark.parametrize("name, config, steps, start, total", FIGURES)
def test_the_figures_of_diffusers_own_tests(name, config, steps, start, total):
    """Σ|x| after the loop of its test_full_loop_*: a ramp for x_T, or a noised one from the
    timestep ``start`` on, and the network x·t/(t + 1)."""
    mine = getattr(ours, f"{name}Scheduler")(**config)
    if steps is not None:
        mine.set_timesteps(steps)
    x, timesteps = ramp(), mine.timesteps[start:]
    if start:
        x = mine.add_noise(x, ramp(reverse=True), timesteps[:1])
    generator = torch.Generator().manual_seed(0)
    for t in timesteps:
        output = x * t / (t + 1)
        assert mine.why_stock(output, t, x) is None
        x = mine.step(output, t, x, generator=generator).prev_sample
    assert float(x.abs().sum()) == pytest.approx(total, abs=1e-2)


@pytest.mark.seconds
def test_diffusers_is_optional():
    code = """
import sys
import fastdiff
assert "diffusers" not in sys.modules
sys.modules["diffusers"] = None
try:
    import fastdiff.integrations.diffusers
except fastdiff.InputError as error:
    print(error)
"""
    assert " ".join(python(code)) == (
        "this needs the package 'diffusers', which is not installed: "
        "pip install 'fastdiff[diffusers]'"
    )
