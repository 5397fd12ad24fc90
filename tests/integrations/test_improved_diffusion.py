"""improved-diffusion's, guided-diffusion's and DiT's diffusion objects, accelerated.

Every test runs against the stand-ins; and against the real codebases where a checkout is on
PYTHONPATH (improved_diffusion, guided_diffusion; DiT's package is called diffusion).
"""

import inspect

import pytest
import torch
from torch import nn

from fastdiff.errors import InputError
from fastdiff.integrations.improved_diffusion import SERVED, accelerate
from fastdiff.process.schedules import cosine_betas, linear_betas
from improved_diffusion_tools import (
    CODEBASES,
    EVERY,
    LOOPS,
    SHAPE,
    TYPES,
    Network,
    T,
    drawn,
    gradient,
)
from sampler_tools import small_unet


@pytest.fixture(params=CODEBASES)
def codebase(request):
    return CODEBASES[request.param]


@pytest.fixture
def guided(codebase):
    return codebase if codebase.guides else pytest.skip("it has no cond_fn")


def assert_same(stock, name, *args, atol=1e-3, **kwargs):
    """The accelerated method's result, which is the stock one's, as is what it drew."""
    fast, fast_state = drawn(getattr(accelerate(stock), name), *args, **kwargs)
    expected, state = drawn(getattr(stock, name), *args, **kwargs)
    torch.testing.assert_close(fast, expected, atol=atol, rtol=atol)
    assert torch.equal(fast_state, state)
    return fast


# --- Loops ---


@pytest.mark.sample(36)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("spaced,rescaled", [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("mean,variance", TYPES)
def test_samples_are_those_of_the_stock_loop(codebase, mean, variance, spaced, rescaled, loop):
    if mean not in codebase.means or variance not in codebase.variances:
        pytest.skip("this codebase has it in name only")
    stock = codebase.diffusion(mean, variance, spaced=spaced, rescaled=rescaled)
    assert_same(stock, loop, Network(variance), SHAPE)


@pytest.mark.seconds
@pytest.mark.parametrize("loop", LOOPS)
def test_samples_of_a_unet(codebase, loop):
    torch.manual_seed(0)
    network = small_unet(3, channel_mult=(1, 2), attention_resolutions=(2,)).eval()
    nn.init.normal_(network.out[2].weight, std=0.02)
    assert_same(codebase.diffusion(variance="FIXED_SMALL"), loop, network, SHAPE)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("schedule", [linear_betas, cosine_betas])
def test_options_of_the_loops(codebase, schedule, loop):
    stock = codebase.diffusion(variance="LEARNED_RANGE", betas=schedule(T))
    network, y = Network("LEARNED_RANGE"), torch.tensor([1, 3])
    assert_same(stock, loop, network, SHAPE, model_kwargs={"y": y})
    assert_same(stock, loop, network, SHAPE, denoised_fn=lambda x: torch.sin(2 * x))
    assert_same(stock, loop, network, list(SHAPE), clip_denoised=False, device="cpu")
    assert_same(stock, loop, network, SHAPE, noise=torch.ones(SHAPE), progress=True)
    if loop == "ddim_sample_loop":
        assert_same(stock, loop, network, SHAPE, eta=1.0)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("spaced,rescaled", [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
def test_classifier_guidance(guided, variance, spaced, rescaled, loop):
    stock = guided.diffusion(variance=variance, spaced=spaced, rescaled=rescaled)
    kwargs = {"y": torch.tensor([1, -1])}
    # As classifier_sample.py does: the classifier's gradient is taken inside of it.
    assert_same(stock, loop, Network(variance), SHAPE, cond_fn=gradient, model_kwargs=kwargs)


def test_arguments_stand_in_the_order_of_the_given_object(codebase):
    stock, network = codebase.diffusion(), Network()
    noise, y = torch.ones(SHAPE), {"y": torch.tensor([1, 3])}
    guidance = (gradient,) if codebase.guides else ()
    positional = (noise, False, torch.sin, *guidance, y, "cpu", False)
    assert_same(stock, "p_sample_loop", network, SHAPE, *positional)
    assert_same(stock, "ddim_sample_loop", network, SHAPE, *positional, 0.5)
    fast = accelerate(stock)
    for name in (*SERVED, *LOOPS):
        if name not in ("p_mean_variance", "training_losses"):  # SpacedDiffusion's take *args
            assert inspect.signature(getattr(fast, name)) == inspect.signature(getattr(stock, name))
    with pytest.raises(TypeError, match="missing a required argument: 'shape'"):
        fast.p_sample_loop(network)


def test_an_optional_argument_more_is_the_given_objects(codebase):
    stock = codebase.diffusion()
    kind = type(stock)

    class Weighted(kind):
        def q_sample(self, x_start, t, noise=None, weight=1.0):
            return weight * super().q_sample(x_start, t, noise)

    stock.__class__ = Weighted
    fast, x, t = accelerate(stock), torch.randn(SHAPE), torch.tensor([1, 2])
    for options in ({}, {"weight": 1.0}, {"weight": 2.0}, {"weight": torch.tensor(3.0)}):
        actual = fast.q_sample(x, t, noise=x, **options)
        torch.testing.assert_close(actual, stock.q_sample(x, t, noise=x, **options))

    class Demanding(kind):
        def q_sample(self, x_start, t, weight, noise=None):
            return weight * super().q_sample(x_start, t, noise)

    stock.__class__ = Demanding
    with pytest.raises(InputError, match="q_sample of a Demanding .* 'weight'"):
        accelerate(stock)


@pytest.mark.parametrize("loop", LOOPS)
def test_progressive_loops_yield_every_step(codebase, loop):
    stock, network = codebase.diffusion(), Network()
    steps = getattr(accelerate(stock), f"{loop}_progressive")(network, SHAPE)
    torch.manual_seed(1)  # nothing was drawn yet, as from a generator function
    torch.manual_seed(0)
    fast = list(steps)
    torch.manual_seed(0)
    expected = list(getattr(stock, f"{loop}_progressive")(network, SHAPE))
    assert len(fast) == T // EVERY
    torch.testing.assert_close(fast, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("spaced", [True, False])
@pytest.mark.parametrize("rescaled", [False, True])
def test_networks_get_the_timesteps_of_the_stock_loop(codebase, spaced, rescaled):
    stock = codebase.diffusion(spaced=spaced, rescaled=rescaled)
    fast, networks = accelerate(stock), (Network(), Network())
    x, t = torch.zeros(SHAPE), torch.tensor([3, 49])
    for diffusion, network in zip((stock, fast), networks, strict=True):
        diffusion.p_sample_loop(network, SHAPE)
        diffusion.p_mean_variance(network, x, t)
        diffusion.training_losses(network, x, t)
    expected, given = ([call for call in network.given] for network in networks)
    assert [t.dtype for t in given] == [t.dtype for t in expected]
    assert torch.equal(torch.cat(given), torch.cat(expected))


def test_a_function_or_a_method_may_be_the_model(codebase):
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Network()

        def with_scale(self, x, t, y, scale):
            return scale * self.network(x, t, y)

    stock, guide = codebase.diffusion(), Guide()
    kwargs = {"model_kwargs": {"y": torch.tensor([1, 3]), "scale": 0.7}, "device": "cpu"}
    assert_same(stock, "p_sample_loop", guide.with_scale, SHAPE, **kwargs)

    def function(x, t):
        return 0.5 * torch.tanh(x)

    fast, _ = drawn(accelerate(stock).p_sample_loop, function, SHAPE)  # a CPU, if nothing says
    expected, _ = drawn(stock.p_sample_loop, function, SHAPE, device="cpu")
    torch.testing.assert_close(fast, expected, atol=1e-3, rtol=1e-3)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.drop(torch.tanh(self.conv(x)))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_model_is_run_in_the_mode_it_is_in(codebase, loop):
    stock, network = codebase.diffusion(), Dropping()
    in_train = assert_same(stock, loop, network, SHAPE)
    assert network.training and network.drop.training
    in_eval = assert_same(stock, loop, network.eval(), SHAPE)
    assert not torch.equal(in_train, in_eval)


# --- Everything else ---


@pytest.mark.parametrize("variance", ["FIXED_SMALL", "LEARNED_RANGE"])
def test_single_steps(codebase, variance):
    stock = codebase.diffusion(variance=variance)
    t = torch.arange(len(stock.betas))
    x, network = torch.randn(len(t), 3, 4, 4).tanh(), Network(variance).eval()
    assert_same(stock, "q_mean_variance", x, t)
    assert_same(stock, "q_sample", x, t)
    assert_same(stock, "q_posterior_mean_variance", x, -x, t)
    for name in ("p_sample", "ddim_sample", "ddim_reverse_sample"):
        assert_same(stock, name, network, x, t, denoised_fn=torch.sin)
    assert_same(stock, "ddim_sample", network, x, t, eta=1.0)
    theirs = stock.p_mean_variance(network, x, t)
    ours = accelerate(stock).p_mean_variance(network, x, t)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=1e-4)


def test_reverse_ddim_may_be_guided(codebase):
    stock = codebase.diffusion()
    if "cond_fn" not in inspect.signature(stock.ddim_reverse_sample).parameters:
        pytest.skip("only DiT's is")
    x, t = torch.randn(SHAPE), torch.tensor([5, 30])
    kwargs = {"cond_fn": gradient, "model_kwargs": {}}
    assert_same(stock, "ddim_reverse_sample", Network(), x, t, **kwargs)


@pytest.mark.parametrize("loss", ["MSE", "RESCALED_MSE", "KL", "RESCALED_KL"])
@pytest.mark.parametrize("mean,variance", TYPES)
def test_training_losses(codebase, mean, variance, loss):
    if mean not in codebase.means or variance not in codebase.variances:
        pytest.skip("this codebase has it in name only")
    stock = codebase.diffusion(mean, variance, loss)
    t = torch.randint(1, 50, (8,), generator=torch.Generator().manual_seed(0))
    x_start = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    results, network = [], Network(variance)
    for diffusion in (stock, accelerate(stock)):
        torch.manual_seed(0)
        terms = diffusion.training_losses(network, x_start, t)
        network.zero_grad()
        terms["loss"].mean().backward()
        results.append((terms, network.scale.grad.clone(), torch.get_rng_state()))
    (expected, grad, state), (terms, fast_grad, fast_state) = results
    for name in expected:
        torch.testing.assert_close(terms[name], expected[name], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(fast_grad, grad, atol=1e-3, rtol=1e-3)
    assert torch.equal(fast_state, state)


@pytest.mark.parametrize("variance", ["FIXED_SMALL", "LEARNED_RANGE"])
def test_bits_per_dimension(codebase, variance):
    x_start = torch.randint(0, 256, (2, 3, 4, 4)) / 127.5 - 1
    stock = codebase.diffusion(variance=variance)
    assert_same(stock, "calc_bpd_loop", Network(variance), x_start)


def test_the_rest_is_the_given_object_s(codebase):
    stock = codebase.diffusion()
    fast = accelerate(stock)
    assert fast.betas is stock.betas and fast.model_mean_type is stock.model_mean_type
    assert fast.num_timesteps == 50 and fast.timestep_map == stock.timestep_map
    assert not hasattr(fast, "nothing_of_the_kind")


# --- What is refused ---


def test_a_subclass_that_computes_something_else_is_refused(codebase):
    class Thresholded(codebase.spaced):
        def p_mean_variance(self, model, *args, **kwargs):
            out = super().p_mean_variance(model, *args, **kwargs)
            return out | {"pred_xstart": 0.99 * out["pred_xstart"]}

    class Shifted(codebase.spaced):
        def p_mean_variance(self, model, *args, **kwargs):
            return super().p_mean_variance(lambda x, t: model(x, t + 1), *args, **kwargs)

    class Quiet(codebase.gaussian):
        def p_sample(self, *args, **kwargs):
            out = super().p_sample(*args, **kwargs)
            torch.randn(1)
            return out

    class Failing(codebase.spaced):
        def training_losses(self, model, *args, **kwargs):
            raise KeyError("mask")

    class Extended(codebase.spaced):
        def ddim_sample_loop(self, model, shape, noise=None, strength=1.0):
            return super().ddim_sample_loop(model, shape, noise)

    class OwnLoop(codebase.spaced):
        def p_sample_loop(self, *args, **kwargs):
            return 2 * super().p_sample_loop(*args, **kwargs)

    class OwnBound(codebase.spaced):
        def calc_bpd_loop(self, *args, **kwargs):
            return {}

    for base, message in (
        (OwnLoop, "p_sample_loop of a OwnLoop is its own, not the published one"),
        (OwnBound, "calc_bpd_loop of a OwnBound is its own"),
        (Thresholded, "p_mean_variance of a Thresholded differs .* in pred_xstart"),
        (Shifted, "p_mean_variance of a Shifted differs .* in the timesteps"),
        (Quiet, "p_sample of a Quiet differs .* in what it draws"),
        (Failing, "training_losses of a Failing differs .* KeyError"),
        (Extended, "ddim_sample_loop of a Extended is its own"),
    ):
        stock = codebase.diffusion(base=base, spaced=base is not Quiet)
        with pytest.raises(InputError, match=message) as error:
            accelerate(stock)
        assert "\n" not in str(error.value)


def test_what_is_no_diffusion_object_is_refused():
    with pytest.raises(InputError, match="a Linear cannot be accelerated .*model_mean_type"):
        accelerate(nn.Linear(1, 1))
    stock = CODEBASES["improved"].diffusion()
    stock.loss_type = type("Loss", (), {"name": "HUBER"})
    with pytest.raises(InputError, match="loss_type must be one of .* got 'huber'"):
        accelerate(stock)


def test_a_codebase_that_has_a_type_in_name_only_is_refused():
    if "DiT" not in CODEBASES:
        pytest.skip("no checkout of DiT on PYTHONPATH")
    for types in (("EPSILON", "LEARNED"), ("PREVIOUS_X", "FIXED_SMALL")):
        with pytest.raises(InputError, match="p_mean_variance of a SpacedDiffusion differs"):
            accelerate(CODEBASES["DiT"].diffusion(*types))


def test_what_cannot_be_captured_is_refused_where_a_graph_was_asked_for():
    fast = accelerate(CODEBASES["guided"].diffusion(), capture=True)
    with pytest.raises(InputError, match="a model in train mode cannot be captured"):
        fast.p_sample_loop(Network(), SHAPE)
    with pytest.raises(InputError, match="cond_fn cannot be captured"):
        fast.p_sample_loop(Network().eval(), SHAPE, cond_fn=gradient)
    with pytest.raises(InputError, match="capture=True: CUDA graphs need a CUDA device"):
        fast.p_sample_loop(Network().eval(), SHAPE)
