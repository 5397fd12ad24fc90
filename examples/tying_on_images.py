"""One network for all noise levels, a few, or one each: on images.

Question: `parameter_tying.py`, where the data are points of the plane, found that a few networks,
each for a range of noise levels, cost little and that one per level wastes the budget. Does that
hold for images, where the levels have more in common (strokes, shapes)? 1, 4 or 24 networks of one
architecture divide 24 noise levels among themselves and one budget of training steps, on 1,437 of
scikit-learn's digits; 360 are held out.

Look at: the two upper panels. With little training the shared network is ahead everywhere but at
the highest levels, where there is nothing to learn; with more, four networks catch up at both ends,
and stay behind at the levels between, where strokes form.

Result at 480 / 1,920 / 7,680 steps in all, Fréchet distance of the samples (two halves of the real
digits 7.7): one network 281 / 88 / 32, four 685 / 207 / 50, 24 1,860 / 908 / 288 (with 24 times the
parameters). The squared error of v on held-out digits tells it only in part: at 7,680 steps that of
four networks is as good as that of one in every third of the levels (0.428, 0.231, 0.282 against
0.431, 0.230, 0.284), and yet their samples are worse. By then the shared network has begun to
overfit (its error is 0.035 above that on training digits; of four 0.016, of 24 0.003: each of those
has had fewer steps). So on images sharing wins more clearly than in the plane, and a few experts do
not pay at these budgets.
"""

import torch
from _common import (
    COLOURS,
    FrechetJudge,
    TinyMLP,
    draw_from,
    figure,
    load_digits,
    parse_arguments,
    print_table,
    save_plot,
    show_images,
    show_steps,
    train_untied,
)
from torch import Tensor, nn

from fastdiff import Sampler, create_diffusion

LEVELS = 24
GROUPS = {1: "one shared network", 4: "4 networks", LEVELS: "a network per level"}
BUDGETS = (480, 1920, 7680)  # training steps, of all the networks together


def main() -> None:
    args = parse_arguments(__doc__, "tying_on_images")
    images, held_out = load_digits()
    judge = FrechetJudge(quick=args.quick)
    budgets = BUDGETS[:1] if args.quick else BUDGETS
    diffusion = create_diffusion(
        steps=LEVELS, noise_schedule="cosine", mean_type="v", var_type="fixed_small"
    )
    draw = draw_from(images)
    seen, unseen, distances, samples, rows = {}, {}, {}, {}, []
    for budget in budgets:
        for groups in GROUPS:
            network = train_untied(
                lambda: TinyMLP((1, 8, 8), t_max=LEVELS, width=128),
                diffusion,
                draw,
                groups,
                budget // 50 if args.quick else budget,
                batch=64,
            )
            key = groups, budget
            seen[key] = errors(diffusion, network, images[: len(held_out)])
            unseen[key] = errors(diffusion, network, held_out)
            samples[key] = Sampler(network, diffusion).sample((judge.count, 1, 8, 8), seed=2)
            distances[key] = judge(samples[key])
            parameters = sum(p.numel() for p in network.parameters())
            thirds = [unseen[key][k : k + 8].mean().item() for k in range(0, LEVELS, 8)]
            gap = (unseen[key] - seen[key]).mean().item()
            rows.append([str(budget), groups, parameters, *thirds, gap, distances[key]])
    print_table(
        f"Squared error of the predicted v for {len(held_out)} held-out digits, by third of the "
        "noise levels,\nby how much it is above that for training digits (all levels), and Fréchet "
        f"distance of {judge.count}\nsamples to real digits (two halves of the real ones: "
        f"{judge.halves:.3g})",
        ["steps in all", "networks", "parameters", "low", "middle", "high noise", "gap", "Fréchet"],
        rows,
    )
    plot(args.out, budgets, unseen, distances, samples, judge.halves)


@torch.no_grad()
def errors(diffusion, network: nn.Module, images: Tensor) -> Tensor:
    """(LEVELS,): mean squared error of v, four draws of noise for every image."""
    generator = torch.Generator().manual_seed(3)
    images = images.repeat(4, 1, 1, 1)
    found = []
    for level in range(LEVELS):
        noise = torch.randn(images.shape, generator=generator)
        t = torch.full((len(images),), level)
        found.append(diffusion.training_losses(network, images, t, noise=noise)["mse"].mean())
    return torch.stack(found)


def plot(out, budgets, unseen, distances, samples, halves: float) -> None:
    fig, [[small, large], [right, pictures]] = figure(2, rows=2, width=5.2)
    for (groups, name), colour in zip(GROUPS.items(), COLOURS, strict=False):
        for ax, budget in ((small, budgets[0]), (large, budgets[-1])):
            # Over the best at that level: what is left is the network's and its training's.
            least = torch.stack([unseen[g, b] for g in GROUPS for b in budgets]).min(0).values
            ax.plot(unseen[groups, budget] / least, "o-", ms=3, color=colour, label=name)
            ax.set(xlabel="noise level", ylabel="error of v over the least of all")
            ax.set(title=f"{budget} training steps in all", yscale="log")
        values = [distances[groups, budget] for budget in budgets]
        right.plot(budgets, values, "o-", color=colour, label=name)
    right.axhline(halves, color="0.5", lw=1, label="two halves of the real digits")
    right.set(yscale="log", xlabel="training steps in all", ylabel="Fréchet distance")
    right.set(title="Samples against real digits")
    show_steps(right, budgets)
    for ax, place in ((small, "upper right"), (large, "upper right"), (right, "lower left")):
        ax.legend(fontsize=8, loc=place)
    right.set_ylim(halves / 4, None)
    shown = [(f"networks: {groups}", samples[groups, budgets[-1]]) for groups in GROUPS]
    show_images(pictures, shown, columns=12, lines=3)
    pictures.set_title(f"Samples, {budgets[-1]} training steps in all")
    save_plot(fig, out)


if __name__ == "__main__":
    main()
