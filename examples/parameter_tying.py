"""One network for all noise levels, or one network each.

Question: Ho et al. 2020 (arXiv:2006.11239) share all parameters between the noise levels and tell
the network which one it is at; Sohl-Dickstein et al. 2015 (arXiv:1503.03585) shared most of them;
eDiff-I (Balaji et al. 2022, arXiv:2211.01324) trains a few experts, each for a range of levels.
Here 1, 4 or 24 networks of one architecture divide 24 noise levels of a ring of eight Gaussians
among themselves, and divide one budget of training steps too: with 24 networks there are 24 times
the parameters and each is trained for a 24th of the time. E[v | x_t] is known, so the excess error
is the network's own.

Look at: the middle panel. Neighbouring levels need nearly the same function, so what one level
learns helps the next: sharing wins where the function is hard (low noise) and training is short.
Where it is simple (high noise) a network of its own is soon better, as it need not compromise.

Result at 7,680 steps in all, for 1 / 4 / 24 networks (39k, 155k, 929k parameters): excess error at
the low third of the noise levels 0.0032 / 0.0051 / 0.079, at the high third 2.1e-4 / 4.3e-5 /
5.1e-5; sliced Wasserstein-1 of the samples 0.018 / 0.015 / 0.042, with the exact v 0.015, two real
sets 0.010 (± 0.0025 from draw to draw). At 1,920 steps: 0.034 / 0.039 / 0.131. A network per level
wastes such budgets; a few experts cost little, and win the high noise levels without losing much at
the low ones.
"""

import torch
from _common import (
    COLOURS,
    TinyMLP,
    exact_network,
    figure,
    parse_arguments,
    print_table,
    ring_of_gaussians,
    save_plot,
    show_steps,
    sliced_wasserstein,
    train_untied,
)
from torch import Tensor, nn

from fastdiff import Sampler, create_diffusion
from fastdiff.methods.protocol import noise_levels

MIXTURE = ring_of_gaussians()
LEVELS = 24
GROUPS = (1, 4, 24)  # how many networks share the noise levels out among themselves
BUDGETS = (480, 1920, 7680)  # training steps, of all the networks together


def main() -> None:
    args = parse_arguments(__doc__, "parameter_tying")
    diffusion = create_diffusion(
        steps=LEVELS, noise_schedule="cosine", mean_type="v", var_type="fixed_small"
    )
    count = 300 if args.quick else 5000
    generator = torch.Generator().manual_seed(1)
    real, second = MIXTURE.sample(count, generator), MIXTURE.sample(count, generator)

    def distance(network) -> float:
        sampler = Sampler(network, diffusion, clip_denoised=False)
        return sliced_wasserstein(sampler.sample((count, 2), seed=2), real)

    errors, distances, rows = {}, {}, []
    for budget in BUDGETS:
        for groups in GROUPS:
            network = train_untied(
                lambda: TinyMLP((2,), t_max=LEVELS, width=64),
                diffusion,
                MIXTURE.sample,
                groups,
                budget // 50 if args.quick else budget,
                batch=128,
            )
            error = excess_error(diffusion, network)
            errors[groups, budget], distances[groups, budget] = error, distance(network)
            parameters = sum(p.numel() for p in network.parameters())
            thirds = [error[k : k + LEVELS // 3].mean().item() for k in range(0, LEVELS, 8)]
            rows.append([str(budget), groups, parameters, *thirds, distances[groups, budget]])
    print_table(
        "Excess squared error of the predicted v, by third of the noise levels, and\n"
        f"sliced Wasserstein-1 distance of {count} samples to real ones",
        ["steps in all", "networks", "parameters", "low", "middle", "high noise", "distance"],
        rows,
    )
    exact, floor = distance(exact_network(MIXTURE, diffusion)), sliced_wasserstein(second, real)
    print_table(
        "The same distance without any training",
        ["samples", "distance"],
        [["exact v, same sampler", exact], ["a second set of real samples", floor]],
    )
    plot(args.out, errors, distances, exact, floor)


@torch.no_grad()
def excess_error(diffusion, network: nn.Module) -> Tensor:
    """(LEVELS,): the loss at each level above the least possible one, that of E[v | x_t]."""
    signal, noise = noise_levels(diffusion)
    exact = exact_network(MIXTURE, diffusion)
    generator = torch.Generator().manual_seed(3)
    errors = []
    for level in range(LEVELS):
        x_start = MIXTURE.sample(4000, generator)
        eps = torch.randn(x_start.shape, generator=generator)
        x_t = (signal[level] * x_start + noise[level] * eps).float()
        t = torch.full((len(x_t),), level)
        errors.append((network(x_t, t) - exact(x_t, t)).square().mean())
    return torch.stack(errors)


def plot(out, errors, distances, exact: float, floor: float) -> None:
    fig, [[small, large, right]] = figure(3)
    names = {1: "one shared network", LEVELS: "a network per level"}
    for groups, colour in zip(GROUPS, COLOURS, strict=False):
        name = names.get(groups, f"{groups} networks")
        for ax, budget in ((small, BUDGETS[0]), (large, BUDGETS[-1])):
            ax.plot(errors[groups, budget], "o-", ms=3, color=colour, label=name)
        values = [distances[groups, budget] for budget in BUDGETS]
        right.plot(BUDGETS, values, "o-", color=colour, label=name)
    limits = torch.stack(list(errors.values()))
    for ax, budget in ((small, BUDGETS[0]), (large, BUDGETS[-1])):
        ax.set(xlabel="noise level", ylabel="excess error of v", yscale="log")
        ax.set(title=f"{budget} training steps in all")
        ax.set(ylim=(limits.min().item() / 1.5, limits.max().item() * 1.5))
        ax.legend(fontsize=8)
    right.axhline(exact, color="k", ls="--", label="exact v, same sampler")
    right.axhline(floor, color="0.5", lw=1, label="two real sets")
    right.set(yscale="log", xlabel="training steps in all")
    right.set(
        ylabel="sliced Wasserstein-1",
        title="Distance of the samples to real ones",
        ylim=(floor / 5, None),
    )
    show_steps(right, BUDGETS)
    right.legend(fontsize=8, loc="lower left")
    save_plot(fig, out)


if __name__ == "__main__":
    main()
