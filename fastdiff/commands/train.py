"""``fastdiff train``: a data set, a preset and flags in; a run directory out."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.checkpoints.run_directory import identify, list_checkpoints, require_run
from fastdiff.commands.data_options import KINDS_OF_DATA, reading_options
from fastdiff.commands.output import said_once
from fastdiff.commands.train_options import (
    DEFAULT_PRESET,
    add_arguments,
    given_settings,
    part_of,
    recipe_of,
)
from fastdiff.data import ImageDataset, load_dataset
from fastdiff.errors import InputError
from fastdiff.models import presets
from fastdiff.models.unet import UNet
from fastdiff.process.gaussian import GaussianDiffusion, create_diffusion
from fastdiff.ranks import Ranks, join, said_by_first
from fastdiff.training import TrainConfig, Trainer
from fastdiff.training.init import Init, describe_init, fit_to_init, read_init
from fastdiff.training.network import label_argument
from fastdiff.training.run_folder import started_by
from fastdiff.training.saved import SavedRun

__all__ = ["add_arguments", "run"]

# Of the network's arguments: what a trained network computes the same with.
TRAINING_ONLY = {"dropout", "use_checkpoint"}


def run(args: argparse.Namespace) -> int:
    with said_by_first():
        given, run_dir = given_settings(args), Path(args.out)
    ranks = join(given.get("device"), given.get("train.rank_minutes", TrainConfig.rank_minutes))
    with ranks.heard(), said_once(ranks):
        agents = set(ranks.agents())
        goes_on = ranks.on_first(
            # Started again by torchrun, they need no --resume.
            lambda: _goes_on(
                run_dir, given.get("resume", False) or bool(agents & started_by(run_dir))
            )
        )
        trainer = (_resume if goes_on else _start)(run_dir, given, ranks)
        try:
            trainer.fit()
        except (KeyboardInterrupt, SystemExit):
            if ranks.rank == 0:
                path = trainer.last_checkpoint
                print(f"stopped; continue with --resume from {path}", file=sys.stderr)
            raise
        ranks.leave()
    left = max(0, trainer.config.steps - trainer.step)
    if ranks.rank == 0:
        path = trainer.last_checkpoint
        print(f"{trainer.step} steps done, {left} left; newest checkpoint: {path}")
    return 0


def _goes_on(run_dir: Path, resume: bool) -> bool:
    """Whether there is a run to continue. InputError when the folder is not ours to use."""
    _check_folder(run_dir, resume)
    return bool(list_checkpoints(run_dir))


def _check_folder(run_dir: Path, resume: bool) -> None:
    """InputError when the directory is not ours to use."""
    found = identify(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"--out {run_dir} is a file, expected a directory")
    if not resume and found.kind == "run":
        raise InputError(
            f"--out {run_dir} is not empty: add --resume to continue the run in it, "
            "or choose another directory"
        )
    if not resume and found.kind == "other":
        raise InputError(
            f"--out {run_dir} is not empty: add --resume to continue a run, but this is none (it "
            f"{found.words}); choose a new or an empty directory"
        )
    require_run(run_dir, or_empty=True)


def _start(run_dir: Path, given: Mapping[str, Any], ranks: Ranks) -> Trainer:
    parts, lines = ranks.together(lambda: _parts(given))
    trainer = Trainer(run_dir=run_dir, **parts, **_trainer_options(given, ranks))
    if lines:
        print(lines)
    return trainer


def _trainer_options(given: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    return {"device": given.get("device"), "progress": "quiet" not in given, "ranks": ranks}


def _parts(given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What a new run is made of, by the names of a trainer's arguments; lines for the terminal."""
    if "data" not in given:
        raise InputError(f"--data is missing: {KINDS_OF_DATA}")
    if "data_changed" in given:
        raise InputError(
            "--data-changed is for a run with checkpoints to resume, and there is none"
        )
    init = _read_init(given)
    known = init.info.get("preset") if init is not None else None
    preset = presets.get(given.get("preset", known or DEFAULT_PRESET))
    config = TrainConfig(**{**preset.train, **part_of(given, "train")})
    if init is None:
        wanted = preset.model.get("num_classes") is not None
    else:
        wanted = label_argument(init.model) is not None
    class_cond = given.get("class_cond", wanted)
    source = {
        "spec": given["data"],
        "image_size": given.get("image_size"),
        "channels": given.get("channels"),
        "class_cond": class_cond,
        **reading_options(given),
    }
    dataset = _load(source, None if init is None else init.info.get("class_names"))
    info = {"preset": preset.name, "data": source, "recipe": recipe_of(given, preset.name)}
    torch.manual_seed(config.seed)
    lines = ""
    if init is None:
        diffusion = build_diffusion(preset.diffusion, part_of(given, "diffusion"))
        model = build_model({**preset.model, **part_of(given, "model")}, diffusion, dataset, config)
    else:
        diffusion = _init_diffusion(init, given)
        dataset = fit_to_init(init, dataset)
        model = _init_model(init, part_of(given, "model"))
        info["init"] = init.record
        lines = describe_init(init, diffusion)
        lines += f"\n  training      settings of the preset {preset.name} and the flags"
    parts = {"model": model, "diffusion": diffusion, "data": dataset, "config": config}
    eval_dataset = _load_eval(given, source, dataset.class_names)
    return {**parts, "eval_dataset": eval_dataset, "info": info}, lines


def _read_init(given: Mapping[str, Any]) -> Init | None:
    if "init" in given:
        return read_init(given["init"], given.get("init_weights", "ema"))
    if "init_weights" in given:
        raise InputError("--init-weights chooses among the weights of --init, which is not given")
    return None


def _init_diffusion(init: Init, given: Mapping[str, Any]) -> Any:
    """The checkpoint's process, changed by flags; a preset's where the checkpoint has none."""
    flags = part_of(given, "diffusion")
    if init.diffusion is None:
        if "preset" not in given:
            raise InputError(
                f"{init.path} holds a network without its process: give --preset for the process "
                "it was trained with, and flags for what differs"
            )
        return build_diffusion(presets.get(given["preset"]).diffusion, flags)
    if not flags:
        return init.diffusion
    recipe = init.diffusion.to_config() if isinstance(init.diffusion, GaussianDiffusion) else {}
    if not recipe or "betas" in recipe:
        raise InputError(f"{init.path} keeps its process as it is; leave the diffusion flags out")
    return build_diffusion(recipe, flags)


def _init_model(init: Init, flags: Mapping[str, Any]) -> Any:
    """The checkpoint's network. Flags may change what only training knows, its dropout."""
    _check_unet(init.path, init.model, flags)
    for name, value in flags.items():
        if name not in TRAINING_ONLY:
            remedy = "leave the flag out, or start without --init"
            _check_unchanged(init.path, name, init.model.config[name], value, remedy)
    if not set(flags) & TRAINING_ONLY:
        return init.model
    model = UNet(**{**init.model.config, **flags})
    model.load_state_dict(init.model.state_dict())
    return model


def _resume(run_dir: Path, given: Mapping[str, Any], ranks: Ranks) -> Trainer:
    saved = Trainer.read_run(run_dir, ranks)
    data, options = ranks.together(lambda: _data_to_resume(saved, given))
    options |= {"changes": part_of(given, "train"), "data_changed": "data_changed" in given}
    return Trainer.from_saved(saved, data, run_dir, **options, **_trainer_options(given, ranks))


def _data_to_resume(saved: SavedRun, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    check_same_run(saved, given)
    _check_same_init(saved, given)
    source = dict(saved.info.get("data") or {})
    if "data" in given:
        source["spec"] = given["data"]
    if "spec" not in source:
        raise InputError(f"--data is missing, and {saved.path} does not say what it was trained on")
    source |= reading_options(given)
    names = saved.info.get("class_names")
    data = _load(source, names)
    return data, {"eval_dataset": _load_eval(given, source, names), "info": {"data": source}}


def _check_same_init(saved: SavedRun, given: Mapping[str, Any]) -> None:
    """InputError when --init names another start than the resumed run had."""
    asked = _read_init(given)
    began = saved.info.get("init")
    if asked is None:
        return
    if began is None:
        raise InputError(
            f"--init {given['init']}: {saved.path} is of a run that began without it; leave --init "
            "out to resume, or start a new run"
        )
    for name, value in (
        ("checkpoint", os.path.abspath(given["init"])),
        ("weights", asked.record["weights"]),
    ):
        if began.get(name) != value:
            raise InputError(
                f"--init asks for the {name} {value}, but the run of {saved.path} began with "
                f"{began.get(name)}; leave --init out to resume, or start a new run"
            )
    print(f"resuming at step {saved.step}: --init was the start of this run, and is over")


def _load(source: dict[str, Any], known_classes: Sequence[str] | None = None) -> ImageDataset:
    """Open the images and say what was found; how a folder's classes were read is noted in
    ``source``, so that a resumed run reads them so again."""
    dataset = load_dataset(
        source["spec"],
        image_size=source.get("image_size"),
        channels=source.get("channels"),
        class_cond=bool(source.get("class_cond")),
        labels=source.get("labels"),
        known_classes=known_classes or (),
        skip_broken=source.get("skip_broken", False),
        max_pixels=source.get("max_pixels"),
    )
    print(dataset.describe(), flush=True)
    source["labels"] = dataset.reading
    return dataset


def _load_eval(
    given: Mapping[str, Any], source: Mapping[str, Any], known_classes: Sequence[str] | None
) -> ImageDataset | None:
    """The images of --eval-data: in the format of the others, their classes read by the flag, or
    else as their own names say."""
    if "eval_data" not in given:
        return None
    return _load(
        {**source, "spec": given["eval_data"], "labels": given.get("labels")}, known_classes
    )


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
            "super_res": config.upsample_from > 0,
            "noise_cond": config.cond_noise > 0,
            "null_class": config.label_dropout > 0 and dataset.num_classes is not None,
            "image_size": height if height == width else [height, width],
        }
    )


def check_same_run(saved: SavedRun, given: Mapping[str, Any]) -> None:
    """InputError when flags ask a resumed run for another network, diffusion or image format."""
    data = saved.info.get("data") or {}
    before = {**data, "preset": saved.info.get("preset")}
    for name in ("preset", "image_size", "channels", "class_cond"):
        if name in given:
            _check_unchanged(saved.path, name, before.get(name), given[name])
    if "labels" in given and before.get("labels"):
        _check_unchanged(saved.path, "labels", before["labels"], given["labels"])
    _check_unet(saved.path, saved.model, part_of(given, "model"))
    for name, value in part_of(given, "model").items():
        _check_unchanged(saved.path, name, saved.model.config[name], value)

    flags = part_of(given, "diffusion")
    recipe = saved.diffusion.to_config()
    if flags and "betas" in recipe:
        raise InputError(f"{saved.path} keeps its betas as they are; leave the diffusion flags out")
    if flags:
        asked = build_diffusion(recipe, flags)
        for flag, name in (
            ("diffusion_steps", "num_timesteps"),
            ("predict", "mean_type"),
            ("variance", "var_type"),
            ("loss", "loss_type"),
            ("min_snr", "loss_weighting"),
            ("min_snr", "min_snr_gamma"),
            ("rescale_timesteps", "rescale_timesteps"),
        ):
            before, now = (getattr(process, name) for process in (saved.diffusion, asked))
            _check_unchanged(saved.path, flag, before, now)
        if not np.array_equal(asked.betas, saved.diffusion.betas):
            raise InputError(f"the noise schedule is not the one {saved.path} was trained with")


def _check_unet(path: str | Path, model: Any, flags: Mapping[str, Any]) -> None:
    """InputError where flags describe a UNet, and the network is another."""
    if flags and not isinstance(model, UNet):
        raise InputError(
            f"--{next(iter(flags)).replace('_', '-')} is of fastdiff's UNet, and {path} holds a "
            f"{type(model).__name__}, which stays as it is: leave the flag out"
        )


def _check_unchanged(
    path: str | Path,
    name: str,
    before: Any,
    now: Any,
    remedy: str = "leave the flag out to resume, or start a new run",
) -> None:
    as_list = list(now) if isinstance(now, tuple) else now
    if name == "attention_resolutions":
        as_list = sorted(as_list)
    if before != as_list:
        raise InputError(
            f"--{name.replace('_', '-')} is {as_list!r}, but {path} was trained with {before!r}; "
            f"{remedy}"
        )
