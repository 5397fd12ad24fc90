"""Published configurations by name: network, diffusion and training together.

Sources: Ho et al. 2020, appendix B ("ddpm-*"); Nichol & Dhariwal 2021, appendix A and the released
run flags ("iddpm-*"); Dhariwal & Nichol 2021, appendix I and the released run flags ("adm-*",
"classifier-*").
The DDPM rows are computed by the same class as the others: the structure and the parameter count
are Ho et al.'s, but two constants are improved-diffusion's: epsilon 1e-5 instead of 1e-6 in the
norms, and the timestep embedding [cos, sin] with divisor half instead of [sin, cos] with half − 1.
Released weights of Ho et al. need theirs, and their padding: ``fastdiff.load`` of a diffusers
directory sets the arguments of ``UNet`` that a preset does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdiff.errors import InputError


@dataclass(frozen=True)
class Preset:
    """One published system.

    Attributes:
        name: as in ``presets.get``.
        model: arguments of ``network``.
        diffusion: arguments of ``create_diffusion``.
        train: published hyperparameters, under the names of ``TrainConfig``; but the averages warm
            up, as everywhere (``ema_warmup``).
        params: parameters of the network as published, in millions, to the precision printed there.
        network: "UNet", or "EncoderUNet" of a classifier of noisy images.
    """

    name: str
    model: Mapping[str, Any]
    diffusion: Mapping[str, Any]
    train: Mapping[str, Any]
    params: str
    network: str = "UNet"


def get(name: str, network: str | None = None) -> Preset:
    """The preset of that name.

    Raises:
        InputError: there is none, or it is of another network than ``network``.
    """
    found = PRESETS.get(name)
    if found is None:
        raise InputError(f"no preset named {name!r}; there are {', '.join(names(network))}")
    if network not in (None, found.network):
        raise InputError(
            f"preset {name} is of a network {found.network}, not of {network}; of these there are "
            + ", ".join(names(network))
        )
    return found


def names(network: str | None = None) -> list[str]:
    """The names of all presets, or of those of that network."""
    return [name for name, preset in PRESETS.items() if network in (None, preset.network)]


_EMA = (0.9999,)

_DDPM = {"in_channels": 3, "out_channels": 3, "model_channels": 128, "num_res_blocks": 2}
_IDDPM = {
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 128,
    "num_res_blocks": 3,
    "num_heads": 4,
    "use_scale_shift_norm": True,
}
_IMAGENET_64 = {
    **_IDDPM,
    "image_size": 64,
    "channel_mult": (1, 2, 3, 4),
    "attention_resolutions": (4, 8),
}
_LSUN_256 = {
    **_DDPM,
    "image_size": 256,
    "channel_mult": (1, 1, 2, 2, 4, 4),
    "attention_resolutions": (16,),
}

_LINEAR_1000 = {"steps": 1000, "noise_schedule": "linear"}
_COSINE_4000 = {"steps": 4000, "noise_schedule": "cosine", "learn_sigma": True}
_HYBRID = {**_COSINE_4000, "rescale_timesteps": True, "rescale_learned_sigmas": True}


def _scaled(channels: int, params: str) -> Preset:
    """One width of the scaling family (Nichol & Dhariwal 2021, section 6): the learning rate goes
    with 1/sqrt(width), 1e-4 at 128."""
    return Preset(
        name=f"iddpm-imagenet64-{channels}",
        model={**_IMAGENET_64, "model_channels": channels},
        diffusion=_HYBRID,
        train={"lr": 1e-4 * (128 / channels) ** 0.5, "batch_size": 128, "ema": _EMA},
        params=params,
    )


def _classifier(
    name: str,
    image_size: int,
    channel_mult: tuple[float, ...],
    num_res_blocks: int,
    params: str,
    noise_schedule: str = "linear",
) -> Preset:
    """A classifier of noisy ImageNet (Dhariwal & Nichol 2021, appendix I), as released: what
    ``create_classifier`` makes by its defaults, but for the depth of the smallest one."""
    large_batch = image_size == 64
    return Preset(
        name=name,
        model={
            "image_size": image_size,
            "in_channels": 3,
            "out_channels": 1000,
            "model_channels": 128,
            "num_res_blocks": num_res_blocks,
            "channel_mult": channel_mult,
            "attention_resolutions": tuple(image_size // side for side in (32, 16, 8)),
            "num_head_channels": 64,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
            "pool": "attention",
        },
        diffusion={"steps": 1000, "noise_schedule": noise_schedule},
        train={
            "lr": 6e-4 if large_batch else 3e-4,
            "lr_schedule": "linear",
            "batch_size": 1024 if large_batch else 256,
            "steps": 500_000 if image_size >= 256 else 300_000,
            "weight_decay": 0.2 if large_batch else 0.05,
            "grad_clip": 0.0,
            "ema": (),
        },
        params=params,
        network="EncoderUNet",
    )


def _upsampler(
    small: int, size: int, *, attention: tuple[int, ...], heads: Mapping[str, int], params: str
) -> Preset:
    """A super-resolution network of guided-diffusion, which is given clean small images."""
    return Preset(
        name=f"adm-{small}-{size}",
        model={
            **_IDDPM,
            "image_size": size,
            "model_channels": 192,
            "num_res_blocks": 2,
            "channel_mult": (1, 1, 2, 2, 4, 4),
            "attention_resolutions": attention,
            "num_heads": 1,
            **heads,
            "num_classes": 1000,
            "resblock_updown": True,
            "super_res": True,
        },
        diffusion={"steps": 1000, "noise_schedule": "linear", "learn_sigma": True},
        train={
            "lr": 1e-4,
            "batch_size": 256,
            "steps": 500_000 if size == 256 else 1_050_000,
            "grad_clip": 0.0,
            "ema": _EMA,
            "upsample_from": small,
        },
        params=params,
    )


_ALL = (
    Preset(
        name="ddpm-cifar10",
        model={
            **_DDPM,
            "image_size": 32,
            "channel_mult": (1, 2, 2, 2),
            "attention_resolutions": (2,),
            "dropout": 0.1,
        },
        diffusion=_LINEAR_1000,
        train={
            "lr": 2e-4,
            "batch_size": 128,
            "steps": 800_000,
            "warmup": 5000,
            "grad_clip": 1.0,
            "flip": True,
            "ema": _EMA,
        },
        params="35.75",
    ),
    Preset(
        name="ddpm-256",
        model=_LSUN_256,
        diffusion={**_LINEAR_1000, "sigma_small": True},
        # LSUN bedroom; cat 1.8M, church 1.2M and CelebA-HQ 0.5M steps.
        train={
            "lr": 2e-5,
            "batch_size": 64,
            "steps": 2_400_000,
            "warmup": 5000,
            "grad_clip": 1.0,
            "ema": _EMA,
        },
        params="113.7",
    ),
    Preset(
        name="iddpm-cifar10",
        model={
            **_IDDPM,
            "image_size": 32,
            "channel_mult": (1, 2, 2, 2),
            "attention_resolutions": (2, 4),
            "dropout": 0.3,
        },
        diffusion=_HYBRID,
        train={"lr": 1e-4, "batch_size": 128, "steps": 500_000, "grad_clip": 0.0, "ema": _EMA},
        params="52.5",
    ),
    Preset(
        name="iddpm-imagenet64",
        model=_IMAGENET_64,
        diffusion=_HYBRID,
        train={"lr": 1e-4, "batch_size": 128, "steps": 1_500_000, "grad_clip": 0.0, "ema": _EMA},
        params="121",
    ),
    Preset(
        name="iddpm-imagenet64-cond",
        model={**_IMAGENET_64, "model_channels": 192, "num_classes": 1000},
        diffusion=_COSINE_4000,
        train={"lr": 3e-4, "batch_size": 2048, "steps": 250_000, "grad_clip": 0.0, "ema": _EMA},
        params="273",
    ),
    Preset(
        name="iddpm-lsun256",
        model={**_LSUN_256, "out_channels": 6},
        diffusion={**_LINEAR_1000, "learn_sigma": True},
        train={"lr": 1e-4, "batch_size": 128, "steps": 1_200_000, "grad_clip": 0.0, "ema": _EMA},
        params="113.7",
    ),
    Preset(
        name="adm-64",
        model={
            **_IMAGENET_64,
            "model_channels": 192,
            "attention_resolutions": (2, 4, 8),
            "num_heads": 1,
            "num_head_channels": 64,
            "num_classes": 1000,
            "dropout": 0.1,
            "resblock_updown": True,
            "use_new_attention_order": True,
        },
        diffusion={"steps": 1000, "noise_schedule": "cosine", "learn_sigma": True},
        train={"lr": 3e-4, "batch_size": 2048, "steps": 540_000, "grad_clip": 0.0, "ema": _EMA},
        params="296",
    ),
    _upsampler(64, 256, attention=(8, 16, 32), heads={"num_heads": 4}, params="312"),
    _upsampler(128, 512, attention=(16, 32), heads={"num_head_channels": 64}, params="309"),
    _scaled(64, "30"),
    _scaled(96, "68"),
    _scaled(128, "121"),
    _scaled(192, "272"),
    _classifier("classifier-64", 64, (1, 2, 3, 4), 4, "65", noise_schedule="cosine"),
    _classifier("classifier-128", 128, (1, 1, 2, 3, 4), 2, "43"),
    _classifier("classifier-256", 256, (1, 1, 2, 2, 4, 4), 2, "54"),
    _classifier("classifier-512", 512, (0.5, 1, 1, 2, 2, 4, 4), 2, "54"),
    # Ours: 1×8×8 handwritten digits, small enough to train on a laptop's CPU in minutes.
    Preset(
        name="digits",
        model={
            "image_size": 8,
            "in_channels": 1,
            "out_channels": 2,
            "model_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": (1, 2),
            "attention_resolutions": (2,),
            "num_heads": 4,
            "use_scale_shift_norm": True,
        },
        diffusion={
            "steps": 1000,
            "noise_schedule": "cosine",
            "learn_sigma": True,
            "rescale_timesteps": True,
            "rescale_learned_sigmas": True,
        },
        train={
            "lr": 1e-3,
            "lr_schedule": "linear",
            "batch_size": 64,
            "steps": 1300,
            "warmup": 100,
            "ema": (0.995,),
        },
        params="0.8",
    ),
    # Ours, for the process of "digits".
    Preset(
        name="classifier-digits",
        model={
            "image_size": 8,
            "in_channels": 1,
            "out_channels": 10,
            "model_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": (1, 2),
            "attention_resolutions": (2,),
            "num_head_channels": 16,
            "use_scale_shift_norm": True,
            "pool": "attention",
        },
        diffusion={"steps": 1000, "noise_schedule": "cosine", "rescale_timesteps": True},
        train={
            "lr": 1e-3,
            "lr_schedule": "linear",
            "batch_size": 64,
            "steps": 500,
            "warmup": 50,
            "weight_decay": 0.05,
            "ema": (),
        },
        params="0.4",
        network="EncoderUNet",
    ),
)

PRESETS = {preset.name: preset for preset in _ALL}
PRESETS["ddpm-lsun256"] = PRESETS["ddpm-256"]
