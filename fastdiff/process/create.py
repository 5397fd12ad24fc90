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

    The first nine options are the published ones; the names outright are for what the flags cannot
    say.

    Args:
        steps: K, of the process the network is trained on.
        noise_schedule: see :func:`fastdiff.get_named_beta_schedule`.
        learn_sigma: var_type "learned_range"; else it is as ``sigma_small`` says.
        sigma_small: var_type "fixed_small" in place of "fixed_large".
        use_kl: loss_type "rescaled_kl"; else it is as ``rescale_learned_sigmas`` says.
        predict_xstart: mean_type "x_start" in place of "epsilon".
        rescale_timesteps: give the network timesteps scaled to 0 … 1000.
        rescale_learned_sigmas: loss_type "rescaled_mse" in place of "mse".
        timestep_respacing: see :func:`fastdiff.space_timesteps`; "" takes every step.
        mean_type: one of GaussianDiffusion's, in place of ``predict_xstart``.
        var_type: one of its, in place of ``learn_sigma`` and ``sigma_small``.
        loss_type: one of its, in place of ``use_kl`` and ``rescale_learned_sigmas``.
        loss_weighting: None or "min_snr", as GaussianDiffusion's.
        min_snr_gamma: the γ of that weighting.
        zero_terminal_snr: rescale the schedule so that the last step has no signal (Lin et al.
            2023), which ε-prediction does not allow.

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
