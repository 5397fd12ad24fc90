"""How noisy the loss is under different schedules, and a schedule learned to make it less so.

Question: with the ends of gamma = -log SNR fixed, the bound in continuous time does not depend on
the schedule between them, but the variance of its estimate at a random t does (Kingma et al. 2021,
arXiv:2107.00630, sections 3.2 and 5). There the loss is ½·gamma'(t)·|eps - eps(x_t)|², and a
monotone network gamma(t) is trained to lower its square. How much is there to gain? Networks of
gamma (a residual MLP, eps-prediction) learn 1,437 of scikit-learn's digits, gamma from -9 to 9.
The schedule is learned once, on a network trained with gamma even in t, and then kept, where the
paper trains both at once. "best" needs no learning: for a network that stays as it is, the least
variance is known, where the loss's root mean square is the same at every t.

Look at: the middle panel. linear and cosine hurry through the images with hardly any noise, whose
terms make nearly all of the bound: a few draws of t have enormous losses, the others next to none.
The learned schedule is level over nine tenths of t, where all but a trace of the bound is.

Result: standard deviation of one image's loss (mean 3.7 bits/dim) 19.0 with linear, 13.1 with
cosine, 4.1 with gamma even in t, 1.35 learned; the least possible is 0.874, "best" 0.886. The
variance of the gradient, which is not what was lowered, falls with it: 47, 23 and 2.1 times the
learned one's. Equal networks trained with each, 2,000 steps, two seeds: 3.57 and 3.56 bits/dim of
held-out digits with linear, 3.45 and 3.45 with cosine, 3.27 and 3.28 even in t, 3.20 and 3.21
learned. One thing is not as hoped: "best", whose loss and gradient have the least variance of all,
trains worst, 3.66 and 3.65. It is best for the finished network, and gives gamma > 0 the last 3 %
of t: little to learn these levels from, while the network does not know them.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from _common import (
    COLOURS,
    TinyMLP,
    batch_gradients,
    draw_from,
    figure,
    load_digits,
    parse_arguments,
    print_table,
    save_plot,
    train,
)
from torch import Tensor, nn

from fastdiff import GaussianDiffusion, create_diffusion
from fastdiff.process.likelihood import summarize_bpd

GAMMA_MIN, GAMMA_MAX = -9.0, 9.0
BATCH = 128
BITS = 1 / math.log(2)  # to a nat


def main() -> None:
    args = parse_arguments(__doc__, "learned_schedule")
    images, held_out = load_digits(held_out=60 if args.quick else 360)
    # So many steps that the best schedule, whose gamma leaps at the end, moves little in each.
    count, steps, fitting = (50, 20, 20) if args.quick else (10_000, 2000, 1000)
    seeds, batches = (1, 4) if args.quick else (2, 200)
    draw = draw_from(images)
    t = np.linspace(0, 1, count)
    even = GAMMA_MIN + (GAMMA_MAX - GAMMA_MIN) * t
    network = trained(even, draw, steps, seed=0)
    learned = fit(network, draw, fitting)
    grid = np.linspace(GAMMA_MIN, GAMMA_MAX, 21 if args.quick else 73)
    means, squares = moments(network, draw, grid)
    schedules = {
        "linear": named_schedule("linear", t),
        "cosine": named_schedule("cosine", t),
        "even in gamma": even,
        "learned": learned(torch.from_numpy(t).float())[0].detach().double().numpy(),
        "best": best_schedule(grid, squares, t),
    }

    averages, deviations, noises = {}, {}, {}
    for name, gammas in schedules.items():
        loss = losses(network, gammas, draw, 1000 if args.quick else 40000)
        averages[name], deviations[name] = loss.mean().item(), loss.std().item()
        gradients = batch_gradients(
            OfGamma(network, gammas),
            process_of(gammas),
            draw,
            batches,
            batch=BATCH,
            levels=range(1, count),
        )
        noises[name] = gradients.var(0).sum().item()
    print_table(
        "The loss of one image at a random t, bits/dim: mean and standard deviation (least of all "
        f"schedules: {least_deviation(grid, means, squares):.3g});\nvariance of the gradient of "
        f"{BATCH} images, and both as a multiple of the learned schedule's",
        ["schedule", "mean", "sd", "gradient", "sd / learned", "gradient / learned"],
        [
            [
                name,
                averages[name],
                deviations[name],
                noises[name],
                deviations[name] / deviations["learned"],
                noises[name] / noises["learned"],
            ]
            for name in schedules
        ],
    )

    scored = process_of(np.linspace(GAMMA_MIN, GAMMA_MAX, min(count, 250)))
    scores = {
        name: [
            score(trained(gammas, draw, steps, seed=seed), scored, held_out)
            for seed in range(1, seeds + 1)
        ]
        for name, gammas in schedules.items()
    }
    print_table(
        f"Trained with each schedule, {steps} steps: the bound's terms of t > 0, of "
        f"{len(held_out)} held-out digits, bits/dim",
        ["schedule", *[f"seed {k + 1}" for k in range(seeds)]],
        [[name, *values] for name, values in scores.items()],
    )
    plot(args.out, t, schedules, grid, squares, deviations, noises)


# -- schedules ------------------------------------------------------------------------------------


def named_schedule(name: str, t: np.ndarray) -> np.ndarray:
    """gamma (K,) at t in [0, 1] of fastdiff's schedule, of which the part between the ends is
    stretched over all of t."""
    process = create_diffusion(steps=1000, noise_schedule=name)
    gammas = np.log(process.noise_scale**2 / process.signal_scale**2)
    places = np.arange(len(gammas))
    first, last = np.interp([GAMMA_MIN, GAMMA_MAX], gammas, places)
    return np.interp(first + (last - first) * t, places, gammas)


class MonotoneSchedule(nn.Module):
    """gamma(t), rising from GAMMA_MIN at 0 to GAMMA_MAX at 1.

    As in the paper, a line plus a layer of sigmoids of that line, every weight positive, stretched
    to the ends. t (N,) in [0, 1] -> gamma, its derivative; (N,) each.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.line = nn.Parameter(torch.zeros(2))  # weight before softplus, bias
        self.inner = nn.Parameter(torch.linspace(1.0, 3.0, width))
        self.bias = nn.Parameter(torch.linspace(2.0, -4.0, width))
        self.outer = nn.Parameter(torch.full((width,), -3.0))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        ends, _ = self.unstretched(torch.tensor([0.0, 1.0], dtype=t.dtype))
        value, slope = self.unstretched(t)
        stretch = (GAMMA_MAX - GAMMA_MIN) / (ends[1] - ends[0])
        return GAMMA_MIN + stretch * (value - ends[0]), stretch * slope

    def unstretched(self, t: Tensor) -> tuple[Tensor, Tensor]:
        weight, inner, outer = map(F.softplus, (self.line[0], self.inner, self.outer))
        line = weight * t + self.line[1]
        bent = torch.sigmoid(inner * line[:, None] + self.bias)  # (N, width)
        slope = 1 + (outer * inner * bent * (1 - bent)).sum(1)
        return line + (outer * bent).sum(1), weight * slope


def best_schedule(gammas: np.ndarray, squares: np.ndarray, t: np.ndarray) -> np.ndarray:
    """gamma(t) of the least variance, where ``squares`` are E[(loss / gamma')²] at ``gammas``.

    ∫ gamma'(t)² · square dt over all gamma(t) with these ends is least where gamma'·√square is the
    same at every t.
    """
    share = cumulative(gammas, np.sqrt(squares))
    return np.interp(t, share / share[-1], gammas)


def least_deviation(gammas: np.ndarray, means: np.ndarray, squares: np.ndarray) -> float:
    """The loss's standard deviation with that schedule."""
    mean, root = (cumulative(gammas, values)[-1] for values in (means, np.sqrt(squares)))
    return math.sqrt(root**2 - mean**2)


def cumulative(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """∫ y dx from the first x to each, by trapezoids."""
    return np.append(0.0, np.cumsum(0.5 * (y[1:] + y[:-1]) * np.diff(x)))


def fit(network: TinyMLP, draw, steps: int) -> MonotoneSchedule:
    """A schedule trained to lower the variance of ``network``'s loss, which stays as it is.

    The loss's mean is the same for all schedules, so its square is what is lowered.
    """
    network.requires_grad_(False)
    schedule = MonotoneSchedule()
    optimizer = torch.optim.Adam(schedule.parameters(), lr=2e-2)
    generator = torch.Generator().manual_seed(5)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - k / steps)
        x_start = draw(BATCH, generator)
        # One random offset for the whole batch: t is spread evenly, as in the paper.
        t = (torch.rand((), generator=generator) + torch.arange(BATCH) / BATCH) % 1
        noise = torch.randn(x_start.shape, generator=generator)
        loss = continuous_loss(network, x_start, *schedule(t), noise)
        optimizer.zero_grad()
        loss.square().mean().backward()
        optimizer.step()
    return schedule


# -- the loss -------------------------------------------------------------------------------------


def continuous_loss(network, x_start: Tensor, gamma: Tensor, slope, noise: Tensor) -> Tensor:
    """½·gamma'·|eps − eps(x_t)|², (N,) in bits/dim; gamma (N,), its slope (N,) or a number."""
    shape = (-1, *[1] * (x_start.ndim - 1))
    signal, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    x_t = signal.view(shape) * x_start + sigma.view(shape) * noise
    error = (noise - network(x_t, gamma - GAMMA_MIN)) ** 2
    return 0.5 * BITS * slope * error.flatten(1).mean(1)


def process_of(gammas: np.ndarray) -> GaussianDiffusion:
    """The process whose step i ends at gammas[i]; its loss estimates the whole bound, bits/dim."""
    alphas_cumprod = 1 / (1 + np.exp(gammas))
    betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return GaussianDiffusion(betas, loss_type="rescaled_kl")


class OfGamma(nn.Module):
    """A network of gamma as one of t, the step's index; gammas (K,)."""

    def __init__(self, network: nn.Module, gammas: np.ndarray) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("gammas", torch.from_numpy(gammas - GAMMA_MIN).float())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, self.gammas[t.long()])


def trained(gammas: np.ndarray, draw, steps: int, seed: int) -> nn.Module:
    """A network of gamma, trained by the terms of t > 0: the decoder's is not the schedule's."""
    torch.manual_seed(seed)
    network = TinyMLP((1, 8, 8), t_max=GAMMA_MAX - GAMMA_MIN, width=192)
    levels = range(1, len(gammas))
    model = train(
        OfGamma(network, gammas),
        process_of(gammas),
        draw,
        steps,
        batch=BATCH,
        levels=levels,
        seed=seed,
    )
    return model.network


@torch.no_grad()
def losses(network: nn.Module, gammas: np.ndarray, draw, count: int) -> Tensor:
    """The loss of ``count`` images, each at its own t > 0: (count,) bits/dim."""
    generator = torch.Generator().manual_seed(6)
    x_start = draw(count, generator)
    t = torch.randint(1, len(gammas), (count,), generator=generator)
    noise = torch.randn(x_start.shape, generator=generator)
    model = OfGamma(network, gammas)
    return process_of(gammas).training_losses(model, x_start, t, noise=noise)["loss"]


@torch.no_grad()
def moments(network: nn.Module, draw, gammas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[loss / gamma'] and E[(loss / gamma')²] at each of ``gammas``."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for gamma in gammas:
        x_start = draw(2000, generator)
        noise = torch.randn(x_start.shape, generator=generator)
        loss = continuous_loss(network, x_start, torch.full((2000,), float(gamma)), 1.0, noise)
        found.append((loss.mean().item(), loss.square().mean().item()))
    return tuple(np.array(found).T)


def score(network: nn.Module, process: GaussianDiffusion, held_out: Tensor) -> float:
    """The bound's terms of t > 0, which the network was trained by."""
    gammas = np.log(process.noise_scale**2 / process.signal_scale**2)
    generator = torch.Generator().manual_seed(8)
    bound = process.calc_bpd_loop(OfGamma(network, gammas), held_out, generator=generator)
    return summarize_bpd(bound).rate


# -- output ---------------------------------------------------------------------------------------


def plot(out, t, schedules, grid, squares, deviations, noises) -> None:
    fig, [[left, middle, right]] = figure(3, width=4.8)
    for (name, gammas), colour in zip(schedules.items(), COLOURS, strict=False):
        left.plot(t, gammas, "--" if name == "best" else "-", color=colour, label=name)
        slope = np.gradient(gammas, t)
        deviation = slope * np.sqrt(np.interp(gammas, grid, squares))
        middle.plot(t, deviation, "--" if name == "best" else "-", color=colour, label=name)
    left.set(xlabel="t", ylabel="gamma = -log SNR", title="The schedules, between fixed ends")
    middle.set(yscale="log", xlabel="t", ylabel="bits/dim", title="The loss at t, root mean square")
    for ax in (left, middle):
        ax.legend(fontsize=8)
    places = np.arange(len(schedules))
    variances = {name: deviation**2 for name, deviation in deviations.items()}
    for k, (label, of) in enumerate({"of the loss": variances, "of the gradient": noises}.items()):
        heights = [of[name] / of["learned"] for name in schedules]
        right.bar(places + 0.4 * k - 0.2, heights, 0.36, color=COLOURS[k], label=label)
    right.set_xticks(places, list(schedules), fontsize=8)
    right.axhline(1, color="0.5", lw=1)
    right.set(yscale="log", title="Variances, over the learned schedule's")
    right.legend(fontsize=8)
    save_plot(fig, out)


if __name__ == "__main__":
    main()
