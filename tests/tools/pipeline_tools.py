"""Small pipelines of diffusers, their images, and that accelerated they are the same."""

import warnings

import diffusers
import numpy as np
import torch

from fastdiff.integrations.diffusers import accelerate_pipeline

BLOCKS = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def unet(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(in_channels=3, **{"out_channels": 3} | BLOCKS | options).eval()


SCHEDULERS = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}
# Under the usual schedule the ε of a network with random weights makes chaos: a difference of 1e-7
# becomes another image within 50 steps. This one ends with more signal.
MILD = {"beta_end": 0.004}


def pipeline(kind="ddpm", scheduler=None, **options):
    scheduler = scheduler or SCHEDULERS[kind](**MILD)
    kinds = {"ddpm": diffusers.DDPMPipeline, "ddim": diffusers.DDIMPipeline}
    pipe = kinds[kind](unet=unet(**options), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, seed=3, **options):
    """(images, the generator's state after them)"""
    generator = torch.Generator().manual_seed(seed)
    arguments = {"batch_size": 2, "num_inference_steps": 50, "output_type": "np"} | options
    images = pipe(generator=generator, **arguments).images
    return images, generator.get_state()


def assert_same(pipe, **options):
    expected, state = drawn(pipe, **options)
    assert accelerate_pipeline(pipe) is pipe
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        actual, state_after = drawn(pipe, **options)
    assert pipe.explain().startswith("eager: CUDA graphs need a CUDA device")
    assert np.abs(actual - expected).max() <= 1e-3
    assert torch.equal(state_after, state)
    return actual
