"""``fastdiff convert``: a published .pt checkpoint in; a directory that describes itself out."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.checkpoints.checkpoint import save
from fastdiff.checkpoints.published import (
    classifier_config_from_state,
    is_classifier,
    unet_config_from_state,
)
from fastdiff.checkpoints.published_file import read_published
from fastdiff.checkpoints.weights import load_weights
from fastdiff.commands.checkpoint_options import new_directory
from fastdiff.errors import InputError
from fastdiff.models import presets
from fastdiff.models.ema import EMA, rate_name
from fastdiff.models.encoder import Encoder
from fastdiff.models.encoder_unet import EncoderUNet
from fastdiff.models.unet import UNet
from fastdiff.models.valueless import valueless
from fastdiff.process.classification import NoisyClassification
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion

ORDERS = {"heads_first": False, "qkv_first": True}
# The files' names in the published training loop: model500000.pt, ema_0.9999_500000.pt.
MODEL_NAME = re.compile(r"model(\d+)\.pt")
EMA_NAME = re.compile(r"ema_(\d*\.\d+)_(\d+)\.pt")

# Of networks that a classifier is none of.
UNET_FLAGS: tuple[str, ...] = ("image_size", "num_heads", "num_head_channels", "num_heads_upsample")
UNET_FLAGS += ("attention_order", "dropout", "super_res", "upsample_from")

# Of create_diffusion, under the names of the published scripts. No weight shows any of them.
DIFFUSION_FLAGS: dict[str, tuple[Any, str]] = {
    "steps": (int, "number of noise levels T it was trained with (--diffusion_steps)"),
    "noise_schedule": (str, "linear, cosine, ..."),
    "learn_sigma": (bool, "the second half of the output channels is the variance"),
    "sigma_small": (bool, "the fixed variance is the posterior's, not beta"),
    "rescale_timesteps": (bool, "the network was given timesteps scaled to 0 ... 1000"),
    "predict_xstart": (bool, "the network predicts x_0 (by default the noise)"),
    "rescale_learned_sigmas": (bool, "train on with the hybrid loss"),
    "use_kl": (bool, "train on with the variational bound"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "--model",
        required=True,
        metavar="FILE.pt",
        help="state dict of improved-diffusion or guided-diffusion, raw or averaged (.safetensors "
        "is read too)",
    )
    parser.add_argument(
        "--key",
        metavar="KEY",
        help="where in the file it lies, if not at the top: state_dict, model, ema.model, ...",
    )
    parser.add_argument(
        "--strip",
        metavar="PREFIX",
        help="take the names that begin with this, without it: module., _orig_mod., model., ...",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument(
        "--ema",
        action="append",
        metavar="FILE.pt",
        help="an average of the same network, which is saved beside it; may be repeated",
    )
    parser.add_argument(
        "--ema-rate",
        action="append",
        metavar="RATE",
        help="its rate, unless the file is called ema_RATE_STEP.pt; one for each --ema, in order",
    )
    for name in ("key", "strip"):
        parser.add_argument(
            f"--ema-{name}",
            action="append",
            metavar="KEY" if name == "key" else "PREFIX",
            help=f"--{name} of the averages, if another than the network's ('' for none): one for "
            "all, or one for each --ema, in order",
        )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="take what the shapes do not show from: " + ", ".join(presets.names()),
    )
    network = parser.add_argument_group("network: what the shapes do not show")
    network.add_argument("--image-size", type=int, metavar="N", help="side of the images")
    heads = network.add_mutually_exclusive_group()
    heads.add_argument("--num-heads", type=int, metavar="N", help="attention heads")
    heads.add_argument("--num-head-channels", type=int, metavar="N", help="width of a head")
    network.add_argument(
        "--num-heads-upsample", type=int, metavar="N", help="heads on the way up, if others"
    )
    network.add_argument(
        "--attention-order",
        choices=ORDERS,
        help="heads_first: improved-diffusion, and guided-diffusion by default; qkv_first: "
        "guided-diffusion's use_new_attention_order",
    )
    network.add_argument("--dropout", type=float, metavar="X", help="to train on with (default: 0)")
    network.add_argument(
        "--super-res",
        action=argparse.BooleanOptionalAction,
        help="half of the input channels are a low-resolution image's; needed where the shapes fit "
        "both",
    )
    network.add_argument(
        "--upsample-from",
        type=int,
        metavar="N",
        help="of a super-resolution network: side of the small images (--small_size)",
    )
    diffusion = parser.add_argument_group("diffusion: the flags of the published scripts")
    for name, (kind, note) in DIFFUSION_FLAGS.items():
        options: dict[str, Any] = {"help": note, "metavar": {int: "N", str: "NAME"}.get(kind)}
        if kind is bool:
            options = {"help": note, "action": argparse.BooleanOptionalAction}
        else:
            options["type"] = kind
        diffusion.add_argument("--" + name.replace("_", "-"), **options)


def run(args: argparse.Namespace) -> int:
    given = vars(args)
    out = new_directory(args.out)
    for name in ("image_size", "num_heads", "num_head_channels", "upsample_from", "steps"):
        if given.get(name, 1) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {given[name]}; expected at least 1")
    averages = rates_of(given.get("ema", []), given.get("ema_rate", []))
    place, ema_places = places_of(given, list(averages.values()))
    step = step_of([args.model, *averages.values()])

    state = read_published(args.model, **place, flags=("--key ", "--strip "))
    model: Encoder
    diffusion: Any
    if is_classifier(state):
        model, process, recipe = classifier_of(args.model, state, given)
        diffusion = NoisyClassification(process)
    else:
        model, process, recipe = unet_of(args.model, state, given)
        diffusion = process
    ema = EMA(model, [float(rate) for rate in averages]) if averages else None
    for (rate, file), ema_place in zip(averages.items(), ema_places, strict=True):
        average = read_published(file, **ema_place, flags=("--ema-key ", "--ema-strip "))
        load_weights(model, average, file)
        assert ema is not None
        ema.load_state_dict(rate, average)
        ema.updates = step or 0
    load_weights(model, state, args.model)
    info = {
        "image_size": model.image_size,
        "channels": model.in_channels,
        "num_classes": model.num_classes,
        "converted_from": Path(args.model).name,
    }
    if (side := upsample_from_of(given)) is not None:
        info["upsample_from"] = side
    save(out, model, diffusion=diffusion, ema=ema, step=step, info=info)
    predicts = {} if is_classifier(state) else {"prediction": process.mean_type}
    chosen = {**predicts, **recipe}
    print(summary(out, model, chosen, list(averages), step))
    return 0


def unet_of(
    file: str, state: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[UNet, GaussianDiffusion, dict[str, Any]]:
    """A network for a U-Net's weights, its process, and that one's arguments."""
    preset = presets.get(given["preset"]).model if "preset" in given else {}
    super_res = given.get("super_res", preset.get("super_res"))
    try:
        shown = unet_config_from_state(state, super_res=super_res)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    config = network_config(file, shown, given)
    recipe = diffusion_recipe(given)
    check_channels(config, recipe)
    missing = missing_flags(config, recipe)
    upsample_from = upsample_from_of(given)
    if config["super_res"] and upsample_from is None:
        missing.append("--upsample-from")
    if not config["super_res"] and upsample_from is not None:
        raise InputError(f"--upsample-from {upsample_from}: {file} is no super-resolution network")
    if missing:
        raise InputError(
            f"{file}: the weights do not show everything; give {', '.join(missing)}; or "
            f"--preset, which knows all of it"
        )
    return UNet(**config), create_diffusion(**recipe), recipe


def upsample_from_of(given: Mapping[str, Any]) -> int | None:
    """The side of a super-resolution network's small images, by the flag or the preset."""
    if "upsample_from" in given or "preset" not in given:
        return given.get("upsample_from")
    return presets.get(given["preset"]).train.get("upsample_from")


def classifier_of(
    file: str, state: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[EncoderUNet, GaussianDiffusion, dict[str, Any]]:
    """As :func:`unet_of`, for the weights of a classifier of noisy images."""
    if "preset" not in given:
        raise InputError(
            f"{file} is a classifier's, whose weights do not show everything; give --preset: "
            + ", ".join(presets.names("EncoderUNet"))
        )
    of_unet = [name for name in UNET_FLAGS if name in given]
    if of_unet:
        raise InputError(
            f"--{of_unet[0].replace('_', '-')} is of a U-Net, and {file} is a classifier's, of "
            "which --preset knows it: leave the flag out"
        )
    preset = presets.get(given["preset"], "EncoderUNet")
    recipe = diffusion_recipe(given)
    config = classifier_config_from_state(state, preset.model)
    return EncoderUNet(**config), create_diffusion(**recipe), recipe


def network_config(file: str, shown: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """UNet's arguments from the shapes, a preset and the flags; None for what none of them says."""
    config: dict[str, Any] = {"image_size": None, "use_new_attention_order": None}
    config |= {"num_heads": None, "num_head_channels": -1}
    if "preset" in given:
        config = preset_config(given["preset"])
        for name, value in shown.items():
            if config[name] != value:
                raise InputError(
                    f"{file} is not a network of preset {given['preset']}: its {name} is {value}, "
                    f"the preset's {config[name]}"
                )
    config |= shown
    if "num_heads" in given:
        config["num_head_channels"] = -1
    if "num_head_channels" in given:
        config["num_heads"] = 1  # it is overridden
    if "attention_order" in given:
        config["use_new_attention_order"] = ORDERS[given["attention_order"]]
    names = ("num_heads", "num_head_channels", "num_heads_upsample", "image_size", "dropout")
    config |= {name: given[name] for name in names if name in given}
    if config["use_new_attention_order"] is None and config["num_heads"] and one_head(config):
        config["use_new_attention_order"] = False  # with one head the two orders are the same
    return config


def preset_config(name: str) -> dict[str, Any]:
    """All of UNet's arguments for a preset."""
    with valueless():
        return UNet(**presets.get(name, "UNet").model).config


def one_head(config: Mapping[str, Any]) -> bool:
    """Whether every attention block has a single head."""
    if config["num_head_channels"] == -1:
        return config["num_heads"] == 1 and config.get("num_heads_upsample", -1) in (-1, 1)
    attended = {config["channel_mult"][-1]}  # the middle block's
    for level, multiplier in enumerate(config["channel_mult"]):
        if 2**level in config["attention_resolutions"]:
            attended.add(multiplier)
    widths = {int(multiplier * config["model_channels"]) for multiplier in attended}
    return widths == {config["num_head_channels"]}


def diffusion_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """create_diffusion's arguments."""
    recipe: dict[str, Any] = {}
    if "preset" in given:  # what it leaves out is off
        recipe = {name: False for name, (kind, _) in DIFFUSION_FLAGS.items() if kind is bool}
        recipe |= presets.get(given["preset"]).diffusion
    return recipe | {name: given[name] for name in DIFFUSION_FLAGS if name in given}


def check_channels(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """InputError where the network's channels are not those of the process."""
    ratio = config["out_channels"] / config["in_channels"]
    if "learn_sigma" in recipe and recipe["learn_sigma"] != (ratio == 2):
        flag = "--learn-sigma" if recipe["learn_sigma"] else "--no-learn-sigma"
        raise InputError(
            f"{flag} does not fit a network with {config['in_channels']} channels in and "
            f"{config['out_channels']} out"
        )


def missing_flags(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """The flags without which the network or its process would be a guess."""
    missing = []
    if config["image_size"] is None:
        missing.append("--image-size")
    if config["num_heads"] is None:
        missing.append("--num-heads or --num-head-channels")
    if config["use_new_attention_order"] is None:
        missing.append(f"--attention-order {'|'.join(ORDERS)}")
    if "steps" not in recipe:
        missing.append("--steps")
    if "noise_schedule" not in recipe:
        missing.append("--noise-schedule")
    if config["out_channels"] == 2 * config["in_channels"]:
        if "learn_sigma" not in recipe:
            missing.append("--learn-sigma")
    elif "sigma_small" not in recipe:
        missing.append("--sigma-small or --no-sigma-small")
    if recipe.get("steps") != 1000 and "rescale_timesteps" not in recipe:
        missing.append("--rescale-timesteps or --no-rescale-timesteps")
    return missing


def rates_of(files: Sequence[str], rates: Sequence[str]) -> dict[str, str]:
    """The averages' files by rate, from the flags or the files' names."""
    if rates and len(rates) != len(files):
        raise InputError(f"{len(rates)} --ema-rate for {len(files)} --ema; give one for each")
    if not rates:
        matches = [EMA_NAME.fullmatch(Path(file).name) for file in files]
        for file, match in zip(files, matches, strict=True):
            if match is None:
                raise InputError(f"{file} is not called ema_RATE_STEP.pt; give its --ema-rate")
        rates = [match.group(1) for match in matches if match is not None]
    averages = {rate_name(rate): file for rate, file in zip(rates, files, strict=True)}
    if len(averages) < len(files):
        raise InputError(f"two averages have one rate: {', '.join(rates)}")
    return averages


def places_of(
    given: Mapping[str, Any], averages: Sequence[str]
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Where in their files the network and each of its averages lie: --key and --strip."""
    place = {name: given.get(name, "") for name in ("key", "strip")}
    each = {}
    for name, of_network in place.items():
        values = given.get(f"ema_{name}", [of_network])
        if len(values) not in (1, len(averages)) or (f"ema_{name}" in given and not averages):
            raise InputError(
                f"{len(values)} --ema-{name} for {len(averages)} --ema; give one for all or one "
                "for each"
            )
        each[name] = values if len(values) == len(averages) else values * len(averages)
    ema_places = [{"key": k, "strip": s} for k, s in zip(each["key"], each["strip"], strict=True)]
    places = [
        (Path(file).resolve(), where["key"], where["strip"].rstrip("."))
        for file, where in zip([given["model"], *averages], [place, *ema_places], strict=True)
    ]
    for number, file in enumerate(averages):
        if places[1 + number] in places[1 : 1 + number]:
            raise InputError(
                f"two --ema are the same average of {file}; give an --ema-key or --ema-strip for "
                "each"
            )
        if places[1 + number] == places[0]:
            raise InputError(
                f"--ema {file} is the file of the network; say with --ema-key or --ema-strip where "
                "in it the average is"
            )
    return place, ema_places


def step_of(files: Sequence[str]) -> int | None:
    """The training step that the files' names say."""
    steps: dict[int, str] = {}
    for file in files:
        name = Path(file).name
        match = MODEL_NAME.fullmatch(name) or EMA_NAME.fullmatch(name)
        if match is not None:
            steps[int(match.groups()[-1])] = name
    if len(steps) > 1:
        raise InputError(f"{' and '.join(steps.values())} are of different steps")
    return next(iter(steps), None)


def summary(
    out: Path,
    model: Encoder,
    diffusion: Mapping[str, Any],
    averages: Sequence[str],
    step: int | None,
) -> str:
    """What was written, with everything that was chosen."""
    count = sum(parameter.numel() for parameter in model.parameters())
    weights = ", ".join(["model", *(f"EMA {rate}" for rate in averages)])
    config = {name: value for name, value in model.config.items() if value not in (None, False)}
    parts = {
        "network": f"{count / 1e6:.1f}M parameters, " + _listed(config),
        "diffusion": _listed(diffusion),
        "weights": weights if step is None else f"{weights}, of step {step}",
    }
    return "\n".join([str(out), *(f"  {name:<11}{text}" for name, text in parts.items())])


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
