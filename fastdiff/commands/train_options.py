"""The flags of ``fastdiff train``: of the run, the training, the network and the process."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastdiff.commands.config_file import read_config
from fastdiff.commands.data_options import KINDS_OF_DATA, READING, add_reading_arguments
from fastdiff.commands.train_process import KINDS
from fastdiff.models import presets
from fastdiff.models.encoder_unet import POOLS
from fastdiff.process.losses import LOSS_TYPES
from fastdiff.process.reverse import MEAN_TYPES, VAR_TYPES
from fastdiff.training import TrainConfig

DEFAULT_PRESET = "digits"
DATA = ("data", "eval_data", "image_size", "channels", "class_cond", *READING)
METAVARS: dict[Any, str] = {int: "N", float: "X", str: "NAME"}


def numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """An argparse type: values separated by commas; "none" for no value."""

    def parse(text: str) -> tuple[Any, ...]:
        return () if text == "none" else tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"  # argparse prints it: "invalid list of int value"
    return parse


# Flags that are not given leave no trace in the namespace, so that a preset (or, on resuming, the
# checkpoint) decides. The destination says what a flag belongs to: "model.dropout", "train.lr".
MODEL_FLAGS: dict[str, tuple[Any, str]] = {
    "model_channels": (int, "base width"),
    "channel_mult": (numbers(float), "width of each level over the base width, as in 1,2,2"),
    "num_res_blocks": (int, "residual blocks per level"),
    "attention_resolutions": (
        numbers(int),
        "downsampling factors (1, 2, 4, ...) at which attention stands, or none",
    ),
    "num_heads": (int, "attention heads"),
    "num_head_channels": (int, "width of a head; overrides num-heads unless -1"),
    "num_heads_upsample": (int, "attention heads on the way up; -1: as num-heads"),
    "dropout": (float, "rate inside the residual blocks"),
    "norm_num_groups": (int, "groups of every norm, or as many of them as divide its channels"),
    "use_scale_shift_norm": (bool, "FiLM instead of adding the embedding"),
    "resblock_updown": (bool, "resample inside residual blocks"),
    "conv_resample": (bool, "resample with convolutions"),
    "use_new_attention_order": (bool, "qkv rows [Q | K | V] instead of interleaved per head"),
    "use_checkpoint": (bool, "recompute activations in backward, for memory"),
    "pool": (str, "of a classifier: what makes one vector of its features: " + ", ".join(POOLS)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.argument_default = argparse.SUPPRESS
    _add_run_flags(parser)
    _add_start_flags(parser)
    _add_data_flags(parser)
    _add_train_flags(parser.add_argument_group("training (a preset has its own defaults)"))
    _add_model_flags(parser.add_argument_group("network (defaults: the preset's)"))
    _add_diffusion_flags(
        parser.add_argument_group(
            "diffusion (defaults: the preset's, and of another process than its own those of the "
            "process)"
        )
    )


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What flags say, and where they do not, the file of --config."""
    given = vars(args)
    if "config" not in given:
        return given
    parts = {
        "": _add_start_flags,
        "data": _add_data_flags,
        "train": _add_train_flags,
        "model": _add_model_flags,
        "diffusion": _add_diffusion_flags,
    }
    return {**read_config(Path(given["config"]), parts), **given}


def recipe_of(given: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """What starts this run again, as --config takes it; but for [train], which the run knows."""
    return {
        "preset": preset,
        **{name: given[name] for name in ("init", "init_weights") if name in given},
        "data": {name: given[name] for name in DATA if name in given},
        "model": part_of(given, "model"),
        "diffusion": part_of(given, "diffusion"),
    }


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="RUN_DIR", help="where everything goes")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="settings in TOML: preset, init, and the tables [data], [train], [model] and "
        "[diffusion] of flags by their names; flags override them. A run leaves its own run.toml",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint in RUN_DIR, or start there if it has none",
    )
    parser.add_argument(
        "--data-changed",
        action="store_true",
        help="resume on other images than before (fewer, more): their order starts anew",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_start_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="network, diffusion and hyperparameters to start from (default: "
        f"{DEFAULT_PRESET}; classifier-* train a classifier that guides a sampler): "
        + ", ".join(presets.names()),
    )
    parser.add_argument(
        "--init",
        metavar="CHECKPOINT",
        help="begin a new run with the network, weights and process of a checkpoint: a fastdiff "
        "checkpoint, a run (its newest), or a diffusers folder",
    )
    parser.add_argument(
        "--init-weights",
        metavar="NAME",
        help="of --init: 'ema' (its slowest average that has forgotten the untrained weights, else "
        "its model; the default), 'model', or an average",
    )


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help=f"{KINDS_OF_DATA}; needed unless a run is resumed",
    )
    parser.add_argument("--image-size", type=int, help="resize and centre-crop images to this side")
    parser.add_argument("--channels", type=int, choices=(1, 3, 4), help="grey, RGB or RGBA")
    parser.add_argument(
        "--class-cond",
        action=argparse.BooleanOptionalAction,
        help="condition the network on the images' classes",
    )
    add_reading_arguments(parser)
    parser.add_argument(
        "--eval-data", metavar="SPEC", help="images for bits/dim (default: the training images)"
    )


def _add_train_flags(group: Any) -> None:
    for field in dataclasses.fields(TrainConfig):
        default, choices = field.default, field.metadata["choices"]
        kind = numbers(float) if isinstance(default, tuple) else type(default)
        text = ",".join(map(str, default)) or "none" if isinstance(default, tuple) else default
        note = f"{field.metadata['help']} (default: {text})"
        _add_flag(group, "train", field.name, kind, note, choices)


def _add_model_flags(group: Any) -> None:
    for name, (kind, note) in MODEL_FLAGS.items():
        _add_flag(group, "model", name, kind, note)


def _add_diffusion_flags(group: Any) -> None:
    for name, kind, note, choices in (
        ("process", str, "what is trained", tuple(KINDS)),
        ("diffusion_steps", int, "number of noise levels T; edm: of those to sample at", ()),
        ("noise_schedule", str, "linear, cosine, quad, warmup10, warmup50, const or jsd", ()),
        ("learn_sigma", bool, "learn the variance's interpolation, with the hybrid loss", ()),
        ("variance", str, "of the reverse process", VAR_TYPES),
        ("predict", str, "what the network predicts", MEAN_TYPES),
        ("loss", str, "what is minimised", LOSS_TYPES),
        ("rescale_timesteps", bool, "give the network timesteps scaled to 0 ... 1000", ()),
        ("zero_terminal_snr", bool, "rescale the schedule to end without signal", ()),
        ("sigma_data", float, "edm: the standard deviation of the images (default: 0.5)", ()),
        ("P_mean", float, "edm: ln sigma is trained at N(P_mean, P_std^2) (default: -1.2)", ()),
        ("P_std", float, "edm: see --P-mean (default: 1.2)", ()),
        ("sigma_min", float, "edm, variance-exploding: the least noise (default: 0.002, 0.01)", ()),
        ("sigma_max", float, "edm, variance-exploding: the most noise (default: 80, 50)", ()),
        ("rho", float, "edm: exponent of the levels to sample at (default: 7)", ()),
    ):
        _add_flag(group, "diffusion", name, kind, note, choices)
    group.add_argument(
        "--min-snr",
        dest="diffusion.min_snr",
        type=float,
        metavar="GAMMA",
        help="min-SNR loss weighting with this gamma, usually 5 (0: none)",
    )


def _add_flag(
    group: Any, part: str, name: str, kind: Any, note: str, choices: tuple[str, ...] = ()
) -> None:
    options: dict[str, Any] = {"dest": f"{part}.{name}", "help": note.replace("%", "%%")}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif choices:
        options |= {"type": kind, "choices": choices}
    else:
        options |= {"type": kind, "metavar": METAVARS.get(kind, "A,B")}
    group.add_argument("--" + name.replace("_", "-"), **options)


def part_of(given: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The flags of one destination that were given."""
    head = part + "."
    return {key.removeprefix(head): value for key, value in given.items() if key.startswith(head)}
