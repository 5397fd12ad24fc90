"""DDIM against DDPM with fixed and learned variance, by the number of steps: where do they cross?

Question: DDIM (Song et al. 2020, arXiv:2010.02502) is said to be ahead at few steps and DDPM at
many. Nichol & Dhariwal 2021 (arXiv:2102.09672, section 4 and figure 8) have DDPM with a learned
variance ahead from some 50 steps on, with a fixed one later. One network is trained with the hybrid
loss on 1,437 of scikit-learn's digits (a residual MLP, eps-prediction, cosine schedule, T = 1000,
6,000 steps, one seed) and sampled four ways: by DDIM, and by DDPM with its own variance, with the
posterior's (fixed_small) and with beta (fixed_large).

Look at: where the lines cross DDIM's. It starts low and stays where it is from 35 steps on; all of
DDPM's go on below it and end together, as their variances do when the steps are short.

Result, Fréchet distance at 5 / 10 / 20 / 50 / 1000 steps (two halves of the real digits 7.7): DDIM
186 / 63 / 44 / 37 / 37, learned 268 / 60 / 33 / 29 / 25, fixed_large 398 / 133 / 59 / 37 / 25,
fixed_small 138 / 47 / 29 / 26 / 25. The learned variance meets DDIM at 9 steps, fixed_large at 51:
in the paper's order, and earlier, as the images are simpler. fixed_small never does: it is ahead of
all from 5 steps on, though its bound is the worst (learned_variance.py). Nor does DDIM reach what
DDPM does with many steps: without fresh noise nothing corrects the errors of so small a network.
"""

import math
from statistics import mean, stdev

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
    train,
)

from fastdiff import Sampler, create_diffusion

LENGTH = 1000
STEPS = (5, 10, 20, 35, 50, 100, 250, 1000)
SEEDS = (2, 3, 4)  # of the sampler, from 250 steps on only the first
# name: (reverse variance, method)
WAYS = {
    "DDIM": ("fixed_small", "ddim"),
    "DDPM, learned": ("learned_range", "ddpm"),
    "DDPM, fixed_small": ("fixed_small", "ddpm"),
    "DDPM, fixed_large": ("fixed_large", "ddpm"),
}


def main() -> None:
    args = parse_arguments(__doc__, "ddim_vs_ddpm")
    images, _ = load_digits()
    steps_list = STEPS[:2] if args.quick else STEPS
    judge = FrechetJudge(quick=args.quick)
    draw = draw_from(images)
    processes = {
        name: create_diffusion(
            steps=LENGTH, noise_schedule="cosine", var_type=var_type, loss_type="rescaled_mse"
        )
        for name, (var_type, _) in WAYS.items()
    }
    network = train(
        TinyMLP((1, 8, 8), t_max=LENGTH, width=256, out_factor=2),
        processes["DDPM, learned"],
        draw,
        20 if args.quick else 6000,
        batch=128,
    )
    # One network for all: where the variance is fixed, what it says of it is cut off.
    models = dict.fromkeys(WAYS, lambda x, t: network(x, t)[:, :1])
    models["DDPM, learned"] = network

    distances, samples = {}, {}
    for name, (_, method) in WAYS.items():
        for steps in steps_list:
            sampler = Sampler(models[name], processes[name], steps=steps, method=method)
            seeds = SEEDS[:1] if steps > 100 else SEEDS
            drawn = [sampler.sample((judge.count, 1, 8, 8), seed=seed) for seed in seeds]
            samples[name, steps] = drawn[0]
            distances[name, steps] = [judge(one) for one in drawn]

    averages = {key: mean(values) for key, values in distances.items()}
    print_table(
        f"Fréchet distance of {judge.count} samples to as many real digits (two halves of the real "
        f"ones: {judge.halves:.3g})",
        ["steps", *WAYS],
        [[str(s), *[averages[name, s] for name in WAYS]] for s in steps_list],
    )
    scatter = max(stdev(values) for values in distances.values() if len(values) > 1)
    print(
        f"\nMeans over {len(SEEDS)} seeds up to 100 steps; at most {scatter:.2g} from one to next"
    )
    print_table(
        "DDPM's distance over DDIM's",
        ["steps", *list(WAYS)[1:]],
        [
            [str(s), *[averages[name, s] / averages["DDIM", s] for name in list(WAYS)[1:]]]
            for s in steps_list
        ],
    )
    print()
    for name in list(WAYS)[1:]:
        ratios = [averages[name, s] / averages["DDIM", s] for s in steps_list]
        where = [f"{steps:.0f}" for steps in crossings(steps_list, ratios)]
        print(f"{name} meets DDIM at {' and '.join(where) or 'no'} steps")
    plot(args.out, steps_list, averages, samples, judge.halves)


def crossings(steps: tuple[int, ...], ratios: list[float]) -> list[float]:
    """The numbers of steps at which the ratio is 1, between two of ``steps`` by straight lines in
    the logarithms of both."""
    found = []
    for i in range(len(steps) - 1):
        here, there = math.log(ratios[i]), math.log(ratios[i + 1])
        if here * there < 0:
            share = here / (here - there)
            found.append(
                math.exp((1 - share) * math.log(steps[i]) + share * math.log(steps[i + 1]))
            )
    return found


def plot(out, steps_list, averages, samples, halves: float) -> None:
    fig, [[left, right]] = figure(2, width=5.6, height=4.6)
    for name, colour in zip(WAYS, COLOURS, strict=False):
        values = [averages[name, steps] for steps in steps_list]
        left.plot(steps_list, values, "o-", color=colour, label=name)
    left.axhline(halves, color="0.5", lw=1, label="two halves of the real digits")
    left.set(yscale="log", xlabel="steps", ylabel="Fréchet distance")
    left.set_title(f"Samples against real digits, T = {LENGTH}")
    show_steps(left, steps_list)
    left.legend(fontsize=8)
    few = steps_list[1]
    shown = [(name.removeprefix("DDPM, "), samples[name, few]) for name in WAYS]
    show_images(right, shown, columns=16, lines=3)
    right.tick_params(axis="y", labelsize=8)
    right.set_title(f"Samples at {few} steps")
    save_plot(fig, out)


if __name__ == "__main__":
    main()
