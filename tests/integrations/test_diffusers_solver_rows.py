"""What the solvers' rows hold beyond the plain float32 loop: dtypes, gradients, changed state,
copies, where a step is left to diffusers, and that finding a row reads no tensor."""

import copy
import pickle

import diffusers
import pytest
import torch

from scheduler_tools import Operators, check_equal, draw, outcome, pair

SOLVERS = [
    ("EulerDiscrete", {}),
    ("EulerAncestralDiscrete", {}),
    ("HeunDiscrete", {}),
    ("UniPCMultistep", {"solver_order": 3}),
    ("DEISMultistep", {"solver_order": 3}),
    ("DPMSolverMultistep", {"solver_order": 3}),
    ("PNDM", {"skip_prk_steps": True}),
    ("PNDM", {}),
]
every_solver = pytest.mark.parametrize("name, config", SOLVERS)
PREDICTIONS = ["epsilon", "v_prediction"]


def at_start(name, config, steps=6, **more):
    schedulers = pair(getattr(diffusers, f"{name}Scheduler"), **config, **more)
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    return schedulers


def run(scheduler, outputs, sample, *, stepped=None):
    """The results of steps one after the other, each from what the last one returned."""
    results = []
    for i, output in enumerate(outputs):
        t = scheduler.timesteps[i]
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.scale_model_input(sample, t)
        if stepped is not None:
            stepped.append(scheduler.why_stock(output, t, sample))
        options = {}
        if "Ancestral" in type(scheduler).__name__:
            options = {"generator": torch.Generator().manual_seed(i)}
        results.append(scheduler.step(output, t, sample, return_dict=False, **options))
        sample = results[-1][0]
    return results


@every_solver
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(name, config, prediction, dtype):
    """A first step within half an ulp of diffusers' in float32, of dtypes that are diffusers'."""
    theirs, mine = at_start(name, config, prediction_type=prediction)
    exact, _ = at_start(name, config, prediction_type=prediction)
    sample, output = draw(1, dtype=dtype), draw(2, dtype=dtype)
    if "Ancestral" in name:  # its noise is drawn in the output's dtype
        sample, output = sample.float(), output.float()
    results, expected, values = (
        run(scheduler, [y], x)[0]
        for scheduler, y, x in (
            (mine, output, sample),
            (theirs, output, sample),
            (exact, output.float(), sample.float()),
        )
    )
    for result, stock, value in zip(results, expected, values, strict=True):
        assert result.dtype == stock.dtype
        half_ulp = torch.finfo(result.dtype).eps / 2 * value.abs() + torch.finfo(dtype).tiny
        scale = max(1.0, float(values[-1].abs().max()), float(sample.abs().max()))
        assert bool(((result - value).abs() <= half_ulp + 1e-5 * scale).all())


@every_solver
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes_are_those_of_diffusers(name, config, prediction, dtypes):
    outputs = [draw(2 + i, dtype=dtypes[1]) for i in range(3)]
    types = []
    for scheduler in at_start(name, config, prediction_type=prediction):
        try:
            results = run(scheduler, outputs, draw(1, dtype=dtypes[0]))
        except RuntimeError as error:  # diffusers' own adds what does not go together
            types.append(str(error))
        else:
            types.append([x.dtype for result in results for x in result])
    assert types[0] == types[1]


@every_solver
def test_gradients(name, config):
    gradients = []
    for scheduler in at_start(name, config, prediction_type="v_prediction"):
        sample, *outputs = (draw(i).requires_grad_() for i in range(1, 7))
        results = run(scheduler, outputs, sample)
        loss = results[-1][0].square().sum()
        gradients.append(torch.autograd.grad(loss, (sample, *outputs)))
    scale = max(float(gradient.abs().max()) for gradient in gradients[0])
    check_equal(gradients[1], gradients[0], torch.tensor(scale))


@every_solver
def test_expanded_tensors(name, config):
    results = []
    for scheduler in at_start(name, config):
        outputs = [draw(2 + i)[:1].expand(draw(1).shape) for i in range(5)]
        results.append(run(scheduler, outputs, draw(1)[:1].expand(draw(1).shape)))
    for mine, theirs in zip(*results[::-1], strict=True):
        check_equal(mine, theirs, theirs[0])


@every_solver
def test_a_run_in_float64_goes_on_in_float32(name, config):
    """The first steps are diffusers' own; so is what reads what these have kept."""
    types = []
    for scheduler in at_start(name, config):
        sample = run(scheduler, [draw(2).double(), draw(3).double()], draw(1).double())[-1][0]
        types.append([])
        for i in range(2, 6):
            t = scheduler.timesteps[i]
            if hasattr(scheduler, "is_scale_input_called"):
                scheduler.scale_model_input(sample, t)
            options = {"generator": torch.manual_seed(i)} if "Ancestral" in name else {}
            try:
                sample = scheduler.step(draw(i), t, sample.float(), **options).prev_sample
            except RuntimeError as error:  # dtypes that do not go together
                types[-1].append(str(error))
                break
            types[-1].append(sample.dtype)
    assert types[0] == types[1]


@every_solver
def test_results_have_the_names_of_diffusers(name, config):
    expected, actual = (
        scheduler.step(draw(2), scheduler.timesteps[0], draw(1))
        for scheduler in at_start(name, config)
    )
    assert type(actual) is type(expected) and actual.keys() == expected.keys()


@every_solver
def test_a_view_of_the_timesteps_is_not_read(name, config):
    """What reads a tensor's value waits for its device. Only the first step may, and what is on the
    CPU always: σ is."""
    _, mine = at_start(name, config)
    sample = run(mine, [draw(2)], draw(1))[-1][0]
    for i in range(1, 5):
        t, output = mine.timesteps[i], draw(2 + i)
        assert mine.why_stock(output, t, sample) is None
        with Operators() as operators:
            sample = mine.step(output, t, sample).prev_sample
        assert not {"aten::nonzero", "aten::item"} & set(operators.names)
        read = operators.names.count("aten::_local_scalar_dense")
        assert read <= (2 if name == "HeunDiscrete" else 0)


@every_solver
def test_state_that_changes_is_noticed(name, config):
    changes = {
        "prediction_type": lambda s: s.register_to_config(prediction_type="v_prediction"),
        "an attribute": lambda s: setattr(s.config, "prediction_type", "epsilon"),
        "other steps": lambda s: s.set_timesteps(7),
        "its levels": lambda s: (
            s.alphas_cumprod.mul_(0.9),
            getattr(s, "sigmas", s.betas).mul_(1.1),
        ),
    }
    theirs, mine = at_start(name, config)
    for what, change in changes.items():
        results, reasons = [], []
        for scheduler in (theirs, mine):
            change(scheduler)
            if hasattr(scheduler, "_step_index"):
                scheduler._step_index = None
            if name == "HeunDiscrete":
                scheduler.dt = None
            if name == "PNDM":
                scheduler.set_timesteps(scheduler.num_inference_steps)
            if name == "UniPCMultistep":
                scheduler.last_sample = None
            stepped = None if scheduler is theirs else reasons
            results += run(scheduler, [draw(2)], draw(1), stepped=stepped)
        check_equal(results[1], results[0], draw(1))
        assert reasons == [None], what


@every_solver
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))]
)
def test_copies_go_on_where_the_scheduler_is(name, config, copied):
    theirs, mine = at_start(name, config)
    outputs = [draw(2 + i) for i in range(3)]
    sample = run(mine, outputs, draw(1))[-1][0]
    twin = copied(mine)
    assert type(twin) is type(mine) and twin.config == mine.config
    results = []
    for scheduler in (mine, twin):
        t = scheduler.timesteps[3]
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.scale_model_input(sample, t)
        options = {"generator": torch.manual_seed(0)} if "Ancestral" in name else {}
        results.append(scheduler.step(draw(9), t, sample, return_dict=False, **options))
    check_equal(results[1], results[0], draw(1))


REASONS = [
    ("EulerDiscrete", {}, {"s_churn": 1.0}, "s_churn is 1.0"),
    ("EulerDiscrete", {}, {"timestep": 999}, "timestep is an integer"),
    ("EulerDiscrete", {}, {"timestep": torch.tensor(3.5)}, "not among scheduler.timesteps"),
    ("EulerDiscrete", {"prediction_type": "flow"}, {}, "prediction_type 'flow'"),
    ("EulerAncestralDiscrete", {"prediction_type": "sample"}, {}, "prediction_type 'sample'"),
    ("EulerAncestralDiscrete", {}, {"sample": draw(1, dtype=torch.float64)}, "float64"),
    ("HeunDiscrete", {"prediction_type": "flow"}, {}, "prediction_type 'flow'"),
    ("HeunDiscrete", {}, {"sample": draw(1)[:1]}, "sample (1, 3, 4, 4)"),
    ("UniPCMultistep", {"thresholding": True}, {}, "dynamic thresholding"),
    ("UniPCMultistep", {"solver_order": 4}, {}, "solver_order 4"),
    ("UniPCMultistep", {"solver_p": diffusers.DDIMScheduler()}, {}, "solver_p predicts"),
    ("UniPCMultistep", {}, {"model_output": draw(2).bfloat16()}, "torch.bfloat16"),
    ("DEISMultistep", {"thresholding": True}, {}, "dynamic thresholding"),
    ("DEISMultistep", {"prediction_type": "flow"}, {}, "prediction_type 'flow'"),
    ("DPMSolverMultistep", {"solver_order": 4}, {}, "solver_order 4"),
    ("PNDM", {"prediction_type": "sample"}, {}, "prediction_type 'sample'"),
    ("PNDM", {}, {"timestep": 3}, "timestep 3 is not among"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, config, options, reason", REASONS)
def test_what_is_left_to_diffusers(name, config, options, reason):
    theirs, mine = at_start(name, config)
    call = {"model_output": draw(2), "timestep": mine.timesteps[0], "sample": draw(1)} | options
    assert reason in mine.why_stock(**call)
    results = []
    for scheduler in (theirs, mine):
        torch.manual_seed(0)
        results.append(outcome(scheduler, **call))
    check_equal(results[1], results[0], draw(1))


@every_solver
def test_before_set_timesteps(name, config):
    results = []
    for scheduler in pair(getattr(diffusers, f"{name}Scheduler"), **config):
        t = 500 if scheduler.timesteps is None else scheduler.timesteps[500]
        torch.manual_seed(0)
        results.append(outcome(scheduler, draw(2), t, draw(1)))
    check_equal(results[1], results[0], draw(1))
