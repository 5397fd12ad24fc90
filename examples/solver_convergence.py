"""How fast each sampling method converges, with a network that makes no error.

Question: DDIM (Song et al. 2020, arXiv:2010.02502) solves the probability-flow ODE to first order,
DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095) to second. Do they here, and how much does it
matter where the steps are? For a Gaussian with a full covariance both the network, E[eps | x_t],
and the ODE's solution are known in closed form (Song et al. 2021, arXiv:2011.13456): the error of
a solver is measured against the exact end of every path, just before the last step, which takes
x_t at the least noise for what the data are. A ring of eight Gaussians, whose network is known too,
tells what becomes of all the methods' samples, those that draw noise included.

Look at: the slopes of the log-log lines. Spaced evenly in log SNR, DPM-Solver++ has its order from
some 24 steps on; spaced evenly in t, the linear schedule leaves so few steps to the least noise
that it has not reached it at 128. DDIM barely minds. On the ring the order tells from 20 steps on,
not before: at 8 and 12 the SDE form is the worst of all.

Result: orders over 24 to 128 steps 1.00 (DDIM) and 2.00 (DPM-Solver++), evenly in t 0.98 and 1.47.
DDIM's error at 128 steps is 0.0098; DPM-Solver++ has 0.0054 at 24, and evenly in t 0.0057 at 128.
Ring, sliced Wasserstein-1 at 8 / 20 / 40 steps: DPM-Solver++ 0.044 / 0.011 / 0.010, its SDE form
0.072 / 0.017 / 0.007, DDIM 0.049 / 0.019 / 0.012, DDPM 0.045 / 0.019 / 0.009; two real sets 0.010,
which scatters by 0.0025 from draw to draw.
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

from fastdiff import Sampler, create_diffusion
from fastdiff.methods.table import noise_levels

MEAN = torch.tensor([0.3, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.50, 0.18], [0.18, 0.10]], dtype=torch.float64)
RING = ring_of_gaussians()
STEPS = (8, 12, 16, 24, 32, 48, 64, 96, 128)
FITTED = STEPS[3:]  # the slopes are those of these
SOLVERS = {"DDIM": "ddim", "DPM-Solver++": "dpmsolver++"}
SPACINGS = {"log SNR": "logsnr", "t": "uniform"}
METHODS = {
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

    errors = {
        (solver, spacing): flow_errors(process, SOLVERS[solver], SPACINGS[spacing])
        for spacing in SPACINGS
        for solver in SOLVERS
    }
    slopes = {
        line: -np.polyfit(np.log(FITTED), np.log(values[-len(FITTED) :]), 1)[0]
        for line, values in errors.items()
    }
    print_table(
        "Gaussian data: error (root mean square) at the end of the probability-flow ODE",
        ["solver, steps even in", *[f"{steps} steps" for steps in STEPS]],
        [[f"{solver}, {spacing}", *errors[solver, spacing]] for solver, spacing in errors],
    )
    print_table(
        f"Order: minus the slope over {FITTED[0]} to {FITTED[-1]} steps",
        ["solver, steps even in", "order"],
        [[f"{solver}, {spacing}", f"{slope:.2f}"] for (solver, spacing), slope in slopes.items()],
    )

    count = 300 if args.quick else 5000
    generator = torch.Generator().manual_seed(1)
    real, second = RING.sample(count, generator), RING.sample(count, generator)
    floor = sliced_wasserstein(second, real)
    network = exact_network(RING, process)
    distances = {}
    for name, method in METHODS.items():
        for steps in RING_STEPS:
            strided = process.respace(steps, spacing="logsnr")
            sampler = Sampler(network, strided, clip_denoised=False, **method)
            samples = sampler.sample((count, 2), seed=2)
            distances[name, steps] = sliced_wasserstein(samples, real)
    print_table(
        f"Ring: sliced Wasserstein-1, steps even in log SNR (two real sets {floor:.4f})",
        ["method", *[f"{steps} steps" for steps in RING_STEPS]],
        [[name, *[distances[name, steps] for steps in RING_STEPS]] for name in METHODS],
    )
    plot(args.out, errors, slopes, distances, floor)


def flow_errors(process, method: str, spacing: str) -> list[float]:
    """The error at t = 0, root mean square over 200 paths, for each number of steps."""
    signal, noise = noise_levels(process)
    x_T = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    exact = along_the_flow(x_T, (signal[-1], noise[-1]), (signal[0], noise[0]))
    found = []
    for steps in STEPS:
        strided = process.respace(steps, spacing=spacing)
        sampler = Sampler(gaussian_network(process), strided, method=method, clip_denoised=False)
        *_, x_0, _ = sampler.iterate(x_T.shape, noise=x_T)
        found.append((x_0["sample"] - exact).square().mean().sqrt().item())
    return found


def gaussian_network(process):
    """model(x, t) = E[eps | x_t] for x_0 ~ N(MEAN, COVARIANCE); ``process`` is unstrided."""
    signal, noise = noise_levels(process)

    def network(x, t):
        s, n = signal[int(t[0])], noise[int(t[0])]
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
    fig, ((orders, ring),) = figure(2, width=5.2, height=4.2)
    for (solver, spacing), values in errors.items():
        orders.plot(
            STEPS,
            values,
            "o-" if spacing == "log SNR" else "x:",
            color=COLOURS[list(SOLVERS).index(solver)],
            label=f"{solver}, even in {spacing}: order {slopes[solver, spacing]:.2f}",
        )
    for order, values in ((1, errors["DDIM", "log SNR"]), (2, errors["DPM-Solver++", "log SNR"])):
        guide = [0.6 * values[-1] * (STEPS[-1] / steps) ** order for steps in FITTED]
        orders.plot(FITTED, guide, color="0.6", lw=1)
        orders.text(FITTED[0], guide[0], f"order {order} ", ha="right", va="top", color="0.4")
    orders.set(yscale="log", xlabel="steps", ylabel="root mean square error")
    orders.set(title="Gaussian: end of the probability-flow ODE")
    for (name, _), colour in zip(METHODS.items(), COLOURS, strict=False):
        values = [distances[name, steps] for steps in RING_STEPS]
        ring.plot(RING_STEPS, values, "o-", color=colour, label=name)
    ring.axhline(floor, color="0.5", lw=1, label="two real sets")
    ring.set(yscale="log", xlabel="steps", ylabel="sliced Wasserstein-1")
    ring.set(title="Ring of Gaussians, steps even in log SNR")
    show_steps(orders, STEPS)
    show_steps(ring, RING_STEPS)
    for ax in (orders, ring):
        ax.legend(fontsize=8)
    save_plot(fig, out)


if __name__ == "__main__":
    main()
