"""Two schedulers side by side, diffusers' own and ours, and the shapes they are tried on."""

import torch

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


def check_equal(actual, expected, sample):
    """Tensors within 1e-5 of the values' scale and of one dtype; or one error.

    The scale is that of all the values: x_prev is made of x_0, which is large where ε was
    predicted from little signal.
    """
    if not isinstance(expected[0], torch.Tensor):
        assert actual == expected
        return
    assert len(actual) == len(expected)
    finite = [x[x.isfinite()] for x in (sample, *expected)]
    scale = max([1.0, *(float(x.abs().max()) for x in finite if x.numel())])
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * scale, equal_nan=True)


def check_loop(theirs, mine, timesteps, *, channels=1, noise=None, **options):
    """Step both on one trajectory, diffusers' own: outcomes and random draws have to be equal.

    Returns why each of our steps was left to diffusers, None where it was not. ``timesteps`` gives
    (diffusers', ours), ``noise`` is a caller's variance_noise of each step.
    """
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    sample, reasons = draw(1), []
    for i, (their_t, my_t) in enumerate(timesteps):
        output = (
            draw(100 + i, (SHAPE[0], channels * SHAPE[1], *SHAPE[2:])) * 0.9 + 0.1 * draw(5).mean()
        )
        their_options, my_options = (
            {"variance_noise": draw(200 + i)} if noise else {"generator": g} for g in generators
        )
        reasons.append(mine.why_stock(output, my_t, sample, **options, **my_options))
        expected = outcome(theirs, output, their_t, sample, **options, **their_options)
        check_equal(outcome(mine, output, my_t, sample, **options, **my_options), expected, sample)
        assert torch.equal(*(generator.get_state() for generator in generators))
        if not isinstance(expected[0], torch.Tensor):
            break
        sample = expected[0].nan_to_num().clamp(-1e3, 1e3)
    return reasons
