"""Classifier guidance: the published algorithms in float64, the published loops, and what it does
to samples whose every answer is known."""

import numpy as np
import pytest
import torch
from torch import nn

import published_classifier as published
from fastdiff import EncoderUNet, InputError, Sampler, classifier_gradient
from fastdiff.integrations.improved_diffusion import accelerate
from fastdiff.methods.registry import METHODS
from fastdiff.process.schedules import linear_betas
from improved_diffusion_tools import CODEBASES, LOOPS, Network, drawn
from sampler_tools import closed_form, diffusion

CLASSES = torch.tensor([2, 0, 1])
SHAPE = (3, 1, 8, 8)
SCALE = 3.0


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    model = EncoderUNet.from_preset("classifier-digits", out_channels=3).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def gradient(classifier, x, t):
    """∇ log p(y | x_t) of the published network, by autograd."""
    x = x.clone().requires_grad_()
    weights = published.Weights(classifier.state_dict())
    log_p = published.logits(weights, x, t, classifier.config).log_softmax(1)
    return torch.autograd.grad(log_p[range(len(x)), CLASSES].sum(), x)[0]


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(process, method, classifier, i):
    """What the process makes of x_t at step i, x_t, and the noise that it is given."""
    network = closed_form(doubled=process.learns_variance)
    x, z = normal(1), normal(2)
    found = getattr(process, method)(
        lambda x, t, y: network(x, t),
        x,
        torch.full((3,), i),
        clip_denoised=False,
        model_kwargs={"y": CLASSES},
        noise=z,
        cond_fn=classifier_gradient(classifier, SCALE),
    )
    return found, x, z, network(x, torch.full((3,), i * 50.0))


def process_of(var_type):
    return diffusion(20, rescale_timesteps=True, var_type=var_type)


@pytest.mark.parametrize("i", [0, 7, 19])
@pytest.mark.parametrize("var_type", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_is_algorithm_1(classifier, var_type, i):
    process = process_of(var_type)
    found, x, z, output = step(process, "p_sample", classifier, i)
    beta, a, before = process.betas[i], process.alphas_cumprod[i], process.alphas_cumprod_prev[i]
    eps, v = output.chunk(2, dim=1) if var_type == "learned_range" else (output, None)
    x_start = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
    mean = np.sqrt(before) * beta / (1 - a) * x_start
    mean = mean + np.sqrt(1 - beta) * (1 - before) / (1 - a) * x
    low = np.append(process.posterior_variance[1], process.posterior_variance[1:])[i]
    sigma2 = {"fixed_small": process.posterior_variance[i], "fixed_large": beta}.get(var_type)
    if var_type == "fixed_large" and i == 0:
        sigma2 = process.posterior_variance[1]
    if v is not None:
        share = (v + 1) / 2
        sigma2 = torch.exp(share * np.log(beta) + (1 - share) * np.log(low))
    sigma2 = torch.as_tensor(sigma2, dtype=torch.float64)
    moved = mean + SCALE * sigma2 * gradient(classifier, x, torch.full((3,), i * 50.0))
    expected = moved + (sigma2.sqrt() * z if i else 0)
    assert (moved - mean).abs().max() > 1e-5 or (i == 0 and var_type == "fixed_small")
    assert (found["sample"] - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (found["pred_xstart"] - x_start).abs().max() < 1e-10 * x_start.abs().max()


@pytest.mark.parametrize("i", [0, 7, 19])
def test_ddim_is_algorithm_2(classifier, i):
    process = process_of("fixed_small")
    found, x, _, output = step(process, "ddim_sample", classifier, i)
    a, before = process.alphas_cumprod[i], process.alphas_cumprod_prev[i]
    given = gradient(classifier, x, torch.full((3,), i * 50.0))
    eps = output - np.sqrt(1 - a) * SCALE * given
    x_start = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
    expected = np.sqrt(before) * x_start + np.sqrt(1 - before) * eps
    assert (found["sample"] - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (found["pred_xstart"] - x_start).abs().max() < 1e-10 * x_start.abs().max()


@pytest.mark.seconds
@pytest.mark.parametrize("loop", LOOPS)
def test_the_loops_of_guided_diffusion(loop):
    """Theirs, guided as by the script that samples with a classifier, and fastdiff's in its
    place, guided by classifier_gradient."""
    stock, network = (
        CODEBASES["guided"].diffusion(variance="LEARNED_RANGE", betas=linear_betas(200)),
        Network("LEARNED_RANGE"),
    )
    torch.manual_seed(0)
    small = EncoderUNet(8, 3, 32, 3, 1, (), channel_mult=(1,))
    for parameter in small.parameters():
        nn.init.normal_(parameter, std=0.3)

    def cond_fn(x, t, y=None):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_p = torch.log_softmax(small(x, t), dim=-1)
            return torch.autograd.grad(log_p[range(len(x)), y].sum(), x)[0] * 50.0

    options = {"model_kwargs": {"y": CLASSES[:2]}}
    expected, _ = drawn(getattr(stock, loop), network, (2, 3, 8, 8), cond_fn=cond_fn, **options)
    options["cond_fn"] = classifier_gradient(small, 50.0)
    for process in (stock, accelerate(stock)):
        found, _ = drawn(getattr(process, loop), network, (2, 3, 8, 8), **options)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    del options["cond_fn"]
    plain, _ = drawn(getattr(stock, loop), network, (2, 3, 8, 8), **options)
    assert (plain - expected).abs().max() > 0.01


# --- Where p(y | x_t) is known: data are a point of two, one for each class ---


def two_points(process):
    """The exact network, and the exact classifier, for x_0 = ±0.6 in each of two pixels."""
    signal = torch.from_numpy(process.signal_scale).float()
    noise = torch.from_numpy(process.noise_scale).float()

    def log_odds(x, t):
        s, n = (level[t.long()].view(-1, 1) for level in (signal, noise))
        return 2 * 0.6 * s[:, 0] * x.flatten(1).sum(1) / n[:, 0] ** 2

    def classifier(x, t):
        return torch.stack([torch.zeros(len(x)), log_odds(x, t)], dim=1)

    def network(x, t):
        x_start = 0.6 * torch.tanh(log_odds(x, t) / 2).view(-1, 1, 1, 1).expand_as(x)
        s, n = (level[t.long()].view(-1, 1, 1, 1) for level in (signal, noise))
        return (x - s * x_start) / n

    return network, classifier


@pytest.mark.parametrize("method", METHODS)
def test_samples_become_those_of_their_class(method):
    process = diffusion(25)
    network, classifier = two_points(process)
    y = torch.arange(200) % 2

    def share(scale):
        sampler = Sampler(
            network, process, method=method, cond_fn=classifier_gradient(classifier, scale)
        )
        x = sampler.sample((200, 1, 1, 2), seed=3, cond_kwargs={"y": y})
        return float(((x.mean((1, 2, 3)) > 0).long() == y).double().mean()), x

    unguided, x = share(0.0)
    assert 0.4 < unguided < 0.6
    plain = Sampler(network, process, method=method).sample((200, 1, 1, 2), seed=3)
    assert torch.equal(x, plain)
    little, fully = share(0.3)[0], share(1.0)[0]
    assert unguided < little < fully and fully > 0.97
    assert share(-1.0)[0] < 0.3  # away from it


def test_the_classifier_is_run_in_eval_mode_and_left_as_it_was():
    seen = []

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, t):
            seen.append(self.training)
            return self.layer(x.flatten(1))

    model = Noting()
    cond_fn = classifier_gradient(model)
    with torch.no_grad():
        answer = cond_fn(torch.randn(3, 1, 2, 2), torch.zeros(3), CLASSES, low_res=None)
    assert seen == [False] and model.training and answer.shape == (3, 1, 2, 2)
    assert not answer.requires_grad and model.layer.weight.grad is None


# --- Refusals ---


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", None])
def test_refuses_a_scale_that_is_not_finite(scale):
    with pytest.raises(InputError, match="the classifier's scale is .*; expected a finite number"):
        classifier_gradient(closed_form(), scale)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, r"the classifier needs y, the samples' classes: \(3,\) integers"),
        (torch.zeros(2, dtype=torch.int64), r"y has shape \(2,\)"),
        (torch.zeros(3), "dtype float32; expected"),
        (torch.tensor([0, 3, 1]), "y holds class 3; the classifier has 0 … 2"),
        (torch.tensor([0, -1, 1]), "y holds class -1"),
    ],
)
def test_refuses_classes_that_are_not_the_classifiers(y, message):
    cond_fn = classifier_gradient(lambda x, t: x.flatten(1)[:, :3])
    with pytest.raises(InputError, match=message):
        cond_fn(torch.zeros(SHAPE), torch.zeros(3), y)


def test_refuses_what_is_no_classifier():
    with pytest.raises(InputError, match="classifier is a str; expected a module or a function"):
        classifier_gradient("runs/classifier")
    cond_fn = classifier_gradient(lambda x, t: x)
    with pytest.raises(InputError, match=r"the classifier answered \(3, 1, 8, 8\); expected log"):
        cond_fn(torch.zeros(SHAPE), torch.zeros(3), CLASSES)


def test_arguments_of_a_classifier_need_one():
    sampler = Sampler(closed_form(), diffusion())
    with pytest.raises(InputError, match="cond_kwargs belong to a classifier; give .* a cond_fn"):
        sampler.sample(SHAPE, cond_kwargs={"y": CLASSES})
    with pytest.raises(InputError, match="cond_kwargs is a Tensor; expected a dict"):
        sampler.sample(SHAPE, cond_kwargs=CLASSES)
