"""The solvers' steps against those of diffusers, whatever the configuration: Euler, Heun, UniPC,
DEIS, PNDM and DPM-Solver of the third order."""

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from scheduler_tools import SHAPE, check_equal, check_loop, draw, outcome, pair

flags = st.booleans()
rarely = st.sampled_from([False, False, False, True])
many = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
SCHEDULE = {
    "num_train_timesteps": st.sampled_from([20, 100, 1000]),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
    "steps_offset": st.sampled_from([0, 1]),
}
SIGMAS = st.sampled_from([None, None, "karras_sigmas", "exponential_sigmas", "beta_sigmas"])
PREDICTIONS = st.sampled_from(["epsilon", "sample", "v_prediction"])
EULER = st.fixed_dictionaries(
    SCHEDULE
    | {
        "prediction_type": PREDICTIONS,
        "interpolation_type": st.sampled_from(["linear", "linear", "log_linear"]),
        "timestep_type": st.sampled_from(["discrete", "discrete", "continuous"]),
        "rescale_betas_zero_snr": flags,
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        "sigmas": SIGMAS,
    }
)
ANCESTRAL = st.fixed_dictionaries(
    SCHEDULE | {"prediction_type": PREDICTIONS, "rescale_betas_zero_snr": flags}
)
HEUN = st.fixed_dictionaries(
    SCHEDULE
    | {
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "exp"]),
        "prediction_type": PREDICTIONS,
        "clip_sample": flags,
        "clip_sample_range": st.sampled_from([0.5, 1.0, 2.0]),
        "sigmas": SIGMAS,
    }
)
MULTISTEP = SCHEDULE | {
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction", "flow_prediction"]),
    "solver_order": st.sampled_from([1, 2, 3, 3]),
    "thresholding": rarely,
    "lower_order_final": flags,
    "sigmas": st.one_of(SIGMAS, st.just("flow_sigmas")),
}
UNIPC = st.fixed_dictionaries(
    MULTISTEP
    | {
        "predict_x0": st.sampled_from([True, True, False]),
        "solver_type": st.sampled_from(["bh1", "bh2", "bh2"]),
        "disable_corrector": st.sampled_from([[], [], [0], [0, 2]]),
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        "rescale_betas_zero_snr": rarely,
    }
)
DEIS = st.fixed_dictionaries(MULTISTEP)
PNDM = st.fixed_dictionaries(
    SCHEDULE
    | {
        "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
        "skip_prk_steps": flags,
        "set_alpha_to_one": flags,
    }
)


def at_start(name, config, steps, begin=None):
    """Both schedulers after set_timesteps, and (t for diffusers, t for ours) from ``begin`` on."""
    config = dict(config)
    sigmas = config.pop("sigmas", None)
    config |= {f"use_{sigmas}": True} if sigmas else {}
    schedulers = pair(getattr(diffusers, f"{name}Scheduler"), **config)
    for scheduler in schedulers:
        try:
            scheduler.set_timesteps(steps)
        except Exception:  # a schedule that is none, in both
            assume(False)
        if begin is not None:
            scheduler.set_begin_index(begin)
    timesteps = list(zip(*(scheduler.timesteps for scheduler in schedulers), strict=True))
    return *schedulers, timesteps[begin or 0 :]


def has_gaps(scheduler):
    """Whether every step but the last leads to less noise, which it does not go without."""
    sigmas = scheduler.sigmas
    return bool((sigmas[:-1] > sigmas[1:]).all() and (sigmas[:-1] > 0).all())


def from_first(values, scheduler, begin):
    """Of each step, and 1 for those beyond the last. Without ``begin`` the first step is that of
    the first timestep's second occurrence, as diffusers has it."""
    first = scheduler.index_for_timestep(scheduler.timesteps[0]) if begin is None else begin
    return values[first:] + [1.0] * first


def growth(scheduler, begin):
    """Of each step α_t/α_s, by which diffusers multiplies x where it predicts ε."""
    alpha, _ = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas)
    return from_first((alpha[1:] / alpha[:-1]).tolist(), scheduler, begin)


def division(scheduler, begin):
    """Of each step 1/σ, by which diffusers multiplies x − α·x_0 for an ε."""
    _, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas)
    return from_first((1 / sigma).tolist(), scheduler, begin)


@pytest.mark.seconds
@many
@given(EULER, st.integers(1, 18), st.sampled_from([None, 0, 2]), st.sampled_from([0, 0, 0, 2.5]))
def test_euler(config, steps, begin, s_churn):
    theirs, mine, timesteps = at_start("EulerDiscrete", config, steps, begin)
    options = {"s_churn": s_churn, "s_noise": 1.1, "s_tmax": 5.0} if s_churn else {}
    reasons = check_loop(theirs, mine, timesteps, **options)
    assert mine.step_index == theirs.step_index
    if (mine.sigmas[:-1] > 0).all():
        assert all((reason is not None) == (s_churn > 0) for reason in reasons)


@pytest.mark.seconds
@many
@given(ANCESTRAL, st.integers(1, 18), st.sampled_from([None, 0, 2]))
def test_euler_ancestral(config, steps, begin):
    theirs, mine, timesteps = at_start("EulerAncestralDiscrete", config, steps, begin)
    reasons = check_loop(theirs, mine, timesteps)
    assert mine.step_index == theirs.step_index
    if has_gaps(mine) and mine.sigmas[0] < 300:  # else diffusers may take the root of −1e-7
        refused = config["prediction_type"] == "sample"
        assert all((reason is not None) == refused for reason in reasons)


@pytest.mark.seconds
@many
@given(HEUN, st.integers(1, 12), st.sampled_from([None, 0, 2]))
def test_heun(config, steps, begin):
    theirs, mine, timesteps = at_start("HeunDiscrete", config, steps, begin)
    lengths = -mine.sigmas.diff()
    terms = ((lengths + lengths.roll(1)) / mine.sigmas[:-1]).tolist()
    terms = from_first(terms, mine, begin)
    reasons = check_loop(theirs, mine, timesteps, terms=terms)
    assert mine.step_index == theirs.step_index
    assert mine.state_in_first_order == theirs.state_in_first_order
    if (mine.sigmas[:-1] > 0).all():
        assert not any(reasons)


@pytest.mark.seconds
@many
@given(UNIPC, st.integers(1, 18), st.sampled_from([None, 0, 2]))
def test_unipc(config, steps, begin):
    theirs, mine, timesteps = at_start("UniPCMultistep", config, steps, begin)
    terms = {"terms": growth(mine, begin), "kept_terms": division(mine, begin)}
    terms = {} if config["predict_x0"] else terms
    reasons = check_loop(theirs, mine, timesteps, follow=True, **terms)
    check_counts(mine, theirs)
    fused = has_gaps(mine) and not (config["thresholding"] and config["predict_x0"])
    fused &= config["prediction_type"] != "flow_prediction" and config["sigmas"] != "flow_sigmas"
    if (
        fused and begin is not None
    ):  # diffusers' ε and bh1, and second orders, cannot end in no noise
        ends = config["final_sigmas_type"] == "zero"
        assert not any(reasons[:-1] if ends else reasons)
        plain = config["lower_order_final"] and config["predict_x0"]
        assert not (ends and plain and config["solver_type"] == "bh2" and any(reasons[-1:]))


@pytest.mark.seconds
@many
@given(DEIS, st.integers(1, 18), st.sampled_from([None, 0, 2]))
def test_deis(config, steps, begin):
    theirs, mine, timesteps = at_start("DEISMultistep", config, steps, begin)
    terms = {"terms": growth(mine, begin), "kept_terms": division(mine, begin)}
    reasons = check_loop(theirs, mine, timesteps, **terms)
    check_counts(mine, theirs)
    if has_gaps(mine) and config["sigmas"] != "flow_sigmas" and not config["thresholding"]:
        assert not any(reasons)


def check_counts(mine, theirs):
    assert mine.step_index == theirs.step_index
    assert mine.lower_order_nums == theirs.lower_order_nums
    assert [m is None for m in mine.model_outputs] == [m is None for m in theirs.model_outputs]


def pndm_growth(scheduler, timesteps):
    """At most √(ᾱ_prev/ᾱ_t) of each call, by which x is multiplied before what is predicted is
    subtracted: from the first timestep of four with Runge-Kutta, or one stride back."""
    alphas, last = scheduler.alphas_cumprod, len(scheduler.alphas_cumprod) - 1
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    t = [int(t) for t, _ in timesteps]
    slopes = scheduler.prk_timesteps
    group = [slopes[i // 4 * 4] if i < len(slopes) else t[i] + stride for i in range(len(t))]
    return [
        float((alphas[max(now - stride, 0)] / alphas[min(start, last)]) ** 0.5)
        for now, start in zip(t, group, strict=True)
    ]


@pytest.mark.seconds
@many
@given(PNDM, st.integers(1, 18), st.sampled_from([0, 0, 1, 5]), flags)
def test_pndm(config, steps, begin, as_numbers):
    theirs, mine, timesteps = at_start("PNDM", config, steps)
    timesteps = timesteps[begin:]
    if as_numbers:
        timesteps = [(t, int(t)) for t, _ in timesteps]
    reasons = check_loop(theirs, mine, timesteps, terms=pndm_growth(mine, timesteps))
    assert mine.counter == theirs.counter and len(mine.ets) == len(theirs.ets)
    assert torch.equal(
        torch.as_tensor(mine.cur_model_output), torch.as_tensor(theirs.cur_model_output)
    )
    assert (mine.cur_sample is None) == (theirs.cur_sample is None)
    if steps >= 4 and (begin == 0 or config["skip_prk_steps"]):
        assert not any(reasons)


EVERY = [
    ("EulerDiscrete", {}),
    ("EulerAncestralDiscrete", {}),
    ("HeunDiscrete", {}),
    ("UniPCMultistep", {"solver_order": 3}),
    ("UniPCMultistep", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    ("DEISMultistep", {"solver_order": 3}),
    ("DPMSolverMultistep", {"solver_order": 3}),
    ("PNDM", {"skip_prk_steps": True}),
    ("PNDM", {}),
]


@pytest.mark.parametrize("name, config", EVERY)
@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from(["ours", "diffusers'", "another sample"]), min_size=8, max_size=14))
def test_fused_steps_and_diffusers_own_in_one_run(name, config, takers):
    """What one step leaves behind the other goes on from, and samples may be exchanged between."""
    theirs, mine, timesteps = at_start(name, config, len(takers))
    sample = my_sample = draw(1)
    for i, (taker, (their_t, my_t)) in enumerate(zip(takers, timesteps, strict=False)):
        output = draw(100 + i)
        step = type(theirs).step if taker == "diffusers'" else type(mine).step
        if taker == "another sample":
            sample, my_sample = sample + 0.1 * draw(300 + i), my_sample + 0.1 * draw(300 + i)
        options = [
            {"generator": torch.Generator().manual_seed(i)} if "Ancestral" in name else {}
            for _ in range(2)
        ]
        (sample, *_) = theirs.step(output, their_t, sample, return_dict=False, **options[0])
        (my_sample, *_) = step(mine, output, my_t, my_sample, return_dict=False, **options[1])
        check_equal([my_sample], [sample], sample)


def test_unipc_corrects_a_sample_that_was_changed():
    """By its own step, and the next one is fused again."""
    theirs, mine, timesteps = at_start("UniPCMultistep", {"solver_order": 3}, 8)
    sample = my_sample = draw(1)
    for i, (their_t, my_t) in enumerate(timesteps):
        if i == 3:
            sample = sample + 1
            my_sample += 1  # in place: the same tensor
        reason = mine.why_stock(draw(9 + i), my_t, my_sample)
        assert (reason == "sample is not the one that the last step returned") == (i == 3)
        (sample,) = theirs.step(draw(9 + i), their_t, sample, return_dict=False)
        (my_sample,) = mine.step(draw(9 + i), my_t, my_sample, return_dict=False)
        check_equal([my_sample], [sample], sample)
        check_equal([mine.last_sample], [theirs.last_sample], sample)


def test_heun_does_not_go_on_from_another_shape():
    results = []
    for scheduler in at_start("HeunDiscrete", {}, 4)[:2]:
        first, second = scheduler.timesteps[:2]
        scheduler.step(draw(2), first, draw(1))
        results.append(outcome(scheduler, draw(4)[:1], second, draw(3)[:1]))
    check_equal(results[1], results[0], draw(1))
    assert SHAPE[0] > 1
