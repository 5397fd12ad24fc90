"""Two schedulers side by side, diffusers' own and ours, and the shapes they are tried on."""

from inspect import signature

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.integrations import diffusers as ours

SHAPE = (2, 3, 4, 4)


def pair(stock, **config):
    """(diffusers' own, ours) of this configuration; ``stock`` is diffusers' class."""
    return stock(**config), getattr(ours, stock.__name__)(**config)


def draw(seed, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outcome(scheduler, *arguments, **options):
    """What a step returns, or the type and text of what it raises."""
    try:
        return scheduler.step(*arguments, **options, return_dict=False)
    except Exception as error:  # whatever it is, both have to raise it
        return type(error), str(error)


def check_equal(actual, expected, sample, terms=1.0):
    """Tensors within 1e-5 of the values' scale and of one dtype; or one error.

    The scale is that of all the values: x_prev is made of x_0, which is large where ε was
    predicted from little signal. ``terms``: how many times larger the numbers are that diffusers
    adds to have them.
    """
    if not isinstance(expected[0], torch.Tensor):
        assert actual == expected
        return
    assert len(actual) == len(expected)
    scale = largest(sample, *expected) * terms
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * scale, equal_nan=True)


def is_finite(result):
    """Whether a step gave tensors of finite numbers."""
    return all(isinstance(x, torch.Tensor) and bool(x.isfinite().all()) for x in result)


def largest(*tensors):
    """The largest absolute value that is finite, or 1."""
    finite = [x[x.isfinite()] for x in tensors]
    return max([1.0, *(float(x.abs().max()) for x in finite if x.numel())])


def kept_of(scheduler):
    """The converted outputs that a multistep scheduler keeps, or what stands for none."""
    return [x for x in getattr(scheduler, "model_outputs", []) if x is not None] or ["none"]


def check_loop(
    theirs,
    mine,
    timesteps,
    *,
    channels=1,
    noise=None,
    follow=False,
    terms=None,
    kept_terms=None,
    **options,
):
    """Step both on one trajectory, diffusers' own: outcomes and random draws have to be equal.

    Returns why each of our steps was left to diffusers, None where it was not. ``timesteps`` gives
    (diffusers', ours), ``noise`` is a caller's variance_noise of each step. ``follow``: each goes
    on from what it returned itself. ``terms``: of each step how many times larger than the sample
    the numbers are that diffusers adds; the errors of a run that is followed grow as much.
    ``kept_terms``: the same of what a multistep scheduler keeps.
    """
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    sample = my_sample = draw(1)
    reasons, carried = [], 0.0
    drawing = "generator" in signature(theirs.step).parameters
    for i, (their_t, my_t) in enumerate(timesteps):
        output = (
            draw(100 + i, (SHAPE[0], channels * SHAPE[1], *SHAPE[2:])) * 0.9 + 0.1 * draw(5).mean()
        )
        their_options, my_options = (
            {"variance_noise": draw(200 + i)} if noise else {"generator": g} if drawing else {}
            for g in generators
        )
        if hasattr(theirs, "is_scale_input_called"):
            scaled = (s.scale_model_input(sample, t) for s, t in ((theirs, their_t), (mine, my_t)))
            assert torch.equal(*scaled)
        reasons.append(mine.why_stock(output, my_t, my_sample, **options, **my_options))
        expected = outcome(theirs, output, their_t, sample, **options, **their_options)
        actual = outcome(mine, output, my_t, my_sample, **options, **my_options)
        if follow and reasons[-1] and not is_finite(expected):
            break  # both are diffusers' own step, from samples that differ by a little
        factor = max(1.0, terms[i]) if terms else 1.0
        carried = factor * (carried + 1) if follow else factor
        check_equal(actual, expected, sample, carried)
        kept_scale = max(carried, kept_terms[i]) if kept_terms else carried
        check_equal(*(kept_of(s)[-1:] for s in (mine, theirs)), sample, kept_scale)
        assert torch.equal(*(generator.get_state() for generator in generators))
        if not isinstance(expected[0], torch.Tensor):
            break
        sample = my_sample = expected[0].nan_to_num().clamp(-1e3, 1e3)
        if follow:
            sample, my_sample = expected[0], actual[0]
    return reasons


class Operators(TorchDispatchMode):
    """Keeps the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))
