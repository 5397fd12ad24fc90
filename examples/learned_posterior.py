"""A learned approximate posterior in place of the fixed one.

Question: a diffusion model is a hierarchical VAE whose posterior q(x_t | x_0) learns nothing (Ho et
al. 2020, arXiv:2006.11239, section 3.1, where even its variances are fixed). Does it help to learn
it with the network, by the bound: the noise levels (Kingma et al. 2021, arXiv:2107.00630), or an
encoder that moves the mean (Neural Diffusion Models, Bartosh et al. 2024; DiffEnc, Nielsen et al.
2023, arXiv:2310.19789)? Data: three Gaussians in 1-D, whose entropy is known. Chains of 4, 16 and
64 steps, 1,500 steps of training; one with an encoder takes about twice the time, so a fixed
posterior is also trained twice as long. Reverse steps are Gaussian, mean and variance learned.

Look at: the upper left panel. With 4 steps what was learned makes the reverse steps more Gaussian,
and the bound falls. With many steps they are so by themselves, for any posterior that starts at the
data and ends at noise, and nothing is left to learn.

Result, nats of the bound above the entropy (± 0.013 / 0.012 / 0.009) at 4 / 16 / 64 steps: fixed
0.35 / 0.055 / 0.017, trained twice as long 0.36 / 0.050 / 0.008, learned levels 0.22 / 0.020 /
0.019, learned encoder 0.23 / 0.052 / 0.022. KL of the samples (two real sets 0.005): 0.26 / 0.019 /
0.009, 0.27 / 0.014 / 0.008, 0.12 / 0.009 / 0.009, 0.12 / 0.017 / 0.011. So both help a chain of 4
steps, levels one of 16 too, the encoder no longer; at 64 nothing does, and more training of the
fixed one would have been the better use of the time. Which fixed one it is matters as much: with
the cosine schedule's levels 0.43 / 0.11 / 0.044.
"""

import math
from dataclasses import dataclass

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

from fastdiff import create_diffusion
from fastdiff.process.likelihood import normal_kl

MIXTURE = three_gaussians()
LENGTHS = (4, 16, 64)  # steps of the chain
BUDGET = 1500  # steps of training
FIXED, COSINE = "fixed", "fixed, cosine"
LEARNED_LEVELS, ENCODER = "learned levels", "learned encoder"
LONGER = "fixed, twice as long"  # as long as training with an encoder takes
KINDS = {FIXED: 1, LONGER: 2, COSINE: 1, LEARNED_LEVELS: 1, ENCODER: 1}  # shares of the budget


class Posterior(nn.Module):
    """q(x_t | x_0) = N(signal_t·f_t(x_0), noise_t²·I), t = 0 … K-1, and before t = 0 the data.

    Fixed: f_t(x_0) = x_0, and log signal-to-noise ratios that are even from 7 to -7, or the cosine
    schedule's. Learned levels: these ratios are parameters. Learned encoder: f_t(x_0) = x_0 +
    noise_t·(a network's output). Both start as the fixed one.
    """

    def __init__(self, kind: str, length: int) -> None:
        super().__init__()
        log_snr = torch.linspace(7, -7, length, dtype=torch.float64)
        if kind == COSINE:
            cosine = create_diffusion(steps=length, noise_schedule="cosine", mean_type="v")
            log_snr = torch.from_numpy(cosine.alphas_cumprod).logit()
        falls = -log_snr.diff()
        self.register_buffer("start", torch.cat([log_snr[:1], falls.expm1().log()]))
        self.moved = nn.Parameter(torch.zeros(length), requires_grad=kind == LEARNED_LEVELS)
        self.encoder = None
        if kind == ENCODER:
            self.encoder = TinyMLP((1,), t_max=length, width=64)
            nn.init.zeros_(self.encoder.skip.weight)
            nn.init.zeros_(self.encoder.skip.bias)

    def levels(self) -> tuple[Tensor, Tensor]:
        """Signal and noise, (K + 1,) float32 each: at t - 1 = -1 … K-1."""
        raw = self.start + 5 * self.moved
        log_snr = raw[0] - torch.cat([raw.new_zeros(1), nn.functional.softplus(raw[1:]).cumsum(0)])
        signal, noise = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        one = signal.new_ones(1)
        return torch.cat([one, signal]).float(), torch.cat([0 * one, noise]).float()

    def encode(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """f_t(x_0); noise (N, 1) the level at t."""
        return x_start if self.encoder is None else x_start + noise * self.encoder(x_start, t)


@dataclass
class Step:
    """The levels and the posterior's coefficients at t (N,), each (N, 1)."""

    signal: Tensor
    noise: Tensor
    signal_prev: Tensor
    noise_prev: Tensor

    @classmethod
    def at(cls, posterior: Posterior, t: Tensor) -> "Step":
        signal, noise = (level[:, None] for level in posterior.levels())
        return cls(signal[t + 1], noise[t + 1], signal[t], noise[t])

    def __post_init__(self) -> None:
        shrink = self.signal / self.signal_prev
        ratio = shrink * self.noise_prev / self.noise
        transition = self.noise**2 * (1 - ratio) * (1 + ratio)
        self.variance = transition * (self.noise_prev / self.noise) ** 2  # of q(x_{t-1}|x_t,x_0)
        self.of_x_t = ratio * self.noise_prev / self.noise
        self.of_x_start = self.signal_prev - self.of_x_t * self.signal


class Chain(nn.Module):
    """A posterior, and the network of p(x_{t-1} | x_t), Gaussian with a learned variance."""

    def __init__(self, kind: str, length: int) -> None:
        super().__init__()
        self.posterior = Posterior(kind, length)
        self.network = TinyMLP((1,), t_max=length, width=64, out_factor=2)

    def reverse(self, x_t: Tensor, t: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Mean and log variance, (N, 1) each; the variance in units of the posterior's, where that
        is none of the noise's."""
        v, excess = self.network(x_t, t).chunk(2, 1)
        x_start = step.signal * x_t - step.noise * v
        unit = torch.where(t[:, None] == 0, step.noise**2, step.variance)
        return step.of_x_start * x_start + step.of_x_t * x_t, unit.log() + excess

    @torch.no_grad()
    def sample(self, count: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(count, 1, generator=generator)
        for i in reversed(range(length)):
            t = torch.full((count,), i)
            mean, log_variance = self.reverse(x, t, Step.at(self.posterior, t))
            noise = torch.randn(x.shape, generator=generator)
            x = mean + (0.5 * log_variance).exp() * noise
        return x


class Bound:
    """-log p(x_0) ≤ prior + the sum of K terms, in nats: what ``train`` needs of a process."""

    def __init__(self, length: int) -> None:
        self.num_timesteps = length

    def term(self, chain: Chain, x_start: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """(N,): KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)); at t = 0, -log p(x_0 | x_t)."""
        step, posterior = Step.at(chain.posterior, t), chain.posterior
        code = posterior.encode(x_start, t, step.noise)
        before = posterior.encode(x_start, t - 1, step.noise_prev)
        x_t = step.signal * code + step.noise * eps
        mean, log_variance = chain.reverse(x_t, t, step)
        true_mean = step.signal_prev * before + step.of_x_t * (x_t - step.signal * code)
        first = t[:, None] == 0  # its posterior has no variance
        true_log_variance = torch.where(first, step.noise**2, step.variance).log()
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
        nll = 0.5 * ((x_start - mean) ** 2 * (-log_variance).exp() + log_variance)
        return torch.where(first, nll + 0.5 * math.log(2 * math.pi), kl).sum(1)

    def prior(self, chain: Chain, x_start: Tensor) -> Tensor:
        """(N,): KL(q(x_T | x_0) ‖ N(0, I))."""
        t = torch.full((len(x_start),), self.num_timesteps - 1)
        step = Step.at(chain.posterior, t)
        mean = step.signal * chain.posterior.encode(x_start, t, step.noise)
        return normal_kl(mean, (step.noise**2).log().expand_as(mean), 0.0, 0.0).sum(1)

    def training_losses(
        self, chain: Chain, x_start: Tensor, t: Tensor, *, noise: Tensor
    ) -> dict[str, Tensor]:
        """An estimate of the bound per step of the chain."""
        prior = self.prior(chain, x_start) / self.num_timesteps
        return {"loss": self.term(chain, x_start, t, noise) + prior}

    @torch.no_grad()
    def terms(self, chain: Chain, x_start: Tensor) -> Tensor:
        """(N, K + 1): every term of the bound, the prior's last."""
        generator = torch.Generator().manual_seed(3)
        columns = []
        for i in range(self.num_timesteps):
            eps = torch.randn(x_start.shape, generator=generator)
            columns.append(self.term(chain, x_start, torch.full((len(x_start),), i), eps))
        return torch.stack([*columns, self.prior(chain, x_start)], 1)


def main() -> None:
    args = parse_arguments(__doc__, "learned_posterior")
    count = 1000 if args.quick else 10_000
    generator = torch.Generator().manual_seed(1)
    real, second = (
        MIXTURE.sample(count, generator),
        MIXTURE.sample(count, generator),
    )
    entropy = -MIXTURE.log_density(real)  # (N,), of the same points: their scatter cancels
    lengths = LENGTHS[:2] if args.quick else LENGTHS
    excess, samples, levels, rows = {}, {}, {}, []
    for length in lengths:
        for kind, share in KINDS.items():
            torch.manual_seed(0)
            chain = train(
                Chain(kind, length),
                Bound(length),
                MIXTURE.sample,
                (20 if args.quick else BUDGET) * share,
                lr=5e-3,
            )
            terms = Bound(length).terms(chain, real)
            above = terms.sum(1) - entropy
            key = kind, length
            excess[key], samples[key] = above.mean().item(), chain.sample(count, length)
            levels[key] = [level[1:].detach() for level in chain.posterior.levels()]
            rows.append(
                [
                    f"{length} {kind}",
                    excess[key],
                    (above.std() / count**0.5).item(),
                    *[part.sum(1).mean().item() for part in terms.split([1, length - 1, 1], 1)],
                    *distances(samples[key], real),
                ]
            )
    floor = distances(second, real)
    print_table(
        f"Nats of the bound above the entropy, its terms, and {count} samples against real ones\n"
        f"(two real sets: Wasserstein-1 {floor[0]:.2g}, KL {floor[1]:.2g} nats)",
        ["steps, posterior", "above", "± s.e.", "decoder", "steps", "prior", "W1", "KL"],
        rows,
    )
    plot(args.out, lengths, excess, samples, levels, real)


def distances(samples: Tensor, real: Tensor) -> list[float]:
    return [wasserstein_1d(samples, real), grid_kl(samples, MIXTURE, 1.0, 100)]


def plot(out, lengths, excess, samples, levels, real) -> None:
    fig, [[bound, quality], [snr, density]] = figure(2, rows=2, width=5.2)
    for kind, colour in zip(KINDS, COLOURS, strict=False):
        bound.plot(lengths, [excess[kind, k] for k in lengths], "o-", color=colour, label=kind)
        kl = [distances(samples[kind, k], real)[1] for k in lengths]
        quality.plot(lengths, kl, "o-", color=colour, label=kind)
        show_samples(density, samples[kind, lengths[0]], color=colour, label=kind)
    for kind, colour in ((FIXED, COLOURS[0]), (COSINE, COLOURS[2]), (LEARNED_LEVELS, COLOURS[3])):
        signal, noise = levels[kind, lengths[1]]
        snr.plot((signal / noise) ** 2, "o-", ms=4, color=colour, label=kind)
    show_density(density, MIXTURE)
    bound.set(yscale="log", ylabel="nats", title="The bound above the entropy")
    quality.set(yscale="log", ylabel="nats", title="KL(true || samples)")
    for ax in (bound, quality):
        ax.set_xlabel("steps")
        show_steps(ax, lengths)
    snr.set(yscale="log", xlabel="t", ylabel="signal-to-noise ratio")
    snr.set(title=f"Noise levels, {lengths[1]} steps")
    density.set(xlabel="x", ylabel="density", title=f"Samples, {lengths[0]} steps")
    for ax in (bound, snr, density):
        ax.legend(fontsize=8)
    save_plot(fig, out)


if __name__ == "__main__":
    main()
