"""Our schedulers' steps against those of diffusers, whatever the configuration."""

import diffusers
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from scheduler_tools import check_equal, check_loop, pair

flags = st.booleans()
try:
    diffusers.DDPMScheduler(beta_schedule="laplace")
    LAPLACE = ["laplace"]
except NotImplementedError:  # diffusers 0.36
    LAPLACE = []
TRAINED = st.sampled_from([20, 100, 1000])
BY_TIMESTEP = {
    "num_train_timesteps": TRAINED,
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
    "thresholding": st.sampled_from([False, False, False, True]),
    "dynamic_thresholding_ratio": st.sampled_from([0.5, 0.995]),
    "sample_max_value": st.sampled_from([1.0, 1.5]),
    "clip_sample": flags,
    "clip_sample_range": st.sampled_from([0.5, 1.0, 2.0]),
    "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
    "steps_offset": st.sampled_from([0, 1]),
    "rescale_betas_zero_snr": flags,
}
DDPM = st.fixed_dictionaries(
    BY_TIMESTEP
    | {
        "beta_schedule": st.sampled_from(
            ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", *LAPLACE]
        ),
        "variance_type": st.sampled_from(
            ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"] * 2
            + ["fixed_large_log", "learned"]
        ),
    }
)
DDIM = st.fixed_dictionaries(BY_TIMESTEP | {"set_alpha_to_one": flags})
SIGMAS = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas", "flow_sigmas")
MULTISTEP = st.fixed_dictionaries(
    {name: BY_TIMESTEP[name] for name in ("num_train_timesteps", "beta_schedule", "thresholding")}
    | {name: BY_TIMESTEP[name] for name in ("timestep_spacing", "rescale_betas_zero_snr")}
    | {
        "prediction_type": st.sampled_from(
            ["epsilon", "sample", "v_prediction", "flow_prediction"]
        ),
        "solver_order": st.sampled_from([1, 2, 2, 2, 3]),
        "algorithm_type": st.sampled_from(
            ["dpmsolver++", "sde-dpmsolver++"] * 3 + ["dpmsolver", "sde-dpmsolver"]
        ),
        "solver_type": st.sampled_from(["midpoint", "heun"]),
        "lower_order_final": flags,
        "euler_at_final": flags,
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        "lambda_min_clipped": st.sampled_from([-float("inf"), -5.1]),
        "variance_type": st.sampled_from([None, None, "learned_range"]),
        "sigmas": st.sampled_from([None, None, *SIGMAS]),
    }
)
AS = {
    "view": lambda t, views: views,
    "int": lambda t, views: t.tolist(),
    "numpy": lambda t, views: list(t.numpy()),
    "copy": lambda t, views: [v.clone() for v in views],
    "int32": lambda t, views: list(t.int()),
}
forms = st.sampled_from([*AS, "view", "view"])
many = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


def both(form, scheduler, mine):
    """(t for diffusers, t for ours), along the timesteps; diffusers reads views."""
    t = mine.timesteps
    return list(zip(scheduler.timesteps, AS[form](t, list(t)), strict=True))


@pytest.mark.seconds
@many
@given(DDPM, st.integers(1, 12), forms, st.sampled_from([None, "steps", "custom"]), flags)
def test_ddpm(config, steps, form, way, doubles):
    theirs, mine = pair(diffusers.DDPMScheduler, **config)
    for scheduler in (theirs, mine):
        if way == "steps":
            scheduler.set_timesteps(steps)
        elif way == "custom":
            scheduler.set_timesteps(timesteps=sorted({0, 3, 7, steps, steps + 5}, reverse=True))
    learned = "learned" in config["variance_type"]
    timesteps = both(form, theirs, mine)
    shown = timesteps if way else timesteps[:2] + timesteps[-2:]
    reasons = check_loop(theirs, mine, shown, channels=2 if learned and doubles else 1)
    for reason, (t, _) in zip(reasons, shown, strict=False):
        left = config["thresholding"] or config["variance_type"] in ("learned", "fixed_large_log")
        left |= learned and not doubles
        no_signal = float(mine.alphas_cumprod[t]) == 0 and config["prediction_type"] == "epsilon"
        assert (reason is not None) == (left or no_signal)


@pytest.mark.seconds
@many
@given(
    DDIM, st.integers(1, 12), forms, st.sampled_from([0.0, 0.0, 0.3, 1, 2.0, -0.3]), flags, flags
)
def test_ddim(config, steps, form, eta, use_clipped, noise):
    theirs, mine = pair(diffusers.DDIMScheduler, **config)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(steps)
    options = {"eta": eta, "use_clipped_model_output": use_clipped, "noise": noise}
    timesteps = both(form, theirs, mine)
    reasons = check_loop(theirs, mine, timesteps, **options)
    for reason, (t, _) in zip(reasons, timesteps, strict=False):
        no_signal = float(mine.alphas_cumprod[t]) == 0 and config["prediction_type"] == "epsilon"
        if eta < 1:  # from 1 on, diffusers may take the root of a negative 1 − ᾱ − σ²
            assert (reason is not None) == (config["thresholding"] or no_signal)


@pytest.mark.seconds
@many
@given(MULTISTEP, st.integers(1, 18), st.sampled_from([None, 0, 2]), flags, flags)
def test_dpmsolver_multistep(config, steps, begin, noise, custom):
    sigmas = config.pop("sigmas")
    config |= {f"use_{sigmas}": True} if sigmas else {}
    if "++" not in config["algorithm_type"]:
        config["final_sigmas_type"] = "sigma_min"
    theirs, mine = pair(diffusers.DPMSolverMultistepScheduler, **config)
    choice = {"num_inference_steps": steps}
    if custom and sigmas in (None, "flow_sigmas"):
        choice = {"timesteps": [18, 11, 10, 3, 1, 0]}
    for scheduler in (theirs, mine):
        try:
            scheduler.set_timesteps(**choice)
        except Exception:  # too many steps for the schedule, in both
            assume(False)
        if begin is not None:
            scheduler.set_begin_index(begin)
    timesteps = both("view", theirs, mine)[begin or 0 :]
    channels = 2 if config["variance_type"] and config["prediction_type"] == "epsilon" else 1
    reasons = check_loop(theirs, mine, timesteps, channels=channels, noise=noise)
    assert mine.step_index == theirs.step_index
    assert mine.lower_order_nums == theirs.lower_order_nums
    for own, stored in zip(mine.model_outputs, theirs.model_outputs, strict=True):
        if stored is not None:
            check_equal([own], [stored], stored)
    plain = not config["thresholding"] and not sigmas and config["solver_order"] < 3
    plain &= "++" in config["algorithm_type"]
    plain &= config["final_sigmas_type"] == "zero"  # a step of no length to sigma_min divides by it
    if plain and config["prediction_type"] != "flow_prediction":
        assert all(reason is None for reason in reasons)
