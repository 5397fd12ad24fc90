"""diffusers' DDIMPipeline as it is, and after ``accelerate_pipeline``: one line, the same images.

DDPM CIFAR-10's network with random weights, in one run: 50 steps at batch 1, 10 at batch 8.
"""

import pytest
import torch

from conftest import Case
from harness import peers
from harness.timing import Contender

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed here")

TARGETS = {"float32": 1.15, "bfloat16": 2.2}


def pipeline(device, **options):
    """The same weights in each; with options, accelerated."""
    from fastdiff.integrations.diffusers import accelerate_pipeline

    unet = peers.diffusers_network("ddpm-cifar10").eval()
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler()).to(device)
    pipe.set_progress_bar_config(disable=True)
    return accelerate_pipeline(pipe, **options) if options else pipe


def call(pipe, batch, steps, device):
    generator = torch.Generator(device)

    def sample():
        generator.manual_seed(0)
        given = {"generator": generator, "num_inference_steps": steps, "output_type": "pt"}
        return pipe(batch_size=batch, **given).images

    return sample


@pytest.mark.parametrize("batch, steps", [(1, 50), (8, 10)])
def test_one_line(race, device, dtype, batch, steps):
    name = str(dtype).removeprefix("torch.")
    options = {"dtype": None if dtype == torch.float32 else dtype}
    ours = call(pipeline(device, **options), batch, steps, device)
    stock = call(pipeline(device), batch, steps, device)
    error = (ours() - stock()).square().mean().log10().item() * -10
    race(
        Case("pipeline", "ddpm-cifar10", dtype, batch, targets={"diffusers": TARGETS[name]}),
        Contender("fastdiff", ours, capturable=False),
        [Contender("diffusers", stock, capturable=False)],
        rounds=3,
        extra={"steps": steps, "psnr_db": error},
    )
