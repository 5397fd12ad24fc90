"""The process that ``fastdiff train`` trains: a preset's or a checkpoint's, changed by flags."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdiff.errors import InputError
from fastdiff.process.classification import PROCESS as CLASSIFICATION
from fastdiff.process.classification import NoisyClassification
from fastdiff.process.edm import EDM
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas


@dataclass(frozen=True)
class Kind:
    """A process as the command line knows it.

    Attributes:
        build: the process of a recipe (a preset's, ``to_config``'s, {} for its own defaults) and
            flags, ``whose`` recipe that is for messages.
        flags: by their names, the attributes of a process that show what they decided; none where
            its noise levels do.
    """

    build: Callable[[Mapping[str, Any], Mapping[str, Any], str], Any]
    flags: Mapping[str, tuple[str, ...]]


def build_process(recipe: Mapping[str, Any], flags: Mapping[str, Any], whose: str) -> Any:
    """The process of ``recipe`` as ``flags`` change it, or of the kind that they name, by its own
    defaults. InputError for a flag of another kind than it is, and as the process itself."""
    if recipe.get("process") == CLASSIFICATION:
        return NoisyClassification(build_process(recipe["diffusion"], flags, whose))
    name = flags.get("process", _name(recipe))
    kind = KINDS[name]
    flags = {flag: value for flag, value in flags.items() if flag != "process"}
    for flag in flags:
        if flag not in kind.flags:
            owners = [other for other in KINDS if flag in KINDS[other].flags]
            raise InputError(
                f"--{flag.replace('_', '-')} is of the process {' or '.join(owners)}, and this one "
                f"is {name}: leave it out, or give --process {owners[0]}"
            )
    return kind.build(recipe if name == _name(recipe) else {}, flags, whose)


def noised_by(process: Any) -> Any:
    """The process that noises the images: of a classifier's training, the one inside."""
    return process.diffusion if isinstance(process, NoisyClassification) else process


def decided(process: Any) -> Iterator[tuple[str, Any]]:
    """Each flag of such a process, and what it has decided of this one."""
    name = _name(process.to_config())
    yield "process", name
    for flag, attributes in KINDS[name].flags.items():
        yield from ((flag, getattr(process, attribute)) for attribute in attributes)


def _name(recipe: Mapping[str, Any]) -> str:
    return str(recipe.get("process", "gaussian")).replace("_", "-")


def _gaussian(recipe: Mapping[str, Any], flags: Mapping[str, Any], whose: str) -> GaussianDiffusion:
    """create_diffusion with ``recipe``, where a flag replaces whatever else decides its matter."""
    if flags and "betas" in recipe:
        raise InputError(f"{whose} keeps its betas as they are; leave the diffusion flags out")
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
    _weigh(recipe, flags)
    return GaussianDiffusion.from_config(recipe)


def _decide(recipe: dict[str, Any], choice: dict[str, Any], *overruled: str) -> None:
    for name in overruled:
        recipe.pop(name, None)
    recipe.update(choice)


def _weigh(recipe: dict[str, Any], flags: Mapping[str, Any]) -> None:
    if "min_snr" in flags:
        gamma = flags["min_snr"]
        recipe["loss_weighting"] = "min_snr" if gamma else None
        recipe["min_snr_gamma"] = gamma or 5.0


def _variance_exploding(
    recipe: Mapping[str, Any], flags: Mapping[str, Any], whose: str
) -> VarianceExploding:
    """Levels in geometric progression, of the recipe's ends where flags say none."""
    recipe = {"process": "variance_exploding", "sigmas": geometric_sigmas(1000), **recipe}
    sigmas = np.asarray(recipe["sigmas"])
    levels = {"diffusion_steps": len(sigmas), "sigma_min": sigmas[0], "sigma_max": sigmas[-1]}
    if levels.keys() & flags.keys():
        if not np.allclose(sigmas, geometric_sigmas(*levels.values()), rtol=1e-9):
            raise InputError(
                f"the noise levels of {whose} are in no geometric progression and stay as they "
                f"are: leave out {', '.join('--' + name.replace('_', '-') for name in levels)}"
            )
        asked = (flags.get(name, value) for name, value in levels.items())
        overruled = ("timestep_map", "original_num_steps", "original_sigmas")
        _decide(recipe, {"sigmas": geometric_sigmas(*asked)}, *overruled)
    for flag, name in (("predict", "mean_type"), ("variance", "var_type")):
        if flag in flags:
            recipe[name] = flags[flag]
    _weigh(recipe, flags)
    return VarianceExploding.from_config(recipe)


def _edm(recipe: Mapping[str, Any], flags: Mapping[str, Any], whose: str) -> EDM:
    recipe, names = dict(recipe), {"diffusion_steps": "steps", "variance": "var_type"}
    if "diffusion_steps" in flags:
        recipe.pop("timestep_map", None)  # of the levels before
    own = {names.get(flag, flag): value for flag, value in flags.items()}
    return EDM.from_config({"process": "edm", **recipe, **own})


# As --process has them.
KINDS = {
    "gaussian": Kind(
        _gaussian,
        {
            "diffusion_steps": ("num_timesteps",),
            "predict": ("mean_type",),
            "variance": ("var_type",),
            "loss": ("loss_type",),
            "min_snr": ("loss_weighting", "min_snr_gamma"),
            "rescale_timesteps": ("rescale_timesteps",),
            "noise_schedule": (),
            "learn_sigma": (),
            "zero_terminal_snr": (),
        },
    ),
    "edm": Kind(
        _edm,
        {
            "diffusion_steps": ("num_timesteps",),
            "variance": ("var_type",),
            "sigma_data": ("sigma_data",),
            "P_mean": ("P_mean",),
            "P_std": ("P_std",),
            "sigma_min": ("sigma_min",),
            "sigma_max": ("sigma_max",),
            "rho": ("rho",),
        },
    ),
    "variance-exploding": Kind(
        _variance_exploding,
        {
            "diffusion_steps": ("num_timesteps",),
            "predict": ("mean_type",),
            "variance": ("var_type",),
            "min_snr": ("loss_weighting", "min_snr_gamma"),
            "sigma_min": (),
            "sigma_max": (),
        },
    ),
}
