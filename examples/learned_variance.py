"""Fixed against learned variance of the reverse steps, at few and at many steps.

Question: Nichol & Dhariwal 2021 (arXiv:2102.09672, section 3.1) let the network choose each reverse
variance between beta (fixed_large) and the posterior's (fixed_small) and report a better likelihood
and better samples at few steps. One network is trained with the hybrid loss on 1,437 of
scikit-learn's digits (a residual MLP, eps-prediction, cosine schedule, one seed); its mean is then
used with its own variance and with both fixed ones, in strided chains. Trained twice: with T = 100
and with T = 1000.

Look at: the bits/dim at T = 100, where the learned variance comes out best; and at T = 1000, where
it does not.

Result at 5 / 10 / 25 / 50 / 100 steps, bits/dim of 360 held-out digits:
T = 100: fixed_small 52 / 21 / 8.6 / 6.2 / 5.4, fixed_large 6.6 / 6.0 / 5.5 / 5.2 / 5.1, learned 7.9
/ 6.9 / 5.0 / 4.8 / 4.8: best from 25 steps on. With 5 and 10 steps fixed_large is better.
T = 1000: fixed_small 722 / 261 / 63 / 24 / 12, fixed_large 7.5 / 6.9 / 6.3 / 6.0 / 5.7, learned
12 / 42 / 11 / 6.9 / 5.7: no gain over fixed_large at any of these counts, which is not what one
would hope from the paper (T = 4000, a far larger network and longer training). Between neighbouring
steps of 1000 the range from the posterior's variance to beta is narrow, so training hardly fixes
the output v that interpolates in it, and v is not bounded; striding widens the range, and a v that
was harmless becomes a far too small variance for some pixels. Few images cause it, as the standard
errors show. Clamping v to [-1, 1] takes most of the harm away (in a run with another seed 132 fell
to 16 bits/dim at 10 steps, 6.6 to 6.0 at 50), but does not turn it into a gain.
Samples (Fréchet distance, T = 100; two halves of the real digits 7.7): fixed_small 167 / 77 / 43 /
53 / 48, learned 186 / 86 / 50 / 58 / 51, fixed_large 381 / 165 / 70 / 67 / 54: likelihood and
sample quality do not agree. fixed_large's noise shows in the pictures at few steps, fixed_small
samples best and has by far the worst bound, and the learned variance is near the better one in
both.
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
    train,
)

from fastdiff import Sampler, create_diffusion
from fastdiff.process.likelihood import summarize_bpd

VARIANCES = ("fixed_small", "fixed_large", "learned_range")
STEPS = (5, 10, 25, 50, 100)
LENGTHS = (100, 1000)  # steps of the process the network is trained with


def main() -> None:
    args = parse_arguments(__doc__, "learned_variance")
    images, held_out = load_digits()
    steps_list = STEPS[:2] if args.quick else STEPS
    judge = FrechetJudge(quick=args.quick)
    draw = draw_from(images)
    bounds, distances, samples = {}, {}, {}
    for length in LENGTHS:
        processes = {
            name: create_diffusion(
                steps=length, noise_schedule="cosine", var_type=name, loss_type="rescaled_mse"
            )
            for name in VARIANCES
        }
        network = train(
            TinyMLP((1, 8, 8), t_max=length, width=256, out_factor=2),
            processes["learned_range"],
            draw,
            20 if args.quick else 3000,
            batch=128,
        )
        # The fixed variances are tried on the same network: its mean, the rest cut off.
        models = dict.fromkeys(VARIANCES, lambda x, t, network=network: network(x, t)[:, :1])
        models["learned_range"] = network
        for name, process in processes.items():
            for steps in steps_list:
                bounds[length, name, steps] = summarize_bpd(
                    process.respace(steps).calc_bpd_loop(
                        models[name], held_out, generator=torch.Generator().manual_seed(1)
                    )
                )
                if length == LENGTHS[0]:
                    sampler = Sampler(models[name], process, steps=steps)
                    samples[name, steps] = sampler.sample((judge.count, 1, 8, 8), seed=2)
                    distances[name, steps] = judge(samples[name, steps])

    for length in LENGTHS:
        print_table(
            f"Trained with T = {length}: bound on the NLL of {len(held_out)} held-out digits, "
            "bits/dim ± standard error",
            ["steps", *[column for name in VARIANCES for column in (name, "±")]],
            [
                [
                    str(steps),
                    *[
                        value
                        for name in VARIANCES
                        for value in (
                            bounds[length, name, steps].total,
                            bounds[length, name, steps].total_stderr,
                        )
                    ],
                ]
                for steps in steps_list
            ],
        )
    print_table(
        f"Trained with T = {LENGTHS[0]}: Fréchet distance of {judge.count} DDPM samples to as many "
        f"real digits\n(two halves of the real ones: {judge.halves:.3g})",
        ["steps", *VARIANCES],
        [[str(s), *[distances[name, s] for name in VARIANCES]] for s in steps_list],
    )
    plot(args.out, steps_list, bounds, distances, samples, judge.halves)


def plot(out, steps_list, bounds, distances, samples, halves: float) -> None:
    fig, [likelihoods, [right, pictures]] = figure(2, rows=2, width=5.2)
    for ax, length in zip(likelihoods, LENGTHS, strict=True):
        for name, colour in zip(VARIANCES, COLOURS, strict=False):
            values = [bounds[length, name, steps].total for steps in steps_list]
            ax.plot(steps_list, values, "o-", color=colour, label=name)
        ax.set(yscale="log", ylabel="bits/dim", ylim=(4, 1000))
        ax.set_title(f"NLL of held-out digits, T = {length}")
    for name, colour in zip(VARIANCES, COLOURS, strict=False):
        values = [distances[name, steps] for steps in steps_list]
        right.plot(steps_list, values, "o-", color=colour, label=name)
    right.axhline(halves, color="0.5", lw=1, label="two halves of the real digits")
    right.set(yscale="log", ylabel="Fréchet distance")
    right.set_title(f"Samples against real digits, T = {LENGTHS[0]}")
    for ax in [*likelihoods, right]:
        ax.set_xlabel("steps")
        show_steps(ax, steps_list)
        ax.legend(fontsize=8)
    shown = [(name, samples[name, steps_list[1]]) for name in VARIANCES]
    show_images(pictures, shown, columns=12, lines=3)
    pictures.set_title(f"Samples at {steps_list[1]} steps, T = {LENGTHS[0]}")
    save_plot(fig, out)


if __name__ == "__main__":
    main()
