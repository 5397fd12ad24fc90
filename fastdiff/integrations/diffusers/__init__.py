"""diffusers' schedulers with a fused step.

    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

Each is a subclass of the scheduler of its name and gives its results: the configuration, the
timesteps, the attributes and the order of the random draws are diffusers' own. A step is one
kernel (``fastdiff.ops.posterior_step``) where a row of a ``fastdiff.StepTable`` can say it, and the
stock step elsewhere; ``why_stock`` tells which, and why. Differences, all of them of precision:

- bfloat16 and float16 samples are stepped in float32 and rounded once;
- ``add_noise`` and ``get_velocity`` are computed in float32: diffusers rounds ᾱ to the sample's
  dtype first, and in bfloat16 early timesteps get no noise.

A pipeline or a scheduler that is saved loads in diffusers without fastdiff.
"""

from fastdiff.optional import require

require("diffusers", "diffusers")

from fastdiff.integrations.diffusers.ddim import DDIMScheduler
from fastdiff.integrations.diffusers.ddpm import DDPMScheduler
from fastdiff.integrations.diffusers.deis_multistep import DEISMultistepScheduler
from fastdiff.integrations.diffusers.dpmsolver_multistep import DPMSolverMultistepScheduler
from fastdiff.integrations.diffusers.euler import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from fastdiff.integrations.diffusers.heun import HeunDiscreteScheduler
from fastdiff.integrations.diffusers.pipelines import accelerate_pipeline, restore_pipeline
from fastdiff.integrations.diffusers.pndm import PNDMScheduler
from fastdiff.integrations.diffusers.unipc_multistep import UniPCMultistepScheduler

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "accelerate_pipeline",
    "restore_pipeline",
]
