"""What the stages' passes cost on this machine, on the very networks that they will run."""

from collections.abc import Sequence

import torch

from fastdiff.commands.reproduce_request import Training
from fastdiff.commands.reproduce_stages import Stages
from fastdiff.commands.train_build import build_model
from fastdiff.experiments.plan import Rates, Stage
from fastdiff.experiments.rates import (
    Rate,
    at_once,
    feature_rate,
    noise_images,
    sampling_rate,
    scoring_rate,
    training_rate,
)

BATCH = 64  # of fastdiff sample, nll and evaluate


def measured(stages: Stages, left: Sequence[Stage], device: torch.device) -> Rates:
    """Of each kind of pass that is left to do, by each network."""
    rates: dict[tuple[str, str], Rate] = {}
    data = stages.request.data
    count = at_once(device, data.image_size)
    images = noise_images(count, data.image_size, data.channels, data.num_classes)
    for name, source in stages.networks.items():
        kinds = {stage.kind for stage in left if stage.network == name}
        if not kinds:
            continue
        diffusion = source.diffusion
        if isinstance(source, Training):
            model = build_model(source.model, diffusion, images, source.config)
            if "training" in kinds:
                rates[name, "training"] = training_rate(
                    model, diffusion, images, source.config, device
                )
        else:
            model = source.model
        for kind, rate in (("sampling", sampling_rate), ("scoring", scoring_rate)):
            if kind in kinds:
                count = min(stage.passes for stage in left if stage.kind == kind)
                rates[name, kind] = rate(model, diffusion, images, min(BATCH, count), device)
    if any(stage.kind == "features" for stage in left):
        rates["", "features"] = feature_rate(stages.features, images, device)
    return rates
