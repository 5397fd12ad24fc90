"""The experiments of the papers, each a row: what is trained, how it is sampled, what was reported.

Flags are those of ``fastdiff train`` and ``fastdiff sample``; a preset has the rest of a training.
Figures stand under the names that ``fastdiff evaluate --metrics`` gives its scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastdiff.errors import InputError

SAMPLES = 50_000  # of which the papers report their scores


@dataclass(frozen=True)
class Sampling:
    """One way to sample a network.

    Attributes:
        name: of its folder, and in the report.
        steps: as published.
        figures: what the paper reports of it; empty where it reports nothing.
        flags: of ``fastdiff sample``, beside ``--steps``.
        passes: of the network in a step: 2 with guidance.
    """

    name: str
    steps: int
    figures: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    passes: int = 1


@dataclass(frozen=True)
class Experiment:
    """One network of a paper.

    Attributes:
        source: paper and table.
        data: what it was trained on, in words.
        preset: of the network, the process and the training.
        samplings: in the order in which they are done.
        train: flags of ``fastdiff train`` that change the preset.
        bits_per_dim: what the paper reports, None where nothing is to be measured.
        metrics: of ``fastdiff evaluate``.
        differs: how this differs from the paper at any scale.
    """

    name: str
    source: str
    data: str
    preset: str
    samplings: tuple[Sampling, ...]
    train: tuple[str, ...] = ()
    bits_per_dim: float | None = None
    metrics: tuple[str, ...] = ("fid",)
    differs: tuple[str, ...] = ()


@dataclass(frozen=True)
class OverSteps:
    """Figure 8 of Improved DDPM: the FID over the number of sampling steps, of two networks that
    are given: one with a learned variance, one with a fixed one (L_hybrid and L_simple)."""

    name: str
    source: str
    data: str
    steps: tuple[int, ...]
    samples: int
    # Name of a curve: whose network, the flags of its sampler.
    curves: Mapping[str, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class OverCompute:
    """Figure 10 of Improved DDPM: FID and bits/dim over the operations spent on training, for
    networks of several widths, each scored at shares of its iterations."""

    name: str
    source: str
    data: str
    presets: tuple[str, ...]
    iterations: int
    shares: tuple[float, ...]
    sampling: Sampling
    samples: int


AnyExperiment = Experiment | OverSteps | OverCompute


def named(name: str) -> AnyExperiment:
    """The experiment of that name. InputError where there is none."""
    try:
        return EXPERIMENTS[name]
    except KeyError:
        known = ", ".join(EXPERIMENTS)
        raise InputError(f"no experiment named {name!r}; there are {known}") from None


_DDPM, _IDDPM, _ADM = (
    "Ho et al. 2020",
    "Nichol & Dhariwal 2021",
    "Dhariwal & Nichol 2021",
)
_CIFAR = "CIFAR-10, 32x32: its 50,000 training images"
_IMAGENET = "ImageNet at 64x64, as it is distributed downsampled: 1,281,167 images"
_UNET = (
    "the U-Net is improved-diffusion's with Ho et al.'s sizes: epsilon 1e-5 in the norms, and the "
    "timestep embedding [cos, sin]",
)
_SIMPLE = ("--no-learn-sigma", "--loss", "mse")
_VLB = ("--loss", "rescaled_kl", "--timestep-sampler", "loss-second-moment")


def _lsun(kind: str, fid: float, *train: str) -> Experiment:
    return Experiment(
        name=f"ddpm-lsun-{kind}",
        source=f"{_DDPM}, table 3",
        data=f"LSUN {kind}, 256x256",
        preset="ddpm-256",
        samplings=(Sampling("1000-steps", 1000, {"fid": fid}),),
        train=train,
        differs=_UNET,
    )


def _objective(
    data: str, preset: str, name: str, bits: float, fid: float, *train: str
) -> Experiment:
    """A row of the ablation: 4000 steps, cosine schedule."""
    table = 2 if data == _CIFAR else 1
    return Experiment(
        name=f"{preset}-{name}",
        source=f"{_IDDPM}, table {table}",
        data=data,
        preset=preset,
        samplings=(Sampling("4000-steps", 4000, {"fid": fid}),),
        train=train,
        bits_per_dim=bits,
    )


_ALL: tuple[AnyExperiment, ...] = (
    Experiment(
        name="ddpm-cifar10",
        source=f"{_DDPM}, table 1 (L_simple, fixed isotropic variance)",
        data=_CIFAR,
        preset="ddpm-cifar10",
        samplings=(Sampling("1000-steps", 1000, {"fid": 3.17, "inception_score": 9.46}),),
        bits_per_dim=3.75,
        metrics=("fid", "is"),
        differs=_UNET,
    ),
    _objective(_CIFAR, "iddpm-cifar10", "simple", 3.26, 3.05, *_SIMPLE),
    _objective(_CIFAR, "iddpm-cifar10", "hybrid", 3.17, 3.19),
    _objective(_CIFAR, "iddpm-cifar10", "vlb", 2.94, 11.47, *_VLB),
    _objective(_IMAGENET, "iddpm-imagenet64", "hybrid", 3.57, 19.2),
    _objective(_IMAGENET, "iddpm-imagenet64", "vlb", 3.53, 40.1, *_VLB),
    Experiment(
        name="iddpm-imagenet64-cond",
        source=f"{_IDDPM}, section 5 (270M parameters)",
        data=f"{_IMAGENET} with their 1000 classes",
        preset="iddpm-imagenet64-cond",
        samplings=(
            Sampling("250-steps", 250, {"fid": 2.92, "precision": 0.82, "recall": 0.71}),
            Sampling("250-steps-guided", 250, {}, ("--guidance-scale", "1.5"), passes=2),
        ),
        train=("--label-dropout", "0.1"),
        metrics=("fid", "prc"),
        differs=(
            "a tenth of the labels are hidden in training, for classifier-free guidance (Ho & "
            "Salimans 2021); the paper's network saw all, and it has no guided samples",
        ),
    ),
    Experiment(
        name="adm-imagenet64",
        source=f"{_ADM}, table 5 (ADM with dropout)",
        data=f"{_IMAGENET} with their 1000 classes",
        preset="adm-64",
        samplings=(Sampling("250-steps", 250, {"fid": 2.07, "precision": 0.74, "recall": 0.63}),),
        metrics=("fid", "sfid", "prc"),
    ),
    _lsun("bedroom", 6.36),
    _lsun("church", 7.89, "--steps", "1200000"),
    _lsun("cat", 19.75, "--steps", "1800000"),
    Experiment(
        name="iddpm-lsun-bedroom",
        source=f"{_ADM}, table 5 (IDDPM)",
        data="LSUN bedroom, 256x256",
        preset="iddpm-lsun256",
        samplings=(Sampling("1000-steps", 1000, {"fid": 4.24, "precision": 0.62, "recall": 0.46}),),
        metrics=("fid", "prc"),
    ),
    OverSteps(
        name="figure-8",
        source=f"{_IDDPM}, figure 8",
        data="what the two checkpoints were trained on",
        steps=(25, 50, 100, 200, 400, 1000, 4000),
        samples=10_000,
        curves={
            "learned": ("learned", ()),
            "fixed-large": ("fixed", ()),  # sigma² = beta
            "fixed-small": ("fixed", ("--method", "ddim", "--eta", "1")),  # beta of the posterior
            "ddim": ("fixed", ("--method", "ddim")),
        },
    ),
    OverCompute(
        name="figure-10",
        source=f"{_IDDPM}, figure 10",
        data=_IMAGENET,
        presets=tuple(f"iddpm-imagenet64-{width}" for width in (64, 96, 128, 192)),
        iterations=500_000,
        shares=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 1),
        sampling=Sampling("250-steps", 250),
        samples=10_000,
    ),
)

EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}
