"""The captured step, on a stand-in for CUDA graphs (graph_tape.py); test_sampler_cuda.py has the
same on a GPU. What breaks captured samplers elsewhere is a test here."""

import gc
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from capture_tools import PROCESS, assert_equal, pair
from fastdiff.errors import InputError, TrainingError
from fastdiff.methods.registry import METHODS
from fastdiff.sampling import capture
from fastdiff.sampling.sampler import Sampler
from sampler_tools import SHAPE, Tiny, closed_form, diffusion

pytestmark = pytest.mark.usefixtures("made", "seeded")
LABELS = torch.tensor([0, 2, 1])


# --- One graph for all rows -------------------------------------------------------------------


@pytest.mark.seconds
@given(
    method=st.sampled_from([(method, None) for method in METHODS] + [("ddim", 0.6)]),
    var_type=st.sampled_from(["fixed_small", "fixed_large", "learned", "learned_range"]),
    mean_type=st.sampled_from(["epsilon", "x_start", "v"]),
    rng=st.sampled_from(["counter", "torch"]),
    steps=st.integers(1, 9),
    threshold=st.sampled_from([None, 0.9]),
    guided=st.booleans(),
    inpaint=st.booleans(),
    image=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=40, deadline=None)
def test_a_captured_run_is_the_eager_one(
    method, var_type, mean_type, rng, steps, threshold, guided, inpaint, image, seed
):
    process = diffusion(40, var_type=var_type, mean_type=mean_type)
    inner = closed_form(doubled=process.learns_variance)

    def model(x, t, w):
        return inner(x, t) * (1 + w.view(-1, 1, 1, 1))

    options = {"steps": steps, "spacing": "trailing" if steps == 1 else "uniform", "rng": rng}
    options |= {"method": method[0], "eta": method[1]}
    options |= {"dynamic_threshold": threshold}
    arguments = {"seed": seed, "model_kwargs": {"w": torch.linspace(0, 0.3, 3)}}
    if guided:
        options["guidance_scale"] = 2.5
        arguments["uncond_kwargs"] = {"w": torch.zeros(3)}
    if inpaint:
        arguments |= {"known": torch.ones(SHAPE), "known_mask": torch.eye(4)}
    if image:
        arguments |= {"image": torch.full(SHAPE, 0.3), "strength": 0.6}
    assert_equal(*pair(model, process, **options), **arguments)


def test_steps_eta_seed_scale_and_clip_recapture_nothing(made):
    captured, eager = pair(steps=4, method="ddim", guidance_scale=1.2)
    arguments = {"model_kwargs": {"y": LABELS}}
    samples = [assert_equal(captured, eager, seed=1, **arguments)]
    for changes, seed in [
        ({}, 2),
        ({"steps": 9}, 1),
        ({"steps": "3,4"}, 1),
        ({"timesteps": [0, 3, 21]}, 1),
        ({"eta": 0.7}, 1),
        ({"eta": 0.0, "guidance_scale": 0.4}, 1),
        ({"clip_denoised": False}, 1),
        ({"method": "ddpm"}, 2**64 - 1),
    ]:
        captured.configure(**changes)
        eager.configure(**changes)
        samples.append(assert_equal(captured, eager, seed=seed, **arguments))
    labels = {"model_kwargs": {"y": LABELS.flip(0)}}
    samples.append(assert_equal(captured, eager, seed=1, **labels))
    samples.append(assert_equal(captured, eager, seed=1, first_sample=2**40, **arguments))
    assert made() == 1
    assert len({tuple(x.flatten().tolist()) for x in samples}) == len(samples)
    captured.configure(method="dpmsolver++")
    eager.configure(method="dpmsolver++")
    assert_equal(captured, eager, seed=1, **arguments)
    assert made() == 2


def test_noise_is_new_at_every_replay():
    captured, _ = pair(closed_form(), steps=6, method="ddim", eta=1.0, clip_denoised=False)
    flat = Sampler(lambda x, t: torch.zeros_like(x), PROCESS, steps=6, capture=True)
    draws = []
    before = None
    for row, step in enumerate(flat.iterate((1, 2, 32, 32))):
        x = step["sample"]
        if before is not None and flat.table.noisy_rows[row]:
            draws.append((x - flat.table.d[row] * before) - flat.table.c[row] * step["pred_xstart"])
        before = x
    normal = [draw.flatten() / draw.std() for draw in draws]
    assert len(normal) == 4
    correlation = torch.corrcoef(torch.stack(normal)) - torch.eye(4)
    assert correlation.abs().max() < 0.1


def test_what_leaves_is_not_overwritten():
    captured, eager = pair(steps=5)
    first = captured.sample(SHAPE, seed=1)
    kept = first.clone()
    steps = list(captured.iterate(SHAPE, seed=2))
    assert torch.equal(first, kept)
    for ours, theirs in zip(steps, eager.iterate(SHAPE, seed=2), strict=True):
        assert torch.equal(ours["sample"], theirs["sample"])
        assert torch.equal(ours["pred_xstart"], theirs["pred_xstart"])
        assert (ours["step"], ours["timestep"]) == (theirs["step"], theirs["timestep"])


def test_given_noise_is_read_at_every_step(made):
    captured, eager = pair(steps=5)
    z = torch.randn(SHAPE)
    for noise in (z, lambda t: z.roll(t)):
        assert_equal(captured, eager, step_noise=noise)
    assert made() == 1
    with pytest.raises(InputError, match="noise has shape"):
        captured.sample(SHAPE, step_noise=torch.zeros(1, 2, 4, 4))


# --- What a graph does depend on --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_are_read_live(made, dtype):
    model = Tiny().eval()
    captured, eager = pair(model, steps=3, dtype=dtype)
    samples = [assert_equal(captured, eager)]

    def changed(recaptures, differs=True):
        before = made()
        samples.append(assert_equal(captured, eager))
        assert torch.equal(samples[-1], samples[-2]) != differs
        assert made() - before == recaptures

    with torch.no_grad():
        model.conv.weight.mul_(1.5)
    changed(0)
    model.conv.weight.data.copy_(torch.randn_like(model.conv.weight))  # no version changes
    changed(0)
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})
    changed(0)
    model.load_state_dict({k: v - 0.2 for k, v in model.state_dict().items()}, assign=True)
    changed(1)
    model.to(torch.bfloat16)
    changed(1, differs=dtype is None)
    model.to(torch.float32)
    with torch.no_grad():
        model.conv.weight.mul_(0.5)
    changed(1)
    model.conv = nn.Conv2d(2, 2, 1)
    changed(1)


@pytest.mark.parametrize("how", ["closure", "autocast"])
def test_weights_are_read_live_wherever_they_are(how):
    model = Tiny().eval()
    called = (lambda x, t: model(x, t)) if how == "closure" else model
    captured, eager = pair(called, steps=3)
    samples = []
    for factor in (1.0, 3.0, 0.5):
        model.conv.weight.data.mul_(factor)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            samples.append(assert_equal(captured, eager))
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True)
    samples.append(assert_equal(captured, eager))
    assert len({tuple(x.flatten().tolist()) for x in samples}) == 4


def test_a_hook_is_seen(made):
    model = Tiny().eval()
    captured, eager = pair(model, steps=3)
    before = assert_equal(captured, eager)
    hook = model.conv.register_forward_hook(lambda layer, args, out: 2 * out)
    assert not torch.equal(assert_equal(captured, eager), before)
    hook.remove()
    assert torch.equal(assert_equal(captured, eager), before)
    assert made() == 3


def test_weights_that_move_in_mid_run_are_seen():
    model = Tiny().eval()
    for sampler in pair(model, steps=4):
        steps = sampler.iterate(SHAPE)
        first = next(steps)["sample"]
        kept = model.conv.weight.data
        model.conv.weight.data = torch.zeros_like(kept)  # and not in place
        *_, last = steps
        model.conv.weight.data = kept
        if sampler.settings and sampler.explain().startswith("a captured"):
            captured = (first, last["sample"])
    assert torch.equal(captured[0], first) and torch.equal(captured[1], last["sample"])


def test_shapes_layouts_and_arguments_have_graphs_of_their_own(made):
    captured, eager = pair(steps=3)
    assert_equal(captured, eager)
    assert_equal(captured, eager, 5, 2, 4, 4)
    assert made() == 2
    assert_equal(captured, eager, model_kwargs={"y": LABELS})
    assert_equal(captured, eager, model_kwargs={"y": LABELS.int()})
    assert_equal(captured, eager)
    assert made() == 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = assert_equal(captured, eager)
    assert made() == 5
    assert not torch.equal(low, assert_equal(captured, eager))
    assert made() == 5


def test_numbers_in_arguments_are_part_of_the_key(made):
    def model(x, t, extra):
        return x * extra["factor"][0] + extra["shift"]

    captured, eager = pair(model, steps=3)
    for factor, shift in ((0.1, 0.0), (0.2, 0.0), (0.2, 0.5), (0.1, 0.0)):
        extra = {"factor": [factor], "shift": torch.tensor(shift)}
        assert_equal(captured, eager, model_kwargs={"extra": extra})
    assert made() == 2


@pytest.mark.seconds
def test_graphs_are_bounded_and_given_back(made):
    captured, eager = pair(steps=2)
    for count in range(1, capture.MOST_GRAPHS + 3):
        assert_equal(captured, eager, count, 2, 4, 4)
    held = captured._graphs.steps
    assert len(held) == capture.MOST_GRAPHS
    before = made()
    assert_equal(captured, eager, capture.MOST_GRAPHS + 2, 2, 4, 4)  # the newest is still there
    assert made() == before
    assert_equal(captured, eager, 1, 2, 4, 4)  # the oldest is not
    assert made() == before + 1
    graph = weakref.ref(next(iter(held.values())).graph)
    captured.close()
    gc.collect()
    assert graph() is None and not captured._graphs.places
    assert_equal(captured, eager)  # it can be used again


def test_guidance_in_an_interval_has_a_graph_inside_and_one_outside(made):
    captured, eager = pair(steps=10, guidance_scale=3.0, guidance_interval=(10, 25))
    assert_equal(captured, eager, model_kwargs={"y": LABELS})
    assert made() == 2
    for sampler in (captured, eager):
        sampler.configure(guidance_interval=(0, 5), guidance_scale=1.5)
    assert_equal(captured, eager, model_kwargs={"y": LABELS})
    assert made() == 2


# --- When there is no graph -------------------------------------------------------------------


def reads_back(x, t):
    return x * float(x.mean() > 0)


def test_a_model_that_cannot_be_captured_runs_eagerly_with_one_warning():
    sampler = Sampler(reads_back, PROCESS, steps=3)
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing") as caught:
        first = sampler.sample(SHAPE)
        sampler.sample((1, 2, 4, 4))
    assert len(caught) == 1
    assert sampler.explain().startswith("eager: it cannot be captured as a CUDA graph")
    assert torch.equal(first, Sampler(reads_back, PROCESS, steps=3, capture=False).sample(SHAPE))
    with pytest.raises(InputError, match="cannot be captured as a CUDA graph: CUDA error"):
        Sampler(reads_back, PROCESS, steps=3, capture=True).sample(SHAPE)


def test_arguments_that_a_graph_cannot_follow():
    class Prompt:
        strength = 0.1

    def model(x, t, prompt):
        return x * prompt.strength

    sampler = Sampler(model, PROCESS, steps=2)
    with pytest.warns(RuntimeWarning, match=r"model_kwargs\['prompt'\] is a Prompt"):
        sampler.sample(SHAPE, model_kwargs={"prompt": Prompt()})


def test_auto_keeps_what_it_measured_to_be_faster(monkeypatch):
    times = iter([1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(capture, "seconds_a_call", lambda call, device: next(times))
    model = Tiny().eval()
    sampler = Sampler(model, PROCESS, steps=2)
    sampler.sample(SHAPE)
    assert sampler.explain() == "a captured CUDA graph: 1e+03 ms a step, 2e+03 ms eagerly"
    sampler.sample((1, 2, 4, 4))
    assert sampler.explain().startswith("eager: measured faster than a CUDA graph")
    sampler.sample((1, 2, 4, 4))  # measured once
    assert sampler.stats.seconds.get("capture", 0.0) == 0.0


def test_memory_that_is_too_small_for_a_graph_alone(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(capture.CapturedStep, "__init__", no_memory)
    sampler = Sampler(closed_form(), PROCESS, steps=2)
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CUDA graph: CUDA out of mem"):
        sampler.sample(SHAPE)


def test_graphs_that_torch_compile_captures_are_left_to_it():
    options = {"mode": "reduce-overhead"}
    network = Sampler(closed_form(), PROCESS, steps=2, compile=options).network
    assert network.captures and not Sampler(closed_form(), PROCESS, compile=True).network.captures


def test_a_classifier_runs_eagerly_without_a_warning():
    sampler = Sampler(closed_form(), PROCESS, steps=2, cond_fn=lambda x, t: torch.zeros_like(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.sample(SHAPE)
    assert sampler.explain() == "eager: cond_fn needs autograd"


# --- Interruptions ----------------------------------------------------------------------------


def test_an_interrupted_run_leaves_nothing_behind():
    captured, eager = pair(steps=5)
    expected = assert_equal(captured, eager, seed=3)

    def stop(step):
        if step["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        captured.sample(SHAPE, seed=8, callback=stop)
    assert torch.equal(captured.sample(SHAPE, seed=3), expected)


def test_self_conditioning_begins_with_zeros_at_every_call():
    def model(x, t, x_self_cond):
        return closed_form()(x, t) + 0.1 * x_self_cond

    captured, eager = pair(model, self_condition="x_self_cond")
    for seed in (1, 2):
        assert_equal(captured, eager, seed=seed)


def test_two_iterations_of_one_sampler_do_not_mix():
    captured, eager = pair(steps=4)
    expected = [eager.sample(SHAPE, seed=seed) for seed in (1, 2)]
    one, two = captured.iterate(SHAPE, seed=1), captured.iterate(SHAPE, seed=2)
    for _ in range(4):
        first, second = next(one), next(two)
    assert torch.equal(first["sample"], expected[0])
    assert torch.equal(second["sample"], expected[1])


@pytest.mark.parametrize("by_flag", [False, True])
def test_a_network_that_answers_nan_is_named_with_its_step(monkeypatch, by_flag):
    if by_flag:  # as on devices where looking at x would be waiting for it
        flag = lambda device: torch.tensor([-1])  # noqa: E731
        monkeypatch.setattr("fastdiff.sampling.call.failure_flag", flag)

    def model(x, t):
        return torch.where((t <= 10).view(-1, 1, 1, 1), float("nan"), x)

    for capture_ in (True, False):
        sampler = Sampler(model, diffusion(20), steps=3, capture=capture_)
        for run in (sampler.sample, lambda shape, s=sampler: list(s.iterate(shape))):
            with pytest.raises(TrainingError, match=r"not finite after step 1 \(timestep 10\)"):
                run(SHAPE)
        sampler.configure(timesteps=[15, 19])
        assert torch.isfinite(sampler.sample(SHAPE)).all()
