"""Do the network, the process, the data and the settings fit each other? One line when not."""

import hashlib
from typing import Any

import torch
from torch import nn

from fastdiff.data import ImageDataset, Items, match_classes
from fastdiff.data.dataset import check_bytes
from fastdiff.errors import InputError
from fastdiff.evaluation.published import check_scored
from fastdiff.models.encoder import Encoder
from fastdiff.models.encoder_unet import EncoderUNet
from fastdiff.models.unet import UNet
from fastdiff.models.wrappers import unwrapped
from fastdiff.optional import version_of
from fastdiff.process.classification import NoisyClassification
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.low_res import low_res_size
from fastdiff.training.batches import describe, readable, size_of
from fastdiff.training.config import TrainConfig
from fastdiff.training.network import check_argument
from fastdiff.training.run import Run


def checked(model: nn.Module, diffusion: Any, data: Any, config: TrainConfig) -> Any:
    """``data`` as a trainer reads it. InputError for a combination that cannot be trained."""
    data = readable(data)
    if not isinstance(model, nn.Module):
        raise InputError(f"Trainer trains an nn.Module, got a {type(model).__name__}")
    missing = [
        n for n in ("training_losses", "to_config", "continuous") if not hasattr(diffusion, n)
    ]
    if missing:
        raise InputError(
            f"Trainer needs a process such as GaussianDiffusion; a {type(diffusion).__name__} has "
            f"no {' and no '.join(missing)}, by which it is trained and saved"
        )
    network: Any = unwrapped(model)
    if isinstance(network, Encoder):
        _check_encoder(network, diffusion, data)
    if isinstance(diffusion, NoisyClassification):
        _check_classification(data, config)
    if config.label_dropout and getattr(network, "null_label", None) is None:
        raise InputError(
            f"label_dropout is {config.label_dropout}, which needs a class-conditional network "
            "with null_class=True, or one whose null_label says what stands for no label"
        )
    if config.self_condition:
        check_argument(model, config.self_condition, "self_condition")
    _check_upsampling(network, data, config)
    if config.nll_every and not isinstance(diffusion, GaussianDiffusion):
        raise InputError(
            f"nll_every is {config.nll_every}, and bits/dim are those of a GaussianDiffusion, not "
            f"of a {type(diffusion).__name__}: set it to 0"
        )
    if config.fid_every:
        _check_scored(data)
    shape = sample_shape(data)
    if config.sample_every and shape and (len(shape) != 3 or shape[0] not in (1, 3, 4)):
        raise InputError(
            f"sample grids need pictures of 1, 3 or 4 channels, these have shape {shape}; "
            "set sample_every to 0"
        )
    return data


def _check_upsampling(network: nn.Module, data: Any, config: TrainConfig) -> None:
    """InputError unless the network takes just the small images that the settings make."""
    if isinstance(network, UNet):
        if not config.upsample_from and network.super_res and isinstance(data, ImageDataset):
            raise InputError(
                "a super-resolution network needs upsample_from, the side of the small images that "
                "it is given"
            )
        for setting, argument in (("upsample_from", "super_res"), ("cond_noise", "noise_cond")):
            if getattr(config, setting) and not getattr(network, argument):
                raise InputError(
                    f"{setting} is {getattr(config, setting)}, which needs a UNet of "
                    f"{argument}=True; set it to 0"
                )
        if config.upsample_from and network.noise_cond and not config.cond_noise:
            raise InputError(
                "the network has noise_cond, and cond_noise is 0: give the highest level to train"
            )
    if not config.upsample_from:
        return
    shape = sample_shape(data)
    if shape is None or len(shape) != 3:
        raise InputError(
            f"upsample_from is {config.upsample_from}, which needs images of one known size: a set "
            "of images (fastdiff.data.load_dataset), or items (C, H, W)"
        )
    low_res_size(shape[1:], config.upsample_from)
    check_argument(network, "low_res", "upsample_from")
    if config.cond_noise:
        check_argument(network, "noise_level", "cond_noise")


def _check_scored(data: Any) -> None:
    """InputError unless samples of such data can be compared with them."""
    if not isinstance(data, ImageDataset):
        raise InputError(
            "fid_every needs a set of images (fastdiff.data.load_dataset); set it to 0"
        )
    check_scored(data, "fid_every, a Fréchet distance,")


def sample_shape(data: Any) -> tuple[int, ...] | None:
    """The shape of x, (C, ...), where it is known before data are drawn."""
    return data.shape if isinstance(data, ImageDataset | Items) else None


def _check_classification(data: Any, config: TrainConfig) -> None:
    """InputError where images have no classes, or what a classifier cannot do is asked of it."""
    for name in ("sample_every", "fid_every"):
        if getattr(config, name):
            raise InputError(
                f"{name} is {getattr(config, name)}, and a classifier draws no samples: set it to 0"
            )
    if isinstance(data, ImageDataset) and data.num_classes is None:
        raise InputError("a classifier is trained on images with classes; these have no labels")


def _check_encoder(model: Encoder, diffusion: Any, data: Any) -> None:
    """InputError where our own network does not fit the process or the data."""
    process = type(diffusion).__name__
    if isinstance(model, EncoderUNet) != isinstance(diffusion, NoisyClassification):
        remedy = "an EncoderUNet" if isinstance(model, UNet) else "NoisyClassification(diffusion)"
        raise InputError(f"a {process} does not train a network {model.kind}: give {remedy}")
    if isinstance(data, ImageDataset):
        check_images(model, data, "training")
    shape = sample_shape(data)
    if shape is None:
        return
    if len(shape) != 1 + model.dims:
        raise InputError(
            f"the network is {model.dims}-dimensional; x of the data has shape {tuple(shape)}"
        )
    channels, *sizes = shape
    if model.in_channels != channels:
        raise InputError(
            f"x of the data has {channels} channels, the network takes {model.in_channels}"
        )
    if isinstance(model, EncoderUNet) and model.pool == "attention" and tuple(sizes) != model.sides:
        raise InputError(
            f"x of the data is {'x'.join(map(str, sizes))}; the network's attention pooling is for "
            f"{'x'.join(map(str, model.sides))} (image_size)"
        )
    learned = getattr(diffusion, "learns_variance", False)
    wanted = channels * (2 if learned else 1)
    if isinstance(model, UNet) and model.out_channels != wanted:
        raise InputError(
            f"the network has {model.out_channels} output channels; {channels}-channel "
            f"images with var_type {diffusion.var_type!r} need {wanted}"
        )
    halvings = len(model.config["channel_mult"]) - 1
    if min(sizes) < 2**halvings:
        raise InputError(
            f"images of {'x'.join(map(str, sizes))} are too small for a network that halves them "
            f"{halvings} times; use larger images (image_size) or fewer levels (channel_mult)"
        )


def match_eval(model: nn.Module, data: Any, eval_data: Any, config: TrainConfig) -> Any:
    """What bits/dim are measured on: ``eval_data`` with the classes of ``data``, or these."""
    eval_data = eval_data if eval_data is None else readable(eval_data)
    if isinstance(eval_data, ImageDataset) and isinstance(data, ImageDataset):
        classes = getattr(unwrapped(model), "num_classes", None)
        eval_data = match_classes(eval_data, data.class_names, classes, "the evaluation set")
    found = data if eval_data is None else eval_data
    if isinstance(model, Encoder) and isinstance(found, ImageDataset):
        check_images(model, found, "evaluation")
    if config.nll_every:
        _check_bits(config, found)
    return found


def _check_bits(config: TrainConfig, data: Any) -> None:
    """InputError unless ``data`` are what has bits/dim: items of bytes."""
    if isinstance(data, ImageDataset):
        check_bytes(data, "nll_every, a bound on bits/dim,")
    elif not isinstance(data, Items):
        raise InputError(
            f"nll_every is {config.nll_every}, which needs data with len() and items: give "
            "eval_dataset, or set it to 0"
        )
    elif data.dtype != torch.uint8:
        raise InputError(
            f"nll_every is {config.nll_every}, and bits/dim are those of uint8 values, not of "
            f"{data.dtype}: give eval_dataset, or set it to 0"
        )


def check_images(model: Any, dataset: ImageDataset, what: str) -> None:
    """Raise InputError when the network cannot be given these images and labels."""
    if dataset.channels != model.in_channels:
        raise InputError(
            f"the {what} images have {dataset.channels} channels, "
            f"the network takes {model.in_channels}"
        )
    if model.num_classes is not None and dataset.num_classes != model.num_classes:
        raise InputError(
            f"the network has {model.num_classes} classes, the {what} images have "
            f"{dataset.num_classes or 'no labels'}"
        )


def facts(trainer: Run) -> dict[str, Any]:
    """What must be the same on every rank."""
    parameters = [(n, list(p.shape)) for n, p in trainer.model.named_parameters()]
    return {
        "fastdiff": version_of("fastdiff"),
        "torch": torch.__version__,
        **{f"setting {name}": value for name, value in trainer.config.to_dict().items()},
        "the process": trainer.diffusion.to_config(),
        "the network": hashlib.sha256(repr(parameters).encode()).hexdigest(),
        "the number of items": size_of(trainer.data),
        "the data": describe(trainer.data),
    }
