"""Making a process: from the options of published training scripts, or from its own config."""

from collections.abc import Sequence

from fastdiff.errors import InputError
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.schedules import get_named_beta_schedule, rescale_zero_terminal_snr


def create_diffusion(
    *,
    steps: int = 1000,
    noise_schedule: str = "linear",
    learn_sigma: bool = False,
    sigma_small: bool = False,
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | int | Sequence[int] = "",
    mean_type: str | None = None,
    var_type: str | None = None,
    loss_type: str | None = None,
    loss_weighting: str | None = None,
    min_snr_gamma: float = 5.0,
    zero_terminal_snr: bool = False,
) -> GaussianDiffusion:
    """Build a :class:`GaussianDiffusion` and remember how (``to_config``).

    The first nine options are the published ones: ``learn_sigma`` chooses the variance
    ``"learned_range"``, else ``"fixed_small"`` or, without ``sigma_small``, ``"fixed_large"``;
    ``use_kl`` the loss ``"rescaled_kl"``, else ``rescale_learned_sigmas`` ``"rescaled_mse"``, else
    ``"mse"``; ``predict_xstart`` the prediction ``"x_start"``, else ``"epsilon"``.
    ``mean_type``, ``var_type`` and ``loss_type`` name the choice outright, for what the flags
    cannot say. ``timestep_respacing``: see :func:`fastdiff.process.respacing.space_timesteps`.
    ``zero_terminal_snr`` rescales the schedule (Lin et al. 2023) and needs ``mean_type`` "v" or
    "x_start".

    Raises InputError for unknown names, for a flag that contradicts a name, and for a respacing
    that does not fit.
    """
    betas = get_named_beta_schedule(noise_schedule, steps)
    recipe = {
        "steps": len(betas),
        "noise_schedule": noise_schedule,
        "learn_sigma": learn_sigma,
        "sigma_small": sigma_small,
        "use_kl": use_kl,
        "predict_xstart": predict_xstart,
        "rescale_timesteps": rescale_timesteps,
        "rescale_learned_sigmas": rescale_learned_sigmas,
        "timestep_respacing": "",
        "mean_type": mean_type,
        "var_type": var_type,
        "loss_type": loss_type,
        "loss_weighting": loss_weighting,
        "min_snr_gamma": min_snr_gamma,
        "zero_terminal_snr": zero_terminal_snr,
    }
    diffusion = GaussianDiffusion(
        rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas,
        mean_type=_named_or("mean_type", mean_type, {"x_start": predict_xstart}, "epsilon"),
        var_type=_named_or(
            "var_type",
            var_type,
            {"learned_range": learn_sigma, "fixed_small": sigma_small},
            "fixed_large",
        ),
        loss_type=_named_or(
            "loss_type",
            loss_type,
            {"rescaled_kl": use_kl, "rescaled_mse": rescale_learned_sigmas},
            "mse",
        ),
        rescale_timesteps=rescale_timesteps,
        loss_weighting=loss_weighting,
        min_snr_gamma=min_snr_gamma,
    )
    diffusion._recipe = recipe
    return diffusion if timestep_respacing == "" else diffusion.respace(timestep_respacing)


def _named_or(what: str, name: str | None, flags: dict[str, bool], default: str) -> str:
    """The explicit name; else that of the first flag that is set; else the default."""
    flagged = next((choice for choice, chosen in flags.items() if chosen), None)
    if name is None:
        return flagged or default
    if flagged not in (None, name):
        raise InputError(f"{what}={name!r} contradicts the flag that chooses {flagged!r}: give one")
    return name
