"""Several generators: one for each sample of a batch, or one line with both counts."""

import diffusers
import pytest
import torch

from diffusers_format_tools import TINY, theirs
from fastdiff.errors import InputError
from fastdiff.integrations.diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    accelerate_pipeline,
)

SCHEDULERS = {
    "ddpm": (DDPMScheduler, {}, {}),
    "ddpm, stock step": (DDPMScheduler, {"thresholding": True}, {}),
    "ddim": (DDIMScheduler, {}, {}),
    "ddim, eta": (DDIMScheduler, {}, {"eta": 1.0}),
    "ddim, stock step": (DDIMScheduler, {"thresholding": True}, {"eta": 1.0}),
    "dpm-solver": (DPMSolverMultistepScheduler, {}, {}),
    "euler": (EulerDiscreteScheduler, {}, {}),
    "euler, stock step": (EulerDiscreteScheduler, {}, {"s_churn": 2.0}),
    "euler, ancestral": (EulerAncestralDiscreteScheduler, {}, {}),
    "sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
}
PIPELINES = {
    "ddpm": (diffusers.DDPMPipeline, diffusers.DDPMScheduler),
    "ddim": (diffusers.DDIMPipeline, diffusers.DDIMScheduler),
    "ddpm, diffusers' own loop": (diffusers.DDPMPipeline, diffusers.PNDMScheduler),
}


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("count", [0, 3])
def test_a_step_names_both_counts(name, count):
    kind, config, options = SCHEDULERS[name]
    scheduler = kind(**config)
    scheduler.set_timesteps(4)
    x, t = torch.randn(2, 3, 4, 4), scheduler.timesteps[0]
    with pytest.raises(InputError, match=f"^{count} generators for a batch of 2; give one each$"):
        scheduler.step(x, t, x, generator=generators(count), **options)
    # Nothing has moved: the same step can be taken, and a list of one is the generator itself.
    one = scheduler.step(x, t, x, generator=generators(2), **options).prev_sample
    scheduler.set_timesteps(4)
    again = scheduler.step(x, t, x, generator=generators(2), **options).prev_sample
    assert torch.equal(one, again)
    for alone in (generators(1), generators(1)[0]):
        scheduler.set_timesteps(4)
        assert scheduler.step(x, t, x, generator=alone, **options).prev_sample.shape == x.shape


@pytest.mark.parametrize("given", [(1,), 7, [7], "seed"])
def test_what_is_no_generator(given):
    scheduler = DDPMScheduler()
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(InputError, match="generator is a .*; expected a torch.Generator or a list"):
        scheduler.step(x, 10, x, generator=given)


@pytest.mark.filterwarnings("ignore:the pipeline runs through:RuntimeWarning")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_names_both_counts(name):
    kind, scheduler = PIPELINES[name]
    pipe = accelerate_pipeline(kind(theirs(TINY), scheduler()))
    pipe.set_progress_bar_config(disable=True)
    counts = (0, 1, 3) if kind is diffusers.DDIMPipeline else (0, 3)
    for count in counts:
        with pytest.raises(InputError, match=rf"^{count} generators? for a batch of 2; give one"):
            pipe(batch_size=2, generator=generators(count), num_inference_steps=2)
    if "own loop" not in name:
        call = {"batch_size": 2, "num_inference_steps": 2, "output_type": "np"}
        images = pipe(generator=generators(2), **call).images
        assert images.shape == (2, 8, 8, 3)
