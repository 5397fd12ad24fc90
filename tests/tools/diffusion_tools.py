"""Inputs, and outputs of networks that know the answer, for the tests of diffusion processes."""

import torch


def images(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1


def gaussian(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def output_for(diffusion, x_start_guess, x_t, t):
    """What a network of this mean_type would answer to mean the given x_0."""
    shape = (-1,) + (1,) * (x_t.dim() - 1)
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod)[t].view(shape).to(x_t.dtype)
    eps = (x_t - alpha_bar.sqrt() * x_start_guess) / (1 - alpha_bar).sqrt()
    return {
        "epsilon": eps,
        "x_start": x_start_guess,
        "v": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_start_guess,
        "previous_x": diffusion.q_posterior_mean_variance(x_start_guess, x_t, t)[0],
    }[diffusion.mean_type]


def with_variance(diffusion, output, values=0.3):
    if not diffusion.learns_variance:
        return output
    return torch.cat([output, torch.full_like(output, values)], dim=1)
