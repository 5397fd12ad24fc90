"""How fast each sampling method converges, with a network that makes no error.

Question: of what order is each method that draws no noise, and how much does it matter where the
steps are? For a Gaussian with a full covariance both the network, E[eps | x_t], and the probability
flow's solution are known in closed form (Song et al. 2021, arXiv:2011.13456): the error of a solver
is measured against the exact end of every path, just before the last step, which takes x_t at the
least noise for what the data are. It is set over network calls, of which some methods make two a
step. A ring of eight Gaussians, whose network is known too, tells what becomes of the samples of
methods that draw noise as well.

Look at: the slopes of the log-log lines, with steps even in log SNR. DPM-Solver++(3M) is of second
order as published, with a smaller error than (2M); the methods that correct what they predicted, or
keep four values (UniPC, LMS, DEIS), gain an order over their names. Spaced evenly in t the linear
schedule leaves so few steps to the least noise that no method keeps its order to 128 calls.

Result: orders by the last five lines, 16 to 64 steps: DDIM and Euler 0.99, DPM-Solver++(2M) 1.95,
(2S) 1.91, (3M) 2.5, (3S) 3.0, Heun 2.1, DPM-Solver-2 2.1, PNDM 2.2, LMS 3.2, UniPC 3.6, DEIS 3.9;
evenly in t 0.97 (DDIM), 1.36 (2M) and 1.41 (UniPC). Errors at 24 calls: DDIM 0.052, (2M) 0.0054,
(3M) 0.0028, DEIS 0.0006, UniPC 0.00008. Ring, sliced Wasserstein-1 at 8 / 20 / 40 steps:
DPM-Solver++ 0.044 / 0.011 / 0.010, its SDE form 0.072 / 0.017 / 0.007, DDIM 0.049 / 0.019 / 0.012,
DDPM 0.045 / 0.019 / 0.009; two real sets 0.010, which scatters by 0.0025 from draw to draw.
"""

import numpy as np
import torch
from _common import (
    COLOURS,
    exact_network,
    figure,
    parse_arguments,
    print_table,
    ring_of_gaussians,
    save_plot,
    show_steps,
    sliced_wasserstein,
)
from matplotlib import colormaps

from fastdiff import Sampler, StepTable, create_diffusion
from fastdiff.methods.protocol import noise_levels
from fastdiff.methods.registry import METHODS

MEAN = torch.tensor([0.3, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.50, 0.18], [0.18, 0.10]], dtype=torch.float64)
RING = ring_of_gaussians()
STEPS = (8, 12, 16, 24, 32, 48, 64)
FITTED = 5  # the slopes are those of the last so many
SPACINGS = {"log SNR": "logsnr", "t": "uniform"}
SHOWN_BOTH_WAYS = ("ddim", "dpmsolver++", "unipc")  # the others with steps even in log SNR alone
ON_THE_RING = {
    "DDPM": {"method": "ddpm"},
    "DDIM": {"method": "ddim"},
    "DDIM, eta 0.5": {"method": "ddim", "eta": 0.5},
    "DPM-Solver++": {"method": "dpmsolver++"},
    "SDE-DPM-Solver++": {"method": "sde-dpmsolver++"},
}
RING_STEPS = (5, 8, 12, 20, 40, 100)


def main() -> None:
    args = parse_arguments(__doc__, "solver_convergence")
    process = create_diffusion(steps=1000, noise_schedule="linear", sigma_small=True)

    solvers = [name for name in METHODS if is_deterministic(name, process)]
    lines = [(name, "log SNR") for name in solvers] + [(name, "t") for name in SHOWN_BOTH_WAYS]
    errors = {line: flow_errors(process, *line) for line in lines}
    slopes = {line: order_of(*values) for line, values in errors.items()}
    print_table(
        "Gaussian data: error (root mean square) at the end of the probability-flow ODE",
        ["method, steps even in", *[f"{steps} steps" for steps in STEPS], "order"],
        [
            [f"{name}, {spacing}", *errors[name, spacing][1], f"{slopes[name, spacing]:.2f}"]
            for name, spacing in lines
        ],
    )

    count = 300 if args.quick else 5000
    generator = torch.Generator().manual_seed(1)
    real, second = RING.sample(count, generator), RING.sample(count, generator)
    floor = sliced_wasserstein(second, real)
    network = exact_network(RING, process)
    distances = {}
    for name, method in ON_THE_RING.items():
        for steps in RING_STEPS:
            strided = process.respace(steps, spacing="logsnr")
            sampler = Sampler(network, strided, clip_denoised=False, **method)
            samples = sampler.sample((count, 2), seed=2)
            distances[name, steps] = sliced_wasserstein(samples, real)
    print_table(
        f"Ring: sliced Wasserstein-1, steps even in log SNR (two real sets {floor:.4f})",
        ["method", *[f"{steps} steps" for steps in RING_STEPS]],
        [[name, *[distances[name, steps] for steps in RING_STEPS]] for name in ON_THE_RING],
    )
    plot(args.out, errors, slopes, distances, floor)


def is_deterministic(method: str, process) -> bool:
    return not StepTable.from_process(process.respace(10), method=method).is_noisy


def order_of(calls: list[int], errors: list[float]) -> float:
    """Minus the slope of the last five points of the log-log line."""
    return -np.polyfit(np.log(calls[-FITTED:]), np.log(errors[-FITTED:]), 1)[0]


def flow_errors(process, method: str, spacing: str) -> tuple[list[int], list[float]]:
    """Network calls, and the error at t = 0, root mean square over 200 paths, for each number of
    steps."""
    signal, noise = noise_levels(process)
    log_snr = np.log(signal / noise)
    x_T = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    exact = along_the_flow(x_T, (signal[-1], noise[-1]), (signal[0], noise[0]))
    calls, found = [], []
    for steps in STEPS:
        if spacing == "log SNR":  # exactly, between the process's own steps
            strided = process.at_log_snr(np.linspace(log_snr[-1], log_snr[0], steps))
        else:
            strided = process.respace(steps)
        sampler = Sampler(gaussian_network(process), strided, method=method, clip_denoised=False)
        *_, x_0, _ = sampler.iterate(x_T.shape, noise=x_T)
        found.append((x_0["sample"] - exact).square().mean().sqrt().item())
        calls.append(len(sampler.table))
    return calls, found


def gaussian_network(process):
    """model(x, t) = E[eps | x_t] for x_0 ~ N(MEAN, COVARIANCE); ``process`` is unstrided. Between
    its steps λ = log(signal / noise) is linear in t."""
    signal, noise = noise_levels(process)
    log_snr = np.log(signal / noise)

    def network(x, t):
        log_snr_t = np.interp(float(t[0]), np.arange(len(log_snr)), log_snr)
        s, n = (1 / np.sqrt(1 + np.exp(sign * 2 * log_snr_t)) for sign in (-1, 1))
        precision = torch.linalg.inv(s**2 * COVARIANCE + n**2 * torch.eye(2))
        return (n * (x.double() - s * MEAN) @ precision).float()

    return network


def along_the_flow(x, start, end):
    """The ODE's x at the level ``end`` from x (N, 2) at ``start``; levels are (signal, noise).

    In the covariance's eigenvectors each coordinate keeps its place in standard deviations.
    """
    variances, axes = torch.linalg.eigh(COVARIANCE)

    def total(level):
        return (level[0] ** 2 * variances + level[1] ** 2).sqrt()

    place = (x.double() - start[0] * MEAN) @ axes / total(start)
    return end[0] * MEAN + (place * total(end)) @ axes.T


def plot(out, errors, slopes, distances, floor: float) -> None:
    fig, ((orders, ring),) = figure(2, width=6.5, height=5.2)
    names = list(dict.fromkeys(name for name, _ in errors))
    for (name, spacing), (calls, values) in errors.items():
        orders.plot(
            calls,
            values,
            "o-" if spacing == "log SNR" else "x:",
            color=colormaps["tab20"](names.index(name)),
            markersize=4,
            label=f"{name}{', even in t' * (spacing == 't')}: {slopes[name, spacing]:.1f}",
        )
    orders.set(xscale="log", yscale="log", xlabel="network calls", ylabel="root mean square error")
    orders.set(title="Gaussian: end of the probability-flow ODE")
    for (name, _), colour in zip(ON_THE_RING.items(), COLOURS, strict=False):
        values = [distances[name, steps] for steps in RING_STEPS]
        ring.plot(RING_STEPS, values, "o-", color=colour, label=name)
    ring.axhline(floor, color="0.5", lw=1, label="two real sets")
    ring.set(yscale="log", xlabel="steps", ylabel="sliced Wasserstein-1")
    ring.set(title="Ring of Gaussians, steps even in log SNR")
    show_steps(ring, RING_STEPS)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12)}
    orders.legend(fontsize=7, ncols=3, title="steps even in log SNR, and the order", **below)
    ring.legend(fontsize=8)
    save_plot(fig, out)


if __name__ == "__main__":
    main()
