"""What the schedulers' rows hold beyond the plain float32 loop: dtypes, gradients, changed state,
where a step is left to diffusers, and that finding a row reads no tensor."""

import copy
import pickle

import diffusers
import pytest
import torch

from fastdiff.integrations import diffusers as ours
from fastdiff.integrations.diffusers import (
    ddpm as _ddpm,
)
from fastdiff.integrations.diffusers import (
    dpmsolver_multistep as _dpmsolver_multistep,
)
from fastdiff.integrations.diffusers.schedulers import SCHEDULERS
from scheduler_tools import Operators, check_equal, draw, outcome, pair

CLASSES = (
    diffusers.DDPMScheduler,
    diffusers.DDIMScheduler,
    diffusers.DPMSolverMultistepScheduler,
)
LOW = (torch.bfloat16, torch.float16)
every_class = pytest.mark.parametrize("stock", CLASSES)


def at_start(stock, steps=5, **config):
    schedulers = pair(stock, **config)
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    return schedulers


@every_class
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_low_precision_is_rounded_once(stock, dtype, prediction, monkeypatch):
    """Within half an ulp of diffusers' step in float64, on the same noise."""
    config = {"algorithm_type": "sde-dpmsolver++"} if stock is CLASSES[2] else {}
    theirs, mine = at_start(stock, prediction_type=prediction, **config)
    noise = draw(3, dtype=dtype)
    for module in (_ddpm, _dpmsolver_multistep, _ddpm.stock, _dpmsolver_multistep.stock):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, dtype, **__: noise.to(dtype))
    sample, output = draw(1, dtype=dtype), draw(2, dtype=dtype)
    t = mine.timesteps[0]
    assert mine.why_stock(output, t, sample) is None
    results = mine.step(output, t, sample, return_dict=False)
    if stock is CLASSES[2]:  # its own update is in float32, and takes no float64
        theirs = stock(prediction_type=prediction, **config)
        theirs.set_timesteps(5)
        exact = theirs.step(output.float(), t, sample.float(), return_dict=False)
    else:
        exact = theirs.step(output.double(), t, sample.double(), return_dict=False)
    for result, value in zip(results, exact, strict=True):
        assert result.dtype == dtype
        half_ulp = torch.finfo(dtype).eps / 2 * value.abs() + torch.finfo(dtype).tiny
        scale = max(1.0, float(exact[-1].abs().max()))
        assert bool(((result.double() - value).abs() <= half_ulp + 1e-5 * scale).all())


@every_class
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.float32),
    ],
)
def test_dtypes_are_those_of_diffusers(stock, prediction, dtypes):
    theirs, mine = at_start(stock, prediction_type=prediction)
    sample, output = draw(1, dtype=dtypes[0]), draw(2, dtype=dtypes[1])
    both = [
        scheduler.step(output, scheduler.timesteps[0], sample, return_dict=False)
        for scheduler in (theirs, mine)
    ]
    assert [x.dtype for x in both[1]] == [x.dtype for x in both[0]]
    assert (mine.why_stock(output, mine.timesteps[0], sample) is None) == (
        torch.float64 not in dtypes
    )


@every_class
def test_results_have_the_names_of_diffusers(stock):
    theirs, mine = at_start(stock)
    expected, actual = (
        scheduler.step(draw(2), scheduler.timesteps[0], draw(1), generator=torch.manual_seed(0))
        for scheduler in (theirs, mine)
    )
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    check_equal(actual.to_tuple(), expected.to_tuple(), draw(1))


@every_class
def test_gradients(stock):
    gradients = []
    for scheduler in at_start(stock, prediction_type="v_prediction"):
        sample, output = draw(1).requires_grad_(), draw(2).requires_grad_()
        for t in scheduler.timesteps[:2]:
            step = scheduler.step(output, t, sample, generator=torch.manual_seed(0))
        gradients.append(torch.autograd.grad(step.prev_sample.square().sum(), (sample, output)))
    check_equal(gradients[1], gradients[0], draw(1))


@every_class
def test_a_generator_per_sample(stock):
    config = {"algorithm_type": "sde-dpmsolver++"} if stock is CLASSES[2] else {}
    options = {"eta": 1.0} if stock is CLASSES[1] else {}
    results = [
        scheduler.step(
            draw(2),
            scheduler.timesteps[0],
            draw(1),
            generator=[torch.Generator().manual_seed(seed) for seed in (4, 5)],
            return_dict=False,
            **options,
        )
        for scheduler in at_start(stock, **config)
    ]
    check_equal(results[1], results[0], draw(1))


@every_class
@pytest.mark.parametrize("inference", [False, True])
def test_a_view_of_the_timesteps_is_not_read(stock, inference):
    """What reads a tensor's value waits for its device. Only the first step may."""
    with torch.inference_mode(inference):
        _, mine = at_start(stock)
        first, *rest = mine.timesteps[0:5]
        mine.step(draw(2), first, draw(1))
        output, sample = draw(2), draw(1)
        for t in rest[:-1]:
            with Operators() as operators:
                mine.step(output, t, sample)
            reads = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::_to_copy"}
            assert "fastdiff::posterior_step" in operators.names
            assert not reads & set(operators.names)


@every_class
def test_state_that_changes_is_noticed(stock):
    changes = {
        "prediction_type": lambda s: s.register_to_config(prediction_type="v_prediction"),
        "an attribute": lambda s: setattr(s.config, "prediction_type", "sample"),
        "other steps": lambda s: s.set_timesteps(7),
        "its levels": lambda s: (
            s.alphas_cumprod.mul_(0.9),
            getattr(s, "sigmas", s.betas).mul_(1.1),
        ),
        "its timesteps": lambda s: s.timesteps.sub_(1),
    }
    theirs, mine = (
        at_start(stock, clip_sample_range=2.0) if stock is not CLASSES[2] else at_start(stock)
    )
    for name, change in changes.items():
        results = []
        for scheduler in (theirs, mine):
            change(scheduler)
            t = scheduler.timesteps[1]
            for s in [scheduler] if hasattr(scheduler, "set_begin_index") else []:
                s.set_begin_index(1)
                s._step_index = None
            options = {"generator": torch.manual_seed(0)}
            assert scheduler is theirs or scheduler.why_stock(draw(2), t, draw(1)) is None, name
            results.append(outcome(scheduler, draw(2), t, draw(1), **options))
        check_equal(results[1], results[0], draw(1))


@every_class
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_copies_go_on_where_the_scheduler_is(stock, copied):
    _, mine = at_start(stock)
    for t in mine.timesteps[:2]:
        mine.step(draw(2), t, draw(1))
    twin = copied(mine)
    assert type(twin) is type(mine) and twin.config == mine.config
    assert twin._rows_made is not mine._rows_made
    results = []
    for scheduler in (mine, twin):
        if copied is copy.copy and stock is CLASSES[2]:
            scheduler.model_outputs = list(scheduler.model_outputs)  # one list in both
        t = scheduler.timesteps[2]
        assert scheduler.why_stock(draw(2), t, draw(1)) is None
        step = scheduler.step(draw(4), t, draw(1), generator=torch.manual_seed(0))
        results.append(step.prev_sample)
    assert torch.equal(*results)


REASONS = [
    ("DDPM", {"thresholding": True}, {}, "dynamic thresholding"),
    ("DDPM", {"variance_type": "learned"}, {}, "variance_type 'learned'"),
    ("DDPM", {"variance_type": "learned_range"}, {}, "without 2C channels"),
    ("DDPM", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}, "not finite"),
    ("DDPM", {"prediction_type": "flow"}, {}, "prediction_type 'flow'"),
    ("DDPM", {}, {"sample": draw(1, dtype=torch.float64)}, "float64"),
    ("DDPM", {}, {"sample": draw(1)[:1]}, "sample (1, 3, 4, 4)"),
    ("DDPM", {}, {"sample": draw(1)[0, 0, 0], "model_output": draw(1)[0, 0, 0]}, "not (N, C, ...)"),
    ("DDPM", {}, {"timestep": torch.tensor([800])}, "shape (1,)"),
    ("DDPM", {}, {"timestep": 800.0}, "a float"),
    ("DDPM", {}, {"timestep": 799}, "799 is not among"),
    ("DDIM", {"thresholding": True}, {}, "dynamic thresholding"),
    ("DDIM", {}, {"eta": torch.tensor(1.0)}, "eta is a Tensor"),
    ("DDIM", {}, {"variance_noise": draw(1)[:1], "eta": 1.0}, "variance_noise has shape"),
    ("DDIM", {}, {"variance_noise": draw(1).double(), "eta": 1.0}, "float64"),
    (
        "DDIM",
        {},
        {"variance_noise": draw(1), "generator": torch.manual_seed(0), "eta": 1.0},
        "both given",
    ),
    ("DPMSolverMultistep", {"thresholding": True}, {}, "dynamic thresholding"),
    ("DPMSolverMultistep", {"algorithm_type": "dpmsolver"}, {}, "algorithm_type 'dpmsolver'"),
    ("DPMSolverMultistep", {"prediction_type": "flow"}, {}, "prediction_type 'flow'"),
    ("DPMSolverMultistep", {}, {"variance_noise": draw(1)[:1]}, "variance_noise has shape"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, config, options, reason", REASONS)
def test_what_is_left_to_diffusers(name, config, options, reason):
    if "algorithm_type" in config:
        config = config | {"final_sigmas_type": "sigma_min"}
    theirs, mine = at_start(getattr(diffusers, f"{name}Scheduler"), **config)
    call = {"model_output": draw(2), "timestep": mine.timesteps[0], "sample": draw(1)} | options
    assert reason in mine.why_stock(**call)
    results = []
    for scheduler in (theirs, mine):
        torch.manual_seed(0)
        results.append(outcome(scheduler, **call))
    check_equal(results[1], results[0], draw(1))


@every_class
def test_before_set_timesteps(stock):
    theirs, mine = pair(stock)
    results = [
        outcome(scheduler, draw(2), 500, draw(1), generator=torch.manual_seed(0))
        for scheduler in (theirs, mine)
    ]
    check_equal(results[1], results[0], draw(1))


@pytest.mark.seconds
@pytest.mark.sample(1)
@every_class
def test_under_torch_compile(stock):
    """Traced, the step is diffusers' own."""
    theirs, mine = at_start(stock)
    torch._dynamo.reset()
    compiled = torch.compile(lambda output, t, x: mine.step(output, t, x)[0], backend="eager")
    t = mine.timesteps[0]
    options = {"generator": torch.manual_seed(0)}
    expected = theirs.step(draw(2), t, draw(1), **options).prev_sample
    torch.manual_seed(0)
    check_equal([compiled(draw(2), t, draw(1))], [expected], draw(1))
    why = torch.compile(lambda output, t, x: mine.why_stock(output, t, x), backend="eager")
    assert why(draw(2), t, draw(1)) == "torch.compile is tracing"


def test_a_first_order_step_may_follow_one_of_another_shape():
    results = []
    for scheduler in at_start(CLASSES[2], solver_order=1):
        scheduler.step(draw(2), scheduler.timesteps[0], draw(1))
        output, sample = draw(4)[:1], draw(3)[:1]
        results.append(outcome(scheduler, output, scheduler.timesteps[1], sample))
    check_equal(results[1], results[0], draw(1))


def test_the_documented_names():
    schedulers = {name for name in ours.__all__ if name.endswith("Scheduler")}
    assert schedulers == {stock.__name__ for stock in SCHEDULERS} > {x.__name__ for x in CLASSES}
    assert all(issubclass(getattr(ours, stock.__name__), stock) for stock in SCHEDULERS)
