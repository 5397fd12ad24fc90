"""Which schedulers there are, and how the pipelines use them."""

from dataclasses import replace
from inspect import signature
from typing import Any

import diffusers

from fastdiff.integrations.diffusers.ddim import DDIMScheduler
from fastdiff.integrations.diffusers.ddpm import DDPMScheduler
from fastdiff.integrations.diffusers.deis_multistep import DEISMultistepScheduler
from fastdiff.integrations.diffusers.dpmsolver_multistep import DPMSolverMultistepScheduler
from fastdiff.integrations.diffusers.euler import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from fastdiff.integrations.diffusers.heun import HeunDiscreteScheduler
from fastdiff.integrations.diffusers.pndm import PNDMScheduler
from fastdiff.integrations.diffusers.unipc_multistep import UniPCMultistepScheduler
from fastdiff.methods.table import COLUMNS, StepTable

# By diffusers' own class.
SCHEDULERS: dict[Any, Any] = {
    getattr(diffusers, kind.__name__): kind
    for kind in (
        DDIMScheduler,
        DDPMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    )
}


def as_called(scheduler: Any, table: StepTable) -> tuple[StepTable, float]:
    """The table, and x_T's standard deviation, with which the pipelines use a scheduler.

    They draw x_T from N(0, I) and give the network what the scheduler returns, also where its own
    x_T is wider and its ``scale_model_input`` scales. They cannot use one whose ``step`` takes no
    generator: that one's levels are then as they should be.
    """
    if "generator" not in signature(type(scheduler).step).parameters:
        return table, float(scheduler.init_noise_sigma)
    packed = table.packed.clone()
    packed[:, COLUMNS.index("input_scale")] = 1.0
    return replace(table, packed=packed, scales_input=False), 1.0
