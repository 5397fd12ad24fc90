"""What the studies share: the toy data with its exact answers, a tiny network, a training
loop, a table and a plot.
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.data import load_dataset
from fastdiff.evaluation import frechet_distance, train_classifier
from fastdiff.images import to_float, to_uint8
from fastdiff.methods.protocol import noise_levels
from fastdiff.optional import require

Draw = Callable[[int, torch.Generator], Tensor]  # draw(n, generator): n data points
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito


def parse_arguments(
    doc: str | None, name: str, data: Sequence[str] | None = None
) -> argparse.Namespace:
    """``--out`` (a folder, made here) and ``--quick`` (a few seconds, for the tests).

    ``--data`` where a study can be made on several sets, ``data``, of which the first is usual.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/examples") / name)
    parser.add_argument("--quick", action="store_true", help="a few seconds; figures mean nothing")
    if data:
        parser.add_argument("--data", choices=data, default=data[0], help="default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    # Networks this small gain nothing from a second thread, and with one the figures are the same
    # on any number of cores; on another kind of CPU they need not be (examples/README.md).
    torch.set_num_threads(1)
    return args


# -- data whose every answer is known -------------------------------------------------------------


class GaussianMixture:
    """M Gaussians in D dimensions, each as wide in every direction: x_t = signal·x_0 + noise·eps
    is again such a mixture, and E[x_0 | x_t] is exact.

    means (M, D); stds one for all or (M,); weights equal unless given.
    """

    def __init__(self, means, stds, weights=None) -> None:
        self.means = torch.tensor(means, dtype=torch.float64)
        self.stds = torch.tensor(stds, dtype=torch.float64).expand(len(self.means))
        weights = torch.ones(len(self.means)) if weights is None else torch.tensor(weights)
        self.weights = weights.double() / weights.sum()

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D) float32."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator)
        return self.means[which].float() + self.stds[which, None].float() * noise

    def log_density(self, x: Tensor, signal: float = 1.0, noise: float = 0.0) -> Tensor:
        """log p(x_t), x (N, D) -> (N,) float64; at the default scales, of the data themselves."""
        return self._log_joint(x, signal, noise).logsumexp(1)

    def denoise(self, x_t: Tensor, signal: float, noise: float) -> Tensor:
        """E[x_0 | x_t], the function a perfectly trained network would be; (N, D) float32."""
        which = self._log_joint(x_t, signal, noise).softmax(1)  # (N, M): p(component | x_t)
        gain = signal * self.stds**2 / ((signal * self.stds) ** 2 + noise**2)  # (M,)
        residual = x_t.double()[:, None] - signal * self.means  # (N, M, D)
        return (which[:, :, None] * (self.means + gain[:, None] * residual)).sum(1).float()

    def _log_joint(self, x: Tensor, signal: float, noise: float) -> Tensor:
        variance = (signal * self.stds) ** 2 + noise**2  # (M,)
        distance = (x.double()[:, None] - signal * self.means).square().sum(-1)  # (N, M)
        normaliser = 0.5 * self.means.shape[1] * torch.log(2 * math.pi * variance)
        return self.weights.log() - 0.5 * distance / variance - normaliser


def ring_of_gaussians(count: int = 8, radius: float = 0.7, std: float = 0.06) -> GaussianMixture:
    """The 2-D mixture of the studies: ``count`` equal Gaussians on a circle, inside [-1, 1]²."""
    angles = [2 * math.pi * k / count for k in range(count)]
    return GaussianMixture([[radius * math.cos(a), radius * math.sin(a)] for a in angles], std)


def three_gaussians() -> GaussianMixture:
    """The 1-D mixture of the studies: modes of several widths and weights, inside [-1, 1]."""
    return GaussianMixture([[-0.6], [0.0], [0.55]], [0.06, 0.15, 0.08], [0.3, 0.4, 0.3])


def exact_network(mixture: GaussianMixture, process) -> Callable[[Tensor, Tensor], Tensor]:
    """A "network" that makes no error: whatever distance its samples keep is the sampler's.

    ``process`` is unstrided and gives the network the timestep's index.
    """
    signal, noise = noise_levels(process)
    scale = getattr(process, "input_scale", np.ones_like(signal))

    def network(x: Tensor, t: Tensor) -> Tensor:
        i = int(t[0])
        x_t = x / scale[i]
        x_start = mixture.denoise(x_t, signal[i], noise[i])
        if process.mean_type == "x_start":
            return x_start
        eps = (x_t - signal[i] * x_start) / noise[i]
        if process.mean_type == "epsilon":
            return eps
        return (signal[i] * eps - noise[i] * x_start) / np.hypot(signal[i], noise[i])  # v

    return network


# -- digits ---------------------------------------------------------------------------------------


def load_digits(held_out: int = 360, data: str = "digits") -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 8×8 digits in [-1, 1]: (train, held out), float (N, 1, 8, 8).

    ``data`` "mnist5k": 5,000 of MNIST, 28×28.
    """
    dataset = load_dataset(data)
    images = to_float(dataset.gather(np.random.default_rng(0).permutation(len(dataset))))
    return images[held_out:], images[:held_out]


def draw_from(images: Tensor) -> Draw:
    """Of a set (N, ...), with replacement."""
    return lambda n, generator: images[torch.randint(len(images), (n,), generator=generator)]


class FrechetJudge:
    """Fréchet distance to the real digits, on features of a classifier that saw no sample.

    ``count``: of samples, and of real digits in either of two sets, ``halves`` apart: the unit to
    measure in.
    """

    def __init__(self, data: str = "digits", *, quick: bool = False) -> None:
        """``quick``: by few images and a classifier that is hardly trained, for tests."""
        dataset = load_dataset(data, class_cond=True)
        order = np.random.default_rng(1).permutation(len(dataset))
        images, labels = dataset.gather(order), dataset.gather_labels(order)
        steps = 10 if quick else None  # None: the judge's own choice
        self.classifier = train_classifier(images, labels, 10, steps=steps)
        self.count = min(len(dataset) // 2, 100 if quick else 1000)
        features = self.classifier(images[: 2 * self.count])[1]
        self.real = features[: self.count], features[self.count :]
        self.halves = frechet_distance(*self.real)

    def __call__(self, samples: Tensor) -> float:
        """Samples (``count``, 1, H, W) in [-1, 1]; the mean distance to either half."""
        features = self.classifier(to_uint8(samples))[1]
        return float(np.mean([frechet_distance(features, half) for half in self.real]))


# -- a network and a loop that trains it ----------------------------------------------------------


class TinyMLP(nn.Module):
    """A residual MLP: x (N, C, ...) of a fixed shape, t (N,) -> (N, C·out_factor, ...).

    t, whatever its unit, is divided by ``t_max`` and enters every block as sines and cosines. The
    input, times a learned function of t, is added to the output: eps and v resemble it at a high
    noise level, x0 at a low one. 8×8 images are points like any others.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        t_max: float,
        width: int = 96,
        blocks: int = 3,
        out_factor: int = 1,
    ) -> None:
        super().__init__()
        self.t_max = t_max
        self.out_shape = (shape[0] * out_factor, *shape[1:])
        self.frequencies = math.pi * 2.0 ** torch.arange(8)
        self.inlet = nn.Linear(math.prod(shape), width)
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.skip = nn.Linear(width, out_factor)
        self.outlet = nn.Linear(width, math.prod(self.out_shape))
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = (t.float() / self.t_max)[:, None] * self.frequencies
        time = self.time(torch.cat([phase.cos(), phase.sin()], 1))
        h = self.inlet(x.flatten(1))
        for block in self.blocks:
            h = h + block(torch.cat([h, time], 1))
        skip = self.skip(time)[:, :, None] * x.flatten(1)[:, None]  # (N, out_factor, C·…)
        return (self.outlet(nn.functional.silu(h)) + skip.flatten(1)).view(-1, *self.out_shape)


def train(
    model: nn.Module,
    process,
    draw: Draw,
    steps: int,
    *,
    batch: int = 256,
    levels: range | None = None,
    lr: float = 2e-3,
    ema: float = 0.995,
    seed: int = 0,
) -> nn.Module:
    """Adam with a linear decay to zero on the process's own loss; answers the averaged weights.

    Timesteps are uniform over ``levels`` (all of them).
    """
    levels = levels or range(process.num_timesteps)
    generator = torch.Generator().manual_seed(seed)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - k / steps)
        loss = batch_loss(model, process, draw, batch, levels, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate = min(ema, (k + 1) / (k + 10))  # a short memory at first: the start is forgotten
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - rate)
    return averaged


def batch_loss(
    model: nn.Module, process, draw: Draw, batch: int, levels: range, generator: torch.Generator
) -> Tensor:
    """The process's own loss of ``batch`` points, each at a level and with a noise of its own."""
    x_start = draw(batch, generator)
    t = torch.randint(levels.start, levels.stop, (batch,), generator=generator)
    noise = torch.randn(x_start.shape, generator=generator)
    return process.training_losses(model, x_start, t, noise=noise)["loss"].mean()


class Untied(nn.Module):
    """Each network serves a run of neighbouring noise levels; a batch holds one level only."""

    def __init__(self, networks: Sequence[nn.Module], levels: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.levels = levels

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.networks[int(t[0]) * len(self.networks) // self.levels](x, t)


def train_untied(
    make: Callable[[], nn.Module],
    process,
    draw: Draw,
    groups: int,
    budget: int,
    *,
    batch: int,
) -> Untied:
    """``groups`` networks of one architecture, each with its share of levels and of the budget."""
    share = process.num_timesteps // groups
    networks = [
        train(
            make(),
            process,
            draw,
            max(budget // groups, 1),
            batch=batch,
            levels=range(k * share, (k + 1) * share),
            seed=k,
        )
        for k in range(groups)
    ]
    return Untied(networks, process.num_timesteps)


def batch_gradients(
    network: nn.Module,
    process,
    draw: Draw,
    batches: int,
    *,
    batch: int,
    levels: range,
    seed: int = 0,
) -> Tensor:
    """(batches, parameters): what :func:`train` would step along, at weights that stay.

    One seed means the same data, timesteps and noise, whatever ``process`` makes of them.
    """
    parameters = list(network.requires_grad_(True).parameters())
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for _ in range(batches):
        loss = batch_loss(network, process, draw, batch, levels, generator)
        pieces = torch.autograd.grad(loss, parameters)
        gradients.append(torch.cat([piece.flatten() for piece in pieces]))
    return torch.stack(gradients)


# -- distances ------------------------------------------------------------------------------------


def wasserstein_1d(a: Tensor, b: Tensor) -> float:
    """Wasserstein-1 between two sets of n numbers each: the mean distance of sorted neighbours."""
    return (a.flatten().sort().values - b.flatten().sort().values).abs().mean().item()


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Mean Wasserstein-1 of the projections on ``directions`` evenly spread angles; (n, 2) each."""
    angles = torch.arange(directions) * (math.pi / directions)
    axes = torch.stack([angles.cos(), angles.sin()])
    return ((a @ axes).sort(0).values - (b @ axes).sort(0).values).abs().mean().item()


def grid_kl(samples: Tensor, mixture: GaussianMixture, limit: float, bins: int) -> float:
    """KL(true || samples) in nats over a grid on [-limit, limit]^D; samples (n, D).

    The samples' histogram has half a count added to every cell, so that an empty cell costs a
    finite amount; the true cell probabilities are the density at the cell's centre, normalised.
    """
    dims = samples.shape[1]
    edges = np.linspace(-limit, limit, bins + 1)
    centres = torch.from_numpy((edges[1:] + edges[:-1]) / 2)
    cells = torch.cartesian_prod(*[centres] * dims).reshape(-1, dims)
    true = mixture.log_density(cells).softmax(0).numpy()
    counts = np.histogramdd(samples.numpy(), [edges] * dims)[0].ravel() + 0.5
    found = counts / counts.sum()
    return float(np.sum(true * (np.log(np.maximum(true, 1e-300)) - np.log(found))))


# -- output ---------------------------------------------------------------------------------------


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Numbers right-aligned, text left-aligned; floats with four significant digits."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    print(f"\n{title}")
    for line in [list(header), ["-" * width for width in widths], *cells]:
        first, *rest = [
            text.ljust(w) if i == 0 else text.rjust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join([first, *rest]).rstrip())


def figure(columns: int, *, rows: int = 1, width: float = 4.6, height: float = 3.8):
    """(figure, axes) of matplotlib, drawn without a display."""
    require("matplotlib", "demo").use("Agg")
    pyplot = require("matplotlib.pyplot", "demo")
    return pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )


def show_steps(ax, steps: Sequence[int]) -> None:
    """A logarithmic x axis that names just these numbers of steps."""
    ax.set_xscale("log")
    ax.set_xticks(steps, [str(s) for s in steps])
    ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def show_density(ax, mixture: GaussianMixture) -> None:
    """A 1-D mixture's density on [-1, 1], to show samples against."""
    x = torch.linspace(-1, 1, 500)[:, None]
    ax.fill_between(x[:, 0], mixture.log_density(x).exp(), color="0.8", label="true density")


def show_samples(ax, samples: Tensor, *, bins: int = 80, **style) -> None:
    """Their histogram on [-1, 1], as an outline."""
    options = {"range": (-1, 1), "density": True, "histtype": "step"}
    ax.hist(samples.flatten().numpy(), bins=bins, **options, **style)


def save_plot(fig, out: Path) -> None:
    path = out / "plot.png"
    fig.savefig(path, dpi=110)
    print(f"\nplot: {path}")


def show_images(ax, rows: Sequence[tuple[str, Tensor]], columns: int, lines: int) -> None:
    """One block of ``lines`` × ``columns`` pictures per (name, images (N, 1, H, W) in [-1, 1])."""
    blocks = []
    for _, images in rows:
        tiles = nn.functional.pad(images[: lines * columns, 0], (1, 1, 1, 1), value=-0.4)
        height, width = tiles.shape[1:]
        tiles = tiles.view(lines, columns, height, width).transpose(1, 2)
        blocks.append(tiles.reshape(lines * height, columns * width))
        blocks.append(torch.ones(3, columns * width))
    ax.imshow(torch.cat(blocks[:-1]), cmap="gray", vmin=-1, vmax=1)
    block = len(blocks[0]) + 3
    ax.set_yticks(
        [(k + 0.5) * block - 2 for k in range(len(rows))],
        [name for name, _ in rows],
        rotation=90,
        va="center",
    )
    ax.set_xticks([])
