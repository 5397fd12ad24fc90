"""What ``fastdiff train`` makes of a preset, flags and images: the network and what trains it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.commands.train_options import part_of
from fastdiff.data import ImageDataset
from fastdiff.errors import InputError
from fastdiff.models import presets
from fastdiff.models.encoder_unet import EncoderUNet
from fastdiff.models.unet import UNet
from fastdiff.process.classification import NoisyClassification
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.training import TrainConfig


def built(
    preset: presets.Preset, given: Mapping[str, Any], dataset: ImageDataset, config: TrainConfig
) -> tuple[Any, Any]:
    """A new network and what it is trained by: a process, or a classifier's training."""
    diffusion = build_diffusion(preset.diffusion, part_of(given, "diffusion"))
    arguments = {**preset.model, **part_of(given, "model")}
    if preset.network == "EncoderUNet":
        return build_classifier(arguments, dataset), NoisyClassification(diffusion)
    check_pool(f"the preset {preset.name}", UNet, arguments)
    return build_model(arguments, diffusion, dataset, config), diffusion


def build_diffusion(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> GaussianDiffusion:
    """create_diffusion with ``recipe``, where a flag replaces whatever else decides its matter."""
    recipe = dict(recipe)
    if "diffusion_steps" in flags:
        recipe["steps"] = flags["diffusion_steps"]
    for name in ("noise_schedule", "rescale_timesteps", "zero_terminal_snr"):
        if name in flags:
            recipe[name] = flags[name]
    if "learn_sigma" in flags:
        # The published default with a learned variance: the hybrid loss.
        _decide(recipe, {"learn_sigma": flags["learn_sigma"]}, "sigma_small", "var_type")
        if flags["learn_sigma"] and not recipe.get("use_kl"):
            recipe["rescale_learned_sigmas"] = recipe.get("loss_type") in (None, "rescaled_mse")
    if "variance" in flags:
        if flags.get("learn_sigma", False) and flags["variance"] != "learned_range":
            raise InputError(f"--learn-sigma contradicts --variance {flags['variance']}: give one")
        _decide(recipe, {"var_type": flags["variance"]}, "learn_sigma", "sigma_small")
    if "predict" in flags:
        _decide(recipe, {"mean_type": flags["predict"]}, "predict_xstart")
    if "loss" in flags:
        _decide(recipe, {"loss_type": flags["loss"]}, "use_kl", "rescale_learned_sigmas")
    if "min_snr" in flags:
        gamma = flags["min_snr"]
        recipe["loss_weighting"] = "min_snr" if gamma else None
        recipe["min_snr_gamma"] = gamma or 5.0
    return create_diffusion(**recipe)


def _decide(recipe: dict[str, Any], choice: dict[str, Any], *overruled: str) -> None:
    for name in overruled:
        recipe.pop(name, None)
    recipe.update(choice)


def build_model(
    arguments: Mapping[str, Any],
    diffusion: GaussianDiffusion,
    dataset: ImageDataset,
    config: TrainConfig,
) -> UNet:
    """The network for these images: their channels, classes and size replace a preset's."""
    height, width = dataset.image_size
    return UNet(
        **{
            **arguments,
            "in_channels": dataset.channels,
            "out_channels": dataset.channels * (2 if diffusion.learns_variance else 1),
            "num_classes": dataset.num_classes,
            "null_class": config.label_dropout > 0 and dataset.num_classes is not None,
            "image_size": height if height == width else [height, width],
        }
    )


def build_classifier(arguments: Mapping[str, Any], dataset: ImageDataset) -> EncoderUNet:
    """The classifier of these images, as :func:`build_model`. InputError where they have no
    classes."""
    if dataset.num_classes is None:
        raise InputError("a classifier needs images with classes: leave --no-class-cond out")
    height, width = dataset.image_size
    return EncoderUNet(
        **{
            **arguments,
            "in_channels": dataset.channels,
            "out_channels": dataset.num_classes,
            "image_size": height if height == width else [height, width],
        }
    )


def check_pool(what: str | Path, kind: type, arguments: Mapping[str, Any]) -> None:
    """InputError for a classifier's argument that another network has not got."""
    if "pool" in arguments and kind is not EncoderUNet:
        raise InputError(
            f"--pool is of a classifier, and {what} is of a {kind.__name__}: leave the flag out, "
            f"or give --preset {', '.join(presets.names('EncoderUNet'))}"
        )
