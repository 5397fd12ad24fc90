"""Laplace and Student-t reverse steps in place of Gaussian ones.

Question: p(x_{t-1} | x_t) is Gaussian since the true reverse step is one in the limit of many steps
(Sohl-Dickstein et al. 2015, arXiv:1503.03585), and since its KL from q(x_{t-1} | x_t, x_0) is then
a squared error: the loss is averaged over x_{t-1} on paper. With few steps the true one has several
modes and long tails. Would a Laplace or a Student-t (whose degrees of freedom are learned too) fit
better, and what becomes of the average? Data: three Gaussians in 1-D, cosine schedule. The true
reverse step is then a known mixture, and the nearest member of each family at every x_t is found on
a grid, without a network. For 8 steps networks learn it too, by the loss at a drawn x_{t-1} and by
its average over q(x_{t-1} | x_t, x_0).

Look at: the lower left panel. What breaks is the limit. Where the step is nearly Gaussian a Laplace
costs log 2 + ½ log(2/π) + ½ - ½ log 2π = 0.048 nats, and every step adds that: more steps make its
bound worse. A Student-t has the Gaussian among its members and never loses.

Result, nats of the bound above the entropy (the prior's term apart, below 0.001) at 4 / 8 / 16 / 64
steps: Gaussian 0.43 / 0.27 / 0.096 / 0.011, Laplace 0.58 / 0.57 / 0.82 / 3.1, Student-t 0.36 / 0.17
/ 0.067 / 0.010. The samples do not tell: at 64 steps Laplace's KL is 0.013 (Gaussian 0.006, two
real sets 0.006), as the noise of many steps adds up to a Gaussian; at 4 and 8 it is even the better
one (0.25 against 0.39, 0.10 against 0.19), with the worse bound. Student-t is best there (0.23,
0.08), but a few samples far out make its Wasserstein-1 at 4 steps the worst.
The average is lost for the Student-t only: a Laplace's has a closed form with erf, and for a
Student-t 16 nodes of Gauss and Hermite serve. It is worth having: the gradient's variance is 0.18
(Gaussian, Student-t) and 0.12 (Laplace) of that with draws, and the networks come closer to the
best, 0.279 against 0.288, 0.589 against 0.618 and 0.207 against 0.232 nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from _common import (
    COLOURS,
    TinyMLP,
    figure,
    grid_kl,
    parse_arguments,
    print_table,
    save_plot,
    show_density,
    show_samples,
    show_steps,
    three_gaussians,
    train,
    wasserstein_1d,
)
from torch import Tensor, nn

from fastdiff import GaussianDiffusion, create_diffusion
from fastdiff.methods.levels import Levels

MIXTURE = three_gaussians()
STEPS = (2, 4, 8, 16, 32, 64)
TRAINED = 8  # steps of the chain that networks learn
PLACES, NODES = 120, 240  # of x_t and of x_{t-1} on the grids
Parameters = tuple[Tensor, Tensor, Tensor]  # location, log scale, log of the degrees of freedom


# -- three families -------------------------------------------------------------------------------


class Family(NamedTuple):
    """``cost(x, *parameters)``, −log density; ``averaged(mean, std, *parameters)``, what it is on
    average over x ~ N(mean, std²); ``draw(generator, df)``, a standard member."""

    cost: Callable[..., Tensor]
    averaged: Callable[..., Tensor]
    draw: Callable[[np.random.Generator, np.ndarray], np.ndarray]


def gaussian(x: Tensor, location: Tensor, log_scale: Tensor, log_df: Tensor) -> Tensor:
    return 0.5 * ((x - location) / log_scale.exp()) ** 2 + log_scale + 0.5 * math.log(2 * math.pi)


def averaged_gaussian(mean: Tensor, std: Tensor, *parameters: Tensor) -> Tensor:
    return gaussian(mean, *parameters) + 0.5 * (std / parameters[1].exp()) ** 2


def laplace(x: Tensor, location: Tensor, log_scale: Tensor, log_df: Tensor) -> Tensor:
    return (x - location).abs() / log_scale.exp() + log_scale + math.log(2)


def averaged_laplace(mean: Tensor, std: Tensor, *parameters: Tensor) -> Tensor:
    """By the mean of |x − location|, a folded Gaussian's."""
    location, log_scale, _ = parameters
    std = std.clamp(min=1e-8)
    z = (mean - location) / std
    size = std * (math.sqrt(2 / math.pi) * (-(z**2) / 2).exp() + z * torch.erf(z / math.sqrt(2)))
    return size / log_scale.exp() + log_scale + math.log(2)


def student_t(x: Tensor, location: Tensor, log_scale: Tensor, log_df: Tensor) -> Tensor:
    half = 0.5 * log_df.exp()
    tails = torch.log1p(((x - location) / log_scale.exp()) ** 2 / (2 * half))
    normaliser = half.lgamma() - (half + 0.5).lgamma() + 0.5 * (log_df + math.log(math.pi))
    return (half + 0.5) * tails + log_scale + normaliser


def averaged_student_t(mean: Tensor, std: Tensor, *parameters: Tensor) -> Tensor:
    """No closed form is known: 16 nodes of Gauss and Hermite."""
    nodes, weights = (torch.from_numpy(a).to(mean) for a in np.polynomial.hermite_e.hermegauss(16))
    x = mean[..., None] + std[..., None] * nodes
    return student_t(x, *(p[..., None] for p in parameters)) @ (weights / weights.sum())


FAMILIES = {
    "Gaussian": Family(gaussian, averaged_gaussian, lambda rng, df: rng.standard_normal(df.shape)),
    "Laplace": Family(laplace, averaged_laplace, lambda rng, df: rng.laplace(size=df.shape)),
    "Student-t": Family(student_t, averaged_student_t, lambda rng, df: rng.standard_t(df)),
}


def cosine(steps: int) -> GaussianDiffusion:
    """What is read of it is the forward process, whatever a network predicts."""
    return create_diffusion(steps=steps, noise_schedule="cosine", mean_type="x_start")


# -- the true reverse step ------------------------------------------------------------------------


@dataclass
class Reverse:
    """q(x_{t-1} | x_t) of the mixture, exactly, at G places of x_t and Q of x_{t-1} for K steps."""

    x_t: Tensor  # (K, G), even
    share: Tensor  # (K, G): the probability of a place
    x_prev: Tensor  # (K, G, Q), even
    mass: Tensor  # (K, G, Q): the conditional probability of a place
    log_q: Tensor  # (K, G, Q): its log density

    @classmethod
    def of(cls, process: GaussianDiffusion) -> "Reverse":
        levels = Levels.of(process.signal_scale, process.noise_scale)
        rows = [reverse_step(levels, t) for t in range(process.num_timesteps)]
        return cls(*map(torch.stack, zip(*rows, strict=True)))

    def best(self, family: Family, iterations: int) -> Parameters:
        """Those of the family's member that is nearest at each x_t, (K, G) each."""
        mean = (self.mass * self.x_prev).sum(2)
        std = (self.mass * (self.x_prev - mean[:, :, None]) ** 2).sum(2).sqrt()
        raw = torch.zeros(3, *mean.shape, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([raw], max_iter=iterations, line_search_fn="strong_wolfe")

        def parameters() -> Parameters:
            return mean + std * raw[0], std.log() + raw[1], 2 + raw[2]

        def closure() -> Tensor:
            optimizer.zero_grad()
            total = self.cross_entropy(family, parameters()).sum()
            total.backward()
            return total

        optimizer.step(closure)
        location, log_scale, log_df = (p.detach() for p in parameters())
        return location, log_scale, log_df

    def cross_entropy(self, family: Family, parameters: Parameters) -> Tensor:
        """(K, G) nats."""
        cost = family.cost(self.x_prev, *(p[:, :, None] for p in parameters))
        return (self.mass * cost).sum(2)

    def excess(self, family: Family, parameters: Parameters) -> Tensor:
        """(K,) nats: E KL(q(x_{t-1} | x_t) ‖ p(x_{t-1} | x_t))."""
        kl = self.cross_entropy(family, parameters) + (self.mass * self.log_q).sum(2)
        return (self.share * kl).sum(1)

    def sample(self, family: Family, parameters: Parameters, count: int) -> Tensor:
        """(count, 1): the chain from N(0, 1) down, parameters interpolated between the places."""
        rng = np.random.default_rng(2)
        x = rng.standard_normal(count)
        for t in reversed(range(len(self.x_t))):
            location, log_scale, log_df = (
                np.interp(x, self.x_t[t].numpy(), p[t].numpy()) for p in parameters
            )
            x = location + np.exp(log_scale) * family.draw(rng, np.exp(log_df))
        return torch.from_numpy(x)[:, None].float()


def reverse_step(levels: Levels, t: int) -> tuple[Tensor, ...]:
    """A row of ``Reverse``: every Gaussian of the mixture conditioned by itself, then weighed."""
    signal, noise, before = levels.signal[t], levels.noise[t], levels.signal_prev[t]
    shrink, transition = signal / before, levels.transition_variance[t]
    limit = signal + 4.5 * noise
    x_t = torch.linspace(-limit, limit, PLACES, dtype=torch.float64)
    centre = before * MIXTURE.means[:, 0]  # (M,), of x_{t-1}
    variance = (before * MIXTURE.stds) ** 2 + levels.noise_prev[t] ** 2
    total = shrink**2 * variance + transition  # of x_t
    residual = x_t[:, None] - shrink * centre  # (G, M)
    log_joint = MIXTURE.weights.log() - 0.5 * residual**2 / total - 0.5 * total.log()
    mean = centre + shrink * variance / total * residual
    std = (variance * transition / total).sqrt()
    low, high = (mean - 6 * std).min(1).values, (mean + 6 * std).max(1).values
    places = torch.linspace(0, 1, NODES, dtype=torch.float64)
    x_prev = low[:, None] + (high - low)[:, None] * places  # (G, Q)
    z = (x_prev[:, :, None] - mean[:, None]) / std  # (G, Q, M)
    log_weight = log_joint.log_softmax(1)[:, None]
    log_q = (log_weight - 0.5 * z**2 - std.log()).logsumexp(2) - 0.5 * math.log(2 * math.pi)
    return x_t, log_joint.logsumexp(1).softmax(0), x_prev, log_q.softmax(1), log_q


# -- networks that learn it -----------------------------------------------------------------------


class Objective:
    """−log p(x_{t-1} | x_t) of a family's member, its parameters a network's output.

    With x_{t-1} drawn from q(x_{t-1} | x_t, x_0), or averaged over that Gaussian.
    """

    num_timesteps = TRAINED

    def __init__(self, process: GaussianDiffusion, family: Family, averaged: bool) -> None:
        self.process, self.family, self.averaged = process, family, averaged

    def parameters(self, network: nn.Module, x_t: Tensor, t: Tensor) -> Parameters:
        """(N, 1) each; in units of the step that was taken from x_{t-1} to x_t."""
        step = torch.from_numpy(self.process.betas).float().sqrt()[t][:, None]
        location, log_scale, log_df = network(x_t, t).chunk(3, 1)
        # At most e^5 degrees of freedom, where a float32's lgamma still has digits.
        return x_t + step * location, step.log() + log_scale, 5 - nn.functional.softplus(3 - log_df)

    def terms(self, parameters: Parameters, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(N, 1) nats."""
        mean, variance, _ = self.process.q_posterior_mean_variance(x_start, x_t, t)
        if self.averaged:
            return self.family.averaged(mean, variance.sqrt(), *parameters)
        x_prev = mean + variance.sqrt() * torch.randn_like(mean)
        return self.family.cost(x_prev, *parameters)

    def training_losses(
        self, network: nn.Module, x_start: Tensor, t: Tensor, *, noise: Tensor
    ) -> dict[str, Tensor]:
        x_t = self.process.q_sample(x_start, t, noise)
        return {"loss": self.terms(self.parameters(network, x_t, t), x_start, x_t, t)}

    @torch.no_grad()
    def on_grid(self, network: nn.Module, reverse: Reverse) -> Parameters:
        """What the network answers at every place of x_t, (K, G) each."""
        rows = [
            self.parameters(network, x_t.float()[:, None], torch.full((PLACES,), t))
            for t, x_t in enumerate(reverse.x_t)
        ]
        location, log_scale, log_df = (
            torch.cat(column, 1).T.double() for column in zip(*rows, strict=True)
        )
        return location, log_scale, log_df


def gradient_variance(objective: Objective, reverse: Reverse, parameters: Parameters) -> float:
    """Of one sample's gradient by the location, in units of 1/scale, where t > 0."""
    generator = torch.Generator().manual_seed(3)
    count, squares = 5000, []
    for t in range(1, TRAINED):
        x_start = MIXTURE.sample(count, generator)
        steps = torch.full((count,), t)
        noise = torch.randn(x_start.shape, generator=generator)
        x_t = objective.process.q_sample(x_start, steps, noise)
        location, log_scale, log_df = (
            torch.from_numpy(np.interp(x_t, reverse.x_t[t], p[t])).float() for p in parameters
        )
        location.requires_grad_()
        terms = objective.terms((location, log_scale, log_df), x_start, x_t, steps)
        gradient = torch.autograd.grad(terms.sum(), location)[0]
        squares.append((gradient * log_scale.exp()).square().mean())
    return torch.stack(squares).mean().item()


def main() -> None:
    args = parse_arguments(__doc__, "heavy_tails")
    steps_list = (4, TRAINED) if args.quick else STEPS
    count = 1000 if args.quick else 10_000
    real = MIXTURE.sample(count, torch.Generator().manual_seed(1))
    reverses, best, excess, samples = {}, {}, {}, {}
    for steps in steps_list:
        reverses[steps] = Reverse.of(cosine(steps))
        for name, family in FAMILIES.items():
            key = name, steps
            best[key] = reverses[steps].best(family, 5 if args.quick else 80)
            excess[key] = reverses[steps].excess(family, best[key])
            samples[key] = reverses[steps].sample(family, best[key], count)
    floor = grid_kl(MIXTURE.sample(count, torch.Generator().manual_seed(4)), MIXTURE, 1.0, 100)
    print_table(
        "The best reverse steps there are: nats that the bound on -log p(x0) is above the entropy",
        ["steps", *FAMILIES],
        [[str(s), *[excess[name, s].sum().item() for name in FAMILIES]] for s in steps_list],
    )
    print_table(
        f"{count} samples of those chains: Wasserstein-1 and KL(true || samples), nats "
        f"(two real sets: KL {floor:.2g})",
        ["steps", *[f"{measure} {name}" for name in FAMILIES for measure in ("W1", "KL")]],
        [
            [
                str(s),
                *[
                    distance
                    for name in FAMILIES
                    for distance in (
                        wasserstein_1d(samples[name, s], real),
                        grid_kl(samples[name, s], MIXTURE, 1.0, 100),
                    )
                ],
            ]
            for s in steps_list
        ],
    )
    print_table(
        f"Networks for {TRAINED} steps, taught by draws of x_(t-1) or by the average over it: nats "
        "above the entropy.\nRatio: the gradient's variance averaged over that with draws",
        ["family", "best", "by draws", "by averages", "ratio"],
        [
            [name, excess[name, TRAINED].sum().item(), *trained(name, reverses, best, args.quick)]
            for name in FAMILIES
        ],
    )
    plot(args.out, reverses, best, excess, samples, steps_list)


def trained(name: str, reverses, best, quick: bool) -> list[float]:
    """The excess of a network taught by draws, of one taught by averages; the variances' ratio."""
    reverse, family = reverses[TRAINED], FAMILIES[name]
    found, variances = [], []
    for averaged in (False, True):
        objective = Objective(cosine(TRAINED), family, averaged)
        model = TinyMLP((1,), t_max=TRAINED, width=64, out_factor=3)
        network = train(model, objective, MIXTURE.sample, 20 if quick else 2000)
        found.append(reverse.excess(family, objective.on_grid(network, reverse)).sum().item())
        variances.append(gradient_variance(objective, reverse, best[name, TRAINED]))
    return [*found, variances[1] / variances[0]]


def plot(out, reverses, best, excess, samples, steps_list) -> None:
    fig, [[coarse, fine], [bound, density]] = figure(2, rows=2, width=5.2)
    for ax, steps in ((coarse, 4), (fine, steps_list[-1])):
        show_step(ax, reverses[steps], {name: best[name, steps] for name in FAMILIES}, steps)
    for name, colour in zip(FAMILIES, COLOURS, strict=False):
        values = [excess[name, s].sum() for s in steps_list]
        bound.plot(steps_list, values, "o-", color=colour, label=name)
    cost = math.log(2) + 0.5 * math.log(2 / math.pi) + 1 - 0.5 * math.log(2 * math.pi * math.e)
    line = [cost * s for s in steps_list]
    bound.plot(steps_list, line, ":", color="k", label="a Laplace for a Gaussian, every step")
    bound.set(yscale="log", xlabel="steps", ylabel="nats", title="The bound above the entropy")
    show_steps(bound, steps_list)
    bound.legend(fontsize=8)
    show_density(density, MIXTURE)
    for name, colour in zip(FAMILIES, COLOURS, strict=False):
        show_samples(density, samples[name, TRAINED], color=colour, label=name)
    density.set(xlabel="x", ylabel="density", title=f"Samples, {TRAINED} steps")
    density.legend(fontsize=8)
    save_plot(fig, out)


def show_step(ax, reverse: Reverse, parameters: dict[str, Parameters], steps: int) -> None:
    """The true conditional and its fits where, weighed by the place's share, a Gaussian loses
    most."""
    kl = reverse.cross_entropy(FAMILIES["Gaussian"], parameters["Gaussian"])
    kl = kl + (reverse.mass * reverse.log_q).sum(2)
    t, place = divmod(int((reverse.share * kl).argmax()), PLACES)
    x = reverse.x_prev[t, place]
    ax.fill_between(x, reverse.log_q[t, place].exp(), color="0.8", label="true")
    for (name, fitted), colour, style in zip(parameters.items(), COLOURS, "--:", strict=False):
        member = FAMILIES[name].cost(x, *(p[t, place] for p in fitted))
        ax.plot(x, (-member).exp(), style, lw=1 + (style == ":"), color=colour, label=name)
    ax.set(xlabel="x_(t-1)", ylabel="density", xlim=(x[0], x[-1]))
    ax.set_title(f"A reverse step of {steps}: t = {t}, x_t = {reverse.x_t[t, place]:.2f}")
    ax.legend(fontsize=8)


if __name__ == "__main__":
    main()
