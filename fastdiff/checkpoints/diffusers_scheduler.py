"""The process a diffusers pipeline was trained with, from its scheduler_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.checkpoints.weights import build, load_json
from fastdiff.errors import InputError
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.schedules import (
    FloatArray,
    cosine_betas,
    quad_betas,
    rescale_zero_terminal_snr,
)

FILE = "scheduler_config.json"
# Schedulers with these fields and defaults: how each samples is not the process's.
CLASSES = (
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler"),
    *("DDIMInverseScheduler", "PNDMScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"),
)
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
# Fields that make another process of it.
USUAL: dict[str, Any] = {"timestep_type": "discrete", "use_flow_sigmas": False}
MOST_TIMESTEPS = 1_000_000
MEAN_TYPES = {"epsilon": "epsilon", "sample": "x_start", "v_prediction": "v"}
# "learned" is missing: diffusers takes the output for σ², everybody else for its logarithm.
VAR_TYPES = {
    None: "fixed_small",
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


def load_process(directory: Path) -> GaussianDiffusion | None:
    """The process of a pipeline's directory, None where there is no scheduler.

    The scheduler lies in ``scheduler/`` or beside the network. InputError for one of another kind
    of process; the message names the file and the field.
    """
    folders = (directory / "scheduler", directory)
    folder = next((folder for folder in folders if (folder / FILE).is_file()), None)
    if folder is None:
        return None
    config = load_json(folder, FILE.removesuffix(".json"))
    return build(folder, "process", lambda: process_of_scheduler(config), file=FILE)


def process_of_scheduler(config: Mapping[str, Any]) -> GaussianDiffusion:
    """β in float64, where diffusers has float32. InputError for what is no such process."""
    if not isinstance(config, Mapping) or config.get("_class_name") not in CLASSES:
        kind = config.get("_class_name") if isinstance(config, Mapping) else None
        raise InputError(
            f"_class_name is {kind!r:.80}, whose process fastdiff has not (it has that of "
            f"DDPMScheduler and {len(CLASSES) - 1} others); without a scheduler's file the network "
            "alone is loaded"
        )
    for field, usual in USUAL.items():
        if config.get(field, usual) not in (usual, None):
            raise InputError(f"{field} is {config[field]!r:.80}; expected {usual!r}")
    given = DEFAULTS | {name: config[name] for name in DEFAULTS if name in config}
    if config.get("predict_epsilon") is False:  # what prediction_type was called at first
        if config.get("prediction_type", "sample") != "sample":
            raise InputError(
                f"predict_epsilon is False and prediction_type {config['prediction_type']!r:.80}; "
                "remove the one that is wrong"
            )
        given["prediction_type"] = "sample"
    betas = given["trained_betas"] if given["trained_betas"] is not None else _betas(given)
    if given["rescale_betas_zero_snr"]:
        betas = rescale_zero_terminal_snr(betas)
    return GaussianDiffusion(
        betas,
        mean_type=_choice("prediction_type", given["prediction_type"], MEAN_TYPES),
        var_type=_choice("variance_type", config.get("variance_type"), VAR_TYPES),
    )


def _betas(given: Mapping[str, Any]) -> FloatArray:
    count, ends = given["num_train_timesteps"], (given["beta_start"], given["beta_end"])
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= MOST_TIMESTEPS:
        raise InputError(
            f"num_train_timesteps is {count!r:.80}; expected an integer of 1 … {MOST_TIMESTEPS:,}"
        )
    for name, end in zip(("beta_start", "beta_end"), ends, strict=True):
        if not isinstance(end, float | int) or not 0 < end < 1:
            raise InputError(f"{name} is {end!r:.80}; expected a number between 0 and 1")
    made = {
        "linear": lambda: np.linspace(*ends, count, dtype=np.float64),
        "scaled_linear": lambda: quad_betas(count, *ends),
        "squaredcos_cap_v2": lambda: cosine_betas(count),
        "sigmoid": lambda: _sigmoid_betas(count, *ends),
    }
    return _choice("beta_schedule", given["beta_schedule"], made)()


def _sigmoid_betas(count: int, beta_start: float, beta_end: float) -> FloatArray:
    """GeoDiff's (Xu et al. 2022), as in diffusers."""
    rising = 1 / (1 + np.exp(-np.linspace(-6, 6, count, dtype=np.float64)))
    return beta_start + (beta_end - beta_start) * rising


def _choice(field: str, value: Any, known: Mapping[Any, Any]) -> Any:
    if not isinstance(value, str | None) or value not in known:
        names = ", ".join(str(name) for name in known)
        raise InputError(f"{field} is {value!r:.80}; expected one of {names}")
    return known[value]
