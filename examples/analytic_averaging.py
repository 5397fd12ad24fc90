"""The bound's terms in closed form, or by drawing x_{t-1}.

Question: each term of the bound is an average over x_{t-1} ~ q(x_{t-1} | x_t, x_0). Written with
forward transitions (Sohl-Dickstein et al. 2015, arXiv:1503.03585; Ho et al. 2020, arXiv:2006.11239
eq. 3) it has to be estimated from draws; as a divergence of two Gaussians (eq. 5) it is known:
Rao-Blackwellised, as Ho et al. say. What does that save? Three estimators of one bound:

    closed form   KL(q(x_{t-1} | x_t, x_0) || p)
    drawn         log q(x_{t-1} | x_t, x_0) - log p(x_{t-1} | x_t)
    forward       log q(x_t | x_{t-1}) - log p(x_{t-1} | x_t)

By Bayes' rule the last two differ by a term without the network, so their gradients are the same.
Equal networks (a residual MLP, eps-prediction, posterior variance, cosine schedule, 2,500 steps on
the whole bound, one seed) learn 1,437 of scikit-learn's digits by the closed form, by the average
of 16 draws of x_{t-1} and by a single one.

Look at: the left panel. A draw of x_{t-1} adds a standard deviation of √(2 KL), here where both
variances are equal, and that is far more than a KL that is small: the finer the chain, the smaller
are its terms. The middle one: at the start the draws do not matter, the network's errors are larger
than their noise; later they are nearly all of the gradient's noise.

Result: at t = 500 of 1000 a term is 0.034 nats to an image, ± 0.010 in closed form, ± 0.25 drawn
(predicted 0.26), ± 0.58 forward. After training one draw multiplies the variance of the gradient by
15 (T = 100) and by 62 (T = 1000), 16 draws by 2 and 6; before, by 1. Trained so, 360 held-out
digits cost 5.54 bits/dim with the closed form, 5.57 with 16 draws, 5.80 with one at T = 100; 6.03,
6.24 and 7.27 at T = 1000. The three estimates of the whole bound agree (338, 337 and 335 nats to an
image; by all terms ± 14, ± 27, ± 33 from image to image). One thing is not as expected: with a
single t at random, as in training, the forward form's value is the steadiest (± 1100 against 1560
and 1730). What it adds to each term evens out the large terms of small t. That is of no use to
training, whose gradients do not see it.
"""

import math
from dataclasses import dataclass

import torch
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
from fastdiff.process.likelihood import (
    discretized_gaussian_log_likelihood,
    normal_kl,
    summarize_bpd,
)

LENGTHS = (100, 1000)
WAYS = {"closed form": None, "16 draws": 16, "1 draw": 1}  # draws of x_{t-1} to a term
ESTIMATORS = ("closed form", "drawn", "forward")
BATCH = 128


def main() -> None:
    args = parse_arguments(__doc__, "analytic_averaging")
    images, held_out = load_digits(held_out=60 if args.quick else 360)
    lengths = (20, 40) if args.quick else LENGTHS
    steps, batches = (20, 4) if args.quick else (2500, 150)
    draw = draw_from(images)
    terms, noises, bounds = {}, {}, {}
    for length in lengths:
        process = create_diffusion(
            steps=length, noise_schedule="cosine", sigma_small=True, use_kl=True
        )
        losses = {name: AveragedLoss(process, draws) for name, draws in WAYS.items()}
        networks = {
            name: train(TinyMLP((1, 8, 8), t_max=length, width=192), loss, draw, steps, batch=BATCH)
            for name, loss in losses.items()
        }
        untrained = TinyMLP((1, 8, 8), t_max=length, width=192)
        for moment, network in (("before", untrained), ("after", networks["closed form"])):
            noises[length, moment] = gradient_noise(network, losses, draw, batches)
        for name, network in networks.items():
            generator = torch.Generator().manual_seed(1)
            bounds[length, name] = process.calc_bpd_loop(network, held_out, generator=generator)
        terms[length] = all_terms(process, networks["closed form"], held_out)

    longest = lengths[-1]
    print_one_term(terms[longest], longest)
    print_whole_bound(terms)
    print_table(
        "Noise of the gradient, its variance over the square of its mean (batches of "
        f"{BATCH}),\nof a network before its training and after it",
        ["T, network", *WAYS],
        [
            [f"{length}, {moment}", *[noise[name] for name in WAYS]]
            for (length, moment), noise in noises.items()
        ],
    )
    scores = {key: summarize_bpd(bound) for key, bound in bounds.items()}
    print_table(
        f"Trained by {steps} steps of each, bound on the NLL of {len(held_out)} held-out digits, "
        "bits/dim\n(more: than with the closed form, image by image, and its standard error)",
        ["T, trained by", "total", "more", "± s.e."],
        [
            [f"{length}, {name}", scores[length, name].total, *difference(bounds, length, name)]
            for length, name in bounds
        ],
    )
    plot(args.out, terms[longest], longest, noises, scores)


# -- the estimators -------------------------------------------------------------------------------


def gaussian_log_density(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x; mean, exp(log_variance)), elementwise, without the ½·log 2π that all share."""
    return -0.5 * (log_variance + (x - mean) ** 2 * (-log_variance).exp())


def drawn_variance(
    mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor
) -> Tensor:
    """Var[log N1(x) − log N2(x)] over x ~ N1, elementwise.

    With r = σ1²/σ2² and x = mean1 + σ1·z the difference is a constant + ½(r − 1)z² +
    √r·(mean1 − mean2)/σ2·z. Equal variances leave twice the divergence.
    """
    ratio = (log_variance1 - log_variance2).exp()
    squared = (mean1 - mean2) ** 2 * (-log_variance2).exp()
    return 0.5 * (ratio - 1) ** 2 + ratio * squared


@dataclass
class Step:
    """q(x_{t-1} | x_t, x_0) and p(x_{t-1} | x_t), as means and log-variances, at an x_t of each
    image; t (N,) is 1 or more."""

    process: GaussianDiffusion
    x_start: Tensor
    x_t: Tensor
    t: Tensor
    q_mean: Tensor
    q_log_variance: Tensor
    p_mean: Tensor
    p_log_variance: Tensor

    @classmethod
    def of(cls, process, model, x_start: Tensor, t: Tensor, noise: Tensor) -> "Step":
        x_t = process.q_sample(x_start, t, noise)
        q_mean, _, q_log_variance = process.q_posterior_mean_variance(x_start, x_t, t)
        p = process.p_mean_variance(model, x_t, t, clip_denoised=False)
        return cls(process, x_start, x_t, t, q_mean, q_log_variance, p["mean"], p["log_variance"])

    def closed_form(self) -> Tensor:
        """Nats, like x."""
        return normal_kl(self.q_mean, self.q_log_variance, self.p_mean, self.p_log_variance)

    def drawn(self, noise: Tensor) -> Tensor:
        """Nats, like ``noise`` (..., *x.shape): as many draws as it has."""
        x_prev = self.x_prev(noise)
        q = gaussian_log_density(x_prev, self.q_mean, self.q_log_variance)
        return q - gaussian_log_density(x_prev, self.p_mean, self.p_log_variance)

    def forward(self, noise: Tensor) -> Tensor:
        """As :meth:`drawn`: the same pairs of x_{t-1} and x_t, seen from x_{t-1}."""
        x_prev = self.x_prev(noise)
        shape = (-1, *[1] * (self.x_t.ndim - 1))
        beta = torch.from_numpy(self.process.betas)[self.t].to(x_prev.dtype).view(shape)
        q = gaussian_log_density(self.x_t, (1 - beta).sqrt() * x_prev, beta.log())
        return q - gaussian_log_density(x_prev, self.p_mean, self.p_log_variance)

    def x_prev(self, noise: Tensor) -> Tensor:
        return self.q_mean + (0.5 * self.q_log_variance).exp() * noise

    def decoder(self) -> Tensor:
        """−log p(x_0 | x_1) in nats, like x: what stands in the place of the term of t = 0."""
        return -discretized_gaussian_log_likelihood(
            self.x_start, means=self.p_mean, log_scales=0.5 * self.p_log_variance
        )


class AveragedLoss:
    """The process's bound as a loss, each KL in closed form or averaged over ``draws`` of x_{t-1}.

    A draw costs no call of the network: they are all made at one x_t.
    """

    def __init__(self, process: GaussianDiffusion, draws: int | None) -> None:
        self.process, self.draws = process, draws
        self.num_timesteps = process.num_timesteps
        self.generator = torch.Generator().manual_seed(4)

    def training_losses(self, model, x_start: Tensor, t: Tensor, noise: Tensor) -> dict:
        """{"loss" (N,)}: bits/dim, an estimate of the whole bound as ``"rescaled_kl"`` is."""
        step = Step.of(self.process, model, x_start, t, noise)
        if self.draws is None:
            divergence = step.closed_form()
        else:
            z = torch.randn((self.draws, *x_start.shape), generator=self.generator)
            divergence = step.drawn(z).mean(0)
        first = (t == 0).view(-1, *[1] * (x_start.ndim - 1))
        nats = torch.where(first, step.decoder(), divergence)
        return {"loss": nats.flatten(1).mean(1) * (self.num_timesteps / math.log(2))}


# -- what is measured -----------------------------------------------------------------------------


@torch.no_grad()
def all_terms(process, network, images: Tensor) -> dict[str, Tensor]:
    """{estimator: (T - 1, N)} nats of every image at every t > 0, one x_t and one x_{t-1} each;
    "predicted", the standard deviation that a draw of x_{t-1} should add; "ends" (3, N), of each
    estimator the terms of x_0 and x_T, which make the three means one."""
    generator = torch.Generator().manual_seed(2)
    columns: dict[str, list[Tensor]] = {name: [] for name in (*ESTIMATORS, "predicted")}
    for i in range(1, process.num_timesteps):
        noise, z = torch.randn((2, *images.shape), generator=generator)
        step = Step.of(process, network, images, torch.full((len(images),), i), noise)
        columns["closed form"].append(step.closed_form().flatten(1).sum(1))
        columns["drawn"].append(step.drawn(z).flatten(1).sum(1))
        columns["forward"].append(step.forward(z).flatten(1).sum(1))
        variance = drawn_variance(
            step.q_mean, step.q_log_variance, step.p_mean, step.p_log_variance
        )
        columns["predicted"].append(variance.flatten(1).sum(1).sqrt())
    columns["ends"] = ends(process, network, images, generator)
    return {name: torch.stack(column).double() for name, column in columns.items()}


def ends(process, network, images: Tensor, generator: torch.Generator) -> list[Tensor]:
    """What belongs to the bound beside the terms of t > 0, of each of ESTIMATORS: (N,) nats.

    The decoder, and what x_T costs: against q(x_T | x_0) in closed form or drawn, or, where the
    terms are forward ones, alone. There q(x_1 | x_0) is left over.
    """
    noise, z = torch.randn((2, *images.shape), generator=generator)
    first, last = (torch.full((len(images),), t) for t in (0, process.num_timesteps - 1))
    step = Step.of(process, network, images, first, noise)
    mean, _, log_variance = process.q_mean_variance(images, last)
    x_T, zero = mean + (0.5 * log_variance).exp() * z, torch.zeros(())
    mean_1, _, log_variance_1 = process.q_mean_variance(images, first)
    prior = gaussian_log_density(x_T, zero, zero)
    costs = (
        normal_kl(mean, log_variance, zero, zero),
        gaussian_log_density(x_T, mean, log_variance) - prior,
        gaussian_log_density(step.x_t, mean_1, log_variance_1) - prior,
    )
    return [(step.decoder() + cost).flatten(1).sum(1) for cost in costs]


def gradient_noise(network: nn.Module, losses: dict, draw, batches: int) -> dict[str, float]:
    """{way: the trace of the gradient's covariance over the square of its mean}; t > 0.

    The mean is that of the closed form, whatever the way: it is the same, and known best there.
    """
    found = {
        name: batch_gradients(
            network, loss, draw, batches, batch=BATCH, levels=range(1, loss.num_timesteps)
        )
        for name, loss in losses.items()
    }
    trace = {name: gradients.var(0).sum().item() for name, gradients in found.items()}
    # The square of a mean of so many has that share of the variance in it.
    squared = found["closed form"].mean(0).square().sum().item() - trace["closed form"] / batches
    return {name: trace[name] / squared for name in losses}


def difference(bounds, length: int, name: str) -> tuple[float, float]:
    """How much worse than with the closed form, and its standard error; bits/dim."""
    more = bounds[length, name]["total_bpd"] - bounds[length, "closed form"]["total_bpd"]
    return more.mean().item(), (more.std() / len(more) ** 0.5).item()


# -- output ---------------------------------------------------------------------------------------


def print_one_term(terms: dict[str, Tensor], length: int) -> None:
    shares = (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1)
    shown = list(dict.fromkeys(max(1, round(share * (length - 1))) for share in shares))
    noise = terms["drawn"] - terms["closed form"]
    print_table(
        f"One term (T = {length}), nats to an image; standard deviations over images and draws.\n"
        "By the draw alone: measured, and the root of twice the KL",
        ["t", "KL", *[f"sd {name}" for name in ESTIMATORS], "by the draw", "predicted"],
        [
            [
                str(t),
                terms["closed form"][t - 1].mean().item(),
                *[terms[name][t - 1].std().item() for name in ESTIMATORS],
                noise[t - 1].square().mean().sqrt().item(),
                terms["predicted"][t - 1].square().mean().sqrt().item(),
            ]
            for t in shown
        ],
    )


def print_whole_bound(terms: dict[int, dict[str, Tensor]]) -> None:
    rows = []
    for length, of_length in terms.items():
        for name, end in zip(ESTIMATORS, of_length["ends"], strict=True):
            whole = end + of_length[name].sum(0)
            single = end + (length - 1) * of_length[name]  # (T - 1, N): one t for all
            rows.append(
                [f"{length}, {name}", whole.mean().item(), whole.std().item(), single.std().item()]
            )
    print_table(
        "The whole bound, nats to an image: mean, and standard deviation of its estimate from one "
        "image,\nby every term of t > 0, or by a single one, at a random t, times their number",
        ["T, estimator", "mean", "sd, all terms", "sd, one term"],
        rows,
    )


def plot(out, terms: dict[str, Tensor], length: int, noises, scores) -> None:
    fig, [[left, middle, right]] = figure(3, width=4.8)
    t = torch.arange(1, length)
    for name, colour in zip(ESTIMATORS, COLOURS, strict=False):
        left.plot(t, terms[name].std(1), color=colour, lw=1, label=f"{name}: sd")
    left.plot(t, terms["closed form"].mean(1), "k--", label="KL itself")
    left.set(yscale="log", xlabel="t", ylabel="nats to an image")
    left.set_title(f"One term of the bound, T = {length}")
    left.legend(fontsize=8)

    places = torch.arange(len(noises))
    for k, (name, colour) in enumerate(zip(WAYS, COLOURS, strict=False)):
        heights = [noise[name] for noise in noises.values()]
        middle.bar(places + 0.27 * (k - 1), heights, 0.25, color=colour, label=name)
    middle.set_xticks(places, [f"T = {length}\n{moment}" for length, moment in noises])
    middle.set(yscale="log", ylabel="variance / squared mean")
    middle.set_title("Noise of the gradient, before and after training")
    middle.legend(fontsize=8)

    lengths = list(dict.fromkeys(length for length, _ in scores))
    places = torch.arange(len(lengths))
    for k, (name, colour) in enumerate(zip(WAYS, COLOURS, strict=False)):
        heights = [scores[length, name].total for length in lengths]
        errors = [scores[length, name].total_stderr for length in lengths]
        right.bar(places + 0.27 * (k - 1), heights, 0.25, yerr=errors, color=colour, label=name)
    right.set_xticks(places, [f"T = {length}" for length in lengths])
    right.set(ylabel="bits/dim", title="Held-out digits, after training")
    right.legend(fontsize=8)
    save_plot(fig, out)


if __name__ == "__main__":
    main()
