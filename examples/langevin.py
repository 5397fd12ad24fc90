"""Annealed Langevin sampling beside DDPM's, by the score of one network.

Question: Song & Ermon 2019 (arXiv:1907.05600) walk along the score, at one noise level after
another: x ← x + alpha/2·score + √alpha·z with alpha = r·sigma². Ho et al. 2020 (arXiv:2006.11239)
take one ancestral step per level. A network that predicts eps gives either, as the score is
-eps/sigma (``process.score``). What does the walk cost in calls of it? The data: a ring of eight
Gaussians, four of them light (a fifth of the mass in all), since a walk at one level cannot know
the modes' weights: that is why it is annealed. Levels from 10 to 0.01, ten of them, as published,
or one for every call; r = 0.2, as published, or 1; by a network's score and by the exact one.

Look at: the middle and right panels. A walk forgets its start at a rate of r per call: whether
there are ten levels or one per call matters little, r times the number of calls matters. DDPM's
step, which is made for the way from this level to the next, is there at once.

Result, sliced Wasserstein-1 at 10 / 100 / 1000 calls by the exact score: DDPM 0.023 / 0.009 /
0.009; ten levels 4.0 / 0.056 / 0.014 with r = 0.2, 0.23 / 0.019 / 0.012 with r = 1; a level per
call and r = 1 0.23 / 0.012 / 0.009 (two real sets 0.010). The walks need three to thirty times the
calls. Of DDPM's samples 0.25 / 0.20 / 0.21 are in the light modes (true: 0.2), of the published
walk's 0.50 / 0.32 / 0.24; at the least level alone the share stays what the start gave, 0.47, after
any number of calls. By the network's score the walks are best at 100 to 300 calls and worse at 1000
(r = 1: 0.032 and 0.035), while DDPM has 0.010 there: at sigma = 0.01 the score's squared error is
4 % of its square, and the longer a walk stays the more it settles on the network's density.
"""

import torch
from _common import (
    COLOURS,
    GaussianMixture,
    TinyMLP,
    exact_network,
    figure,
    parse_arguments,
    print_table,
    ring_of_gaussians,
    save_plot,
    show_steps,
    sliced_wasserstein,
    train,
)
from torch import Tensor

from fastdiff import Sampler, VarianceExploding
from fastdiff.process.variance_exploding import geometric_sigmas

MEANS = ring_of_gaussians().means
MIXTURE = GaussianMixture(MEANS.tolist(), 0.06, weights=[4.0, 1.0] * 4)
LIGHT = 0.2  # the share of the four light modes
CALLS = (10, 30, 100, 300, 1000)
DDPM, UNANNEALED = "DDPM", "one level, r = 1"
# By name: the noise levels (None: one for every call) and the step size r.
ANNEALED = {
    "10 levels, r = 0.2": (10, 0.2),
    "10 levels, r = 1": (10, 1.0),
    "a level per call, r = 0.2": (None, 0.2),
    "a level per call, r = 1": (None, 1.0),
}
METHODS = (DDPM, *ANNEALED, UNANNEALED)
SHOWN_LEVELS = (0, 200, 400, 600, 800, 999)


def main() -> None:
    args = parse_arguments(__doc__, "langevin")
    process = VarianceExploding(geometric_sigmas(1000, sigma_min=0.01, sigma_max=10.0))
    network = train(TinyMLP((2,), t_max=1000), process, MIXTURE.sample, 40 if args.quick else 6000)
    print_table(
        "The network's score against the exact one at 4,000 x_t",
        ["sigma", "exact, mean square", "error, mean square", "ratio"],
        [[f"{process.sigmas[t]:.3g}", *score_error(process, network, t)] for t in SHOWN_LEVELS],
    )

    count, calls_list = (300, CALLS[:2]) if args.quick else (3000, CALLS)
    generator = torch.Generator().manual_seed(1)
    real, second = MIXTURE.sample(count, generator), MIXTURE.sample(count, generator)
    models = {"network": network, "exact": exact_network(MIXTURE, process)}
    samples = {
        (kind, name, calls): draw(model, process, name, count, calls)
        for kind, model in models.items()
        for calls in calls_list
        for name in METHODS
    }
    distances = {key: sliced_wasserstein(points, real) for key, points in samples.items()}
    shares = {key: light_share(points) for key, points in samples.items()}
    for kind, whose in (("network", "the network's score"), ("exact", "the exact score")):
        for what, values in (
            ("sliced Wasserstein-1", distances),
            (f"share of samples in the four light modes (true: {LIGHT})", shares),
        ):
            print_table(
                f"By {whose}: {what}",
                ["calls", *METHODS],
                [[str(n), *[values[kind, name, n] for name in METHODS]] for n in calls_list],
            )
    floor = sliced_wasserstein(second, real)
    print(f"\ntwo real sets: distance {floor:.2g}, share {light_share(second):.3f}")
    plot(args.out, process, network, calls_list, samples, distances, shares, floor)


def draw(model, process, name: str, count: int, calls: int) -> Tensor:
    """(count, 2) samples for so many calls of the network."""
    if name == DDPM:
        sampler = Sampler(model, process, steps=calls, clip_denoised=False)
        return sampler.sample((count, 2), seed=2)
    if name == UNANNEALED:  # from a start that covers the data, as none other gets there
        return langevin(model, process.respace(timesteps=[0]), count, calls, 1.0, start_std=0.7)
    levels, r = ANNEALED[name]
    strided = process.respace(levels or calls)
    per_level = calls // strided.num_timesteps
    return langevin(model, strided, count, per_level, r, start_std=process.prior_std)


@torch.no_grad()
def langevin(model, process, count: int, per_level: int, r: float, *, start_std: float) -> Tensor:
    """Song & Ermon 2019, algorithm 1: at each level, noisiest first, ``per_level`` steps
    x ← x + alpha/2·score + √alpha·z with alpha = r·sigma²."""
    generator = torch.Generator().manual_seed(2)
    x = start_std * torch.randn(count, 2, generator=generator)
    for t in reversed(range(process.num_timesteps)):
        alpha = r * process.sigmas[t] ** 2
        for _ in range(per_level):
            score = process.score(model, x, torch.full((count,), t))
            x = x + alpha / 2 * score + alpha**0.5 * torch.randn(x.shape, generator=generator)
    return x


def score_error(process, network, t: int) -> list[float]:
    """Mean square of the exact score, of the network's error, and the ratio."""
    generator = torch.Generator().manual_seed(3)
    x_start = MIXTURE.sample(4000, generator)
    x_t = process.q_sample(
        x_start, torch.full((4000,), t), torch.randn(x_start.shape, generator=generator)
    ).requires_grad_()
    density = MIXTURE.log_density(x_t, noise=process.sigmas[t])
    exact = torch.autograd.grad(density.sum(), x_t)[0]
    with torch.no_grad():
        error = process.score(network, x_t, torch.full((4000,), t)) - exact
    squares = exact.square().mean().item(), error.square().mean().item()
    return [*squares, squares[1] / squares[0]]


def light_share(points: Tensor) -> float:
    """The share of points whose nearest mode is one of the light ones."""
    return (torch.cdist(points.double(), MEANS).argmin(1) % 2).double().mean().item()


def plot(out, process, network, calls_list, samples, distances, shares, floor: float) -> None:
    fig, [[field, left, right], clouds] = figure(3, rows=2, height=4.2)
    show_field(field, process, network, t=500)
    for name, colour in zip(METHODS, ("k", *COLOURS), strict=False):
        for kind, style in (("network", "o-"), ("exact", ":")):
            for ax, values in ((left, distances), (right, shares)):
                line = [values[kind, name, calls] for calls in calls_list]
                label = name if kind == "network" else None
                ax.plot(calls_list, line, style, ms=4, color=colour, label=label)
    left.axhline(floor, color="0.5", lw=1)
    left.set(yscale="log", ylabel="sliced Wasserstein-1", title="Distance (dotted: exact score)")
    right.axhline(LIGHT, color="0.5", lw=1)
    right.set(ylabel="share", title="Samples in the four light modes", ylim=(0.15, 0.55))
    for ax in (left, right):
        ax.set_xlabel("calls of the network")
        show_steps(ax, calls_list)
    left.legend(fontsize=8, loc="upper right")
    calls = calls_list[-3:][0]
    for ax, name in zip(clouds, (DDPM, "10 levels, r = 0.2", UNANNEALED), strict=True):
        ax.scatter(*samples["network", name, calls][:1500].T, s=3, color=COLOURS[0], lw=0)
        ax.set(title=f"{name}, {calls} calls", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
        ax.set(xlabel="x1", ylabel="x2")
    save_plot(fig, out)


def show_field(ax, process, network, t: int) -> None:
    """Arrows along the network's score over the density of x_t."""
    axis = torch.linspace(-1.2, 1.2, 100)
    grid = torch.cartesian_prod(axis, axis)
    density = MIXTURE.log_density(grid, noise=process.sigmas[t]).exp().view(100, 100)
    ax.imshow(density.T, origin="lower", extent=(-1.2, 1.2) * 2, cmap="Blues", vmax=density.max())
    axis = torch.linspace(-1.1, 1.1, 15)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        score = process.score(network, points, torch.full((len(points),), t))
    ax.quiver(*points.T, *score.T, color=COLOURS[1], width=0.004)
    ax.set(title=f"The network's score at sigma = {process.sigmas[t]:.2g}", xlabel="x1")
    ax.set(ylabel="x2")


if __name__ == "__main__":
    main()
