"""A sampler that runs its U-Net as a program gives the samples of one that does not."""

import pickle

import pytest
import torch
from torch import nn

from fastdiff.errors import InputError
from fastdiff.models.execution import executor
from fastdiff.models.execution.reading import Reading
from fastdiff.ops.convolution.fastest import Products
from fastdiff.process.edm import EDM
from fastdiff.sampling.network import execution
from fastdiff.sampling.sampler import Sampler
from kernel_tools import ISAS, forced_isa
from sampler_tools import Tiny, diffusion
from thread_tools import at_once
from unet_tools import small_unet

PROCESS = diffusion(20)
SHAPE = (2, 3, 8, 8)


def calm_unet(**options):
    """A network with answers so small that its rounding is not amplified from step to step."""
    model = small_unet(**options)
    with torch.no_grad():
        model.out[2].weight.mul_(0.1)
        model.out[2].bias.mul_(0.1)
    return model


def samplers(model, **options):
    """One that runs the model as it is, and one that runs it as a program."""
    options = {"steps": 3, "method": "ddim", **options}
    return [Sampler(model, PROCESS, executor=executor, **options) for executor in (False, True)]


def assert_same(model, *, tolerance=1e-3, inputs=None, **options):
    theirs, ours = samplers(model, **options)
    expected, found = (s.sample(SHAPE, seed=1, **(inputs or {})) for s in (theirs, ours))
    assert "; the network as a program of" in ours.explain()
    assert "the network" not in theirs.explain()
    assert (found - expected).abs().max() < tolerance
    return ours


def programs(sampler):
    return list(sampler.network.programs.forwards.values())


def test_the_samples_are_the_same():
    sampler = assert_same(calm_unet())
    assert sampler.explain() == (
        "eager: CUDA graphs need a CUDA device, and the samples are on cpu; "
        "the network as a program of "
        f"{programs(sampler)[0].executor.count} operations"
    )


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_samples_are_near_in_bfloat16(weights):
    model = calm_unet().to(weights)
    assert_same(model, dtype=torch.bfloat16, tolerance=0.1)
    assert all(p.dtype == weights for p in model.parameters())


def test_guidance_classes_and_another_size():
    model = calm_unet(num_classes=3, null_class=True, use_scale_shift_norm=True)
    inputs = {"model_kwargs": {"y": torch.tensor([0, 2])}}
    # Guidance multiplies the difference of two answers, and so their rounding.
    sampler = assert_same(model, guidance_scale=2.0, inputs=inputs, tolerance=1e-2)
    expected = Sampler(model, PROCESS, steps=3, method="ddim", guidance_scale=2.0)
    shape = (2, 3, 6, 10)
    found = sampler.sample(shape, **inputs)
    assert (found - expected.sample(shape, **inputs)).abs().max() < 1e-2


class Wrapper(nn.Module):
    """A network around a network, as EDM's preconditioning is one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, x, timesteps, **kwargs):
        return self.scale * self.inner(x, timesteps, **kwargs)


@pytest.mark.parametrize("kind", ["module", "twice", "closure", "method"])
def test_a_unet_inside_of_something_runs_as_a_program(kind):
    unet = calm_unet()
    wrapped = {
        "module": lambda: Wrapper(unet),
        "twice": lambda: Wrapper(Wrapper(unet)),
        "closure": lambda: lambda x, t: unet(x, t) * 0.9,
        "method": lambda: Wrapper(unet).forward,
    }[kind]()
    assert_same(wrapped)


def test_a_forward_that_is_called_by_itself_is_no_program():
    model = calm_unet()
    theirs, ours = samplers(model.forward)
    assert torch.equal(ours.sample(SHAPE), theirs.sample(SHAPE))
    assert ours.explain().endswith("its forward was called by itself, and not the network")


def test_the_process_of_karras_runs_its_network_as_a_program():
    model, process = calm_unet(), EDM(20)
    both = [
        Sampler(model, process, steps=4, method="ddim", executor=executor).sample(SHAPE)
        for executor in (False, True)
    ]
    assert (both[0] - both[1]).abs().max() < 1e-3


def test_a_network_in_training_mode_is_sampled_in_eval_mode():
    model = calm_unet(dropout=0.5).train()
    assert_same(model)
    assert model.training and not any("forward" in vars(m) for m in model.modules())


# --- What changes ---------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_that_change_between_calls_are_seen():
    model = calm_unet()
    theirs, ours = samplers(model)
    before = ours.sample(SHAPE)
    layer = model.middle_block[0].in_layers[2]

    def data():
        layer.weight.data.mul_(3)

    def assign():
        model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)

    def exchange():
        model.out[2] = nn.Conv2d(32, 3, 3, padding=1)
        model.out[2].weight.mul_(0.5)

    for change in (data, assign, exchange):
        change()
        found = ours.sample(SHAPE)
        assert (found - theirs.sample(SHAPE)).abs().max() < 1e-3, change
        assert (found - before).abs().max() > 1e-2, change
        before = found


@torch.no_grad()
def test_changes_between_two_steps_are_seen():
    def changed(executor, change):
        model = calm_unet()
        sampler = Sampler(model, PROCESS, steps=3, method="ddim", executor=executor)
        return sampler.sample(SHAPE, callback=lambda step: change(model))

    def in_place(model):
        model.out[2].weight.mul_(2)

    def exchange(model):
        torch.manual_seed(1)
        model.out[2] = nn.Conv2d(32, 3, 3, padding=1)

    def nothing(model):
        pass

    plain = changed(True, nothing)
    for change in (in_place, exchange):
        found = changed(True, change)
        assert (found - changed(False, change)).abs().max() < 1e-3
        assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("between", ["calls", "steps"])
def test_a_hook_brings_the_modules_back(between, monkeypatch):
    monkeypatch.setattr(execution, "slower", lambda dtype: "")
    model = calm_unet()
    sampler = Sampler(model, PROCESS, steps=3, method="ddim")
    expected, seen = sampler.sample(SHAPE), []
    assert "as a program of" in sampler.explain()

    def hook(step=None):
        if not model.middle_block[1]._forward_hooks:
            model.middle_block[1].register_forward_hook(lambda *_: seen.append(1))

    if between == "calls":
        hook()
    found = sampler.sample(SHAPE, callback=hook if between == "steps" else None)
    assert len(seen) == (3 if between == "calls" else 2)
    assert (found - expected).abs().max() < 1e-3
    assert sampler.explain().endswith("; the network as it is: middle_block.1 has a hook")
    model.middle_block[1]._forward_hooks.clear()
    assert torch.equal(sampler.sample(SHAPE), expected)
    assert "as a program of" in sampler.explain()


def test_programs_are_taken_where_they_pay(monkeypatch):
    for pays in (False, True):
        monkeypatch.setattr(execution, "slower", lambda dtype, why="" if pays else "slow": why)
        sampler = Sampler(calm_unet(), PROCESS, steps=2)
        sampler.sample(SHAPE)
        assert ("as a program of" in sampler.explain()) == pays
        other = Sampler(Tiny(3), PROCESS, steps=2)
        other.sample(SHAPE)
        assert "as a program of" not in other.explain()


def test_where_programs_pay(monkeypatch):
    """Without tiles: where registers are wide."""
    monkeypatch.setattr(execution, "products_of", lambda dtype: Products.FLOAT32)
    for isa in ISAS:
        with forced_isa(isa):
            for dtype in (torch.float32, torch.bfloat16):
                assert (execution.slower(dtype) == "") == (isa != "baseline")
            assert "float16" in execution.slower(torch.float16)
    monkeypatch.setattr(execution, "products_of", lambda dtype: Products.SPLIT)
    assert execution.slower(torch.float16) == ""


@pytest.mark.parametrize("most", [0, 256 << 20])
def test_a_call_leaves_memory_for_the_next_or_gives_it_back(most, monkeypatch):
    monkeypatch.setattr(executor, "MOST_KEPT", most)
    sampler = Sampler(calm_unet(), PROCESS, steps=2, executor=True)
    held = []
    for _ in range(2):
        sampler.sample(
            SHAPE, callback=lambda step: held.append(programs(sampler)[0].executor._weights)
        )
    kept = programs(sampler)[0].executor._weights
    assert held[0] and (kept is held[0] is held[-1] if most else kept is None)


def test_a_network_is_looked_at_once_in_a_call(monkeypatch):
    sampler = Sampler(calm_unet(), PROCESS, steps=3, executor=True)
    sampler.sample(SHAPE)
    asked, difference = [], Reading.difference
    monkeypatch.setattr(Reading, "difference", lambda self: asked.append(1) or difference(self))
    sampler.sample(SHAPE)
    assert len(asked) == 1


def test_a_caller_with_autocast_or_gradients_gets_the_forward():
    model = calm_unet()
    theirs, ours = samplers(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.sample(SHAPE), theirs.sample(SHAPE))
    assert ours.explain().endswith("the network as it is: it is under the caller's autocast")
    scales = []

    def through(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(model(x, t).square().sum(), x)
        scales.append(gradient.norm())
        return gradient

    expected, found = (
        Sampler(through, PROCESS, steps=2, executor=executor).sample(SHAPE)
        for executor in (False, True)
    )
    assert torch.equal(found, expected) and all(scale > 0 for scale in scales)


def test_threads_share_a_sampler():
    model = calm_unet()
    sampler = Sampler(model, PROCESS, steps=3, executor=True)
    expected = [sampler.sample(SHAPE, seed=seed) for seed in range(4)]
    found = at_once(*(lambda s=seed: sampler.sample(SHAPE, seed=s) for seed in range(4)))
    assert all(map(torch.equal, found, expected))


def test_a_network_that_is_pickled_and_back():
    network = Sampler(calm_unet(), PROCESS, executor=True).network
    assert pickle.loads(pickle.dumps(network)).programs.executor is True


# --- Refusals -------------------------------------------------------------------------------------


def hooked():
    model = calm_unet()
    model.out[2].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "model, options, message",
    [
        (Tiny(3), {}, "the model has no U-Net that is known"),
        (hooked(), {}, "out.2 has a hook"),
        (calm_unet(), {"dtype": torch.float16}, "its weights are float32, to be run in float16"),
        (
            calm_unet().double(),
            {"dtype": torch.bfloat16},
            "its weights are float64, to be run in bfloat16",
        ),
    ],
)
def test_who_insists_on_a_program_is_told_why_there_is_none(model, options, message):
    sampler = Sampler(model, PROCESS, steps=2, executor=True, **options)
    with pytest.raises(InputError) as caught:
        sampler.sample(SHAPE)
    assert str(caught.value) == f"executor=True: {message}; take executor='auto' or False"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"executor": "yes"}, "executor is 'yes'; expected 'auto', True or False"),
        ({"executor": True, "compile": True}, "executor=True and compile exclude each other"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        Sampler(calm_unet(), PROCESS, **options)
