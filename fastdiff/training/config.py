"""A training run's settings: one dataclass, which gives the command line its flags and help."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fastdiff.errors import InputError
from fastdiff.evaluation.features import NETWORKS
from fastdiff.models.power_function import WIDEST

LR_SCHEDULES = ("constant", "linear", "cosine")
TIMESTEP_SAMPLERS = ("uniform", "loss-second-moment")
DTYPES = ("float32", "bfloat16", "float16")
GRAPHS = ("off", "on", "auto")


def setting(default: Any, help: str, *, choices: tuple[str, ...] = (), fixed: bool = False) -> Any:
    """A field with its help text; ``fixed`` ones may not change when a run is resumed."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "fixed": fixed}
    )


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. Raises InputError when a value makes no sense.

    Intervals (``*_every``) count optimizer steps; 0 turns that activity off. Fields marked fixed
    decide which batch follows which, so a resumed run keeps them.
    """

    batch_size: int = setting(64, "images per optimizer step", fixed=True)
    microbatch: int = setting(
        0, "images per forward pass; gradients are averaged over the batch (0: the whole batch)"
    )
    steps: int = setting(10_000, "optimizer steps in all; a resumed run continues up to this")
    lr: float = setting(1e-4, "peak learning rate of AdamW")
    lr_schedule: str = setting("constant", "learning rate after the warm-up", choices=LR_SCHEDULES)
    warmup: int = setting(0, "steps over which the learning rate rises linearly")
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay")
    betas: tuple[float, ...] = setting((0.9, 0.999), "AdamW's betas, separated by a comma")
    grad_clip: float = setting(1.0, "largest gradient norm (0: no clipping)")
    ema: tuple[float, ...] = setting(
        (0.9999,), "decay rates of the weight averages, separated by commas", fixed=True
    )
    ema_warmup: bool = setting(
        True,
        "let each rate grow as (1 + step) / (10 + step) up to its value, so that a short run's "
        "averages forget the untrained weights; off: constant rates, as published",
        fixed=True,
    )
    ema_sigma_rel: tuple[float, ...] = setting(
        (),
        "widths of power-function averages beside them, as shares of the steps so far, separated "
        "by commas (0.05,0.1, as published)",
        fixed=True,
    )
    ema_snapshot_every: int = setting(
        0,
        "steps between snapshots of the power-function averages, all kept, of which fastdiff "
        "average makes one of any width (0: none)",
    )
    label_dropout: float = setting(
        0.0, "probability that a label is hidden, for classifier-free guidance"
    )
    offset_noise: float = setting(
        0.0, "noise added to all pixels of a channel alike, usually 0.1 (0: none)"
    )
    immiscible: bool = setting(
        False,
        "give each image the nearest of the batch's noises, among those of a process (needs SciPy)",
    )
    self_condition: str = setting(
        "",
        "the network's argument by which it is given its own estimate of x_0, in half of the steps "
        "(none: no such)",
        fixed=True,
    )
    upsample_from: int = setting(
        0,
        "train a super-resolution network: the shorter side in pixels of the small images that it "
        "is given, which are made of the data's (0: it is none)",
        fixed=True,
    )
    cond_noise: float = setting(
        0.0,
        "of upsample_from: noise the small images to levels up to this, at most 1, of which the "
        "network is told, so that it can follow another network in a cascade (0: none)",
        fixed=True,
    )
    cond_blur: float = setting(
        0.0, "of upsample_from: probability that a small image is blurred, usually 0.5"
    )
    timestep_sampler: str = setting(
        "uniform", "how timesteps are drawn", choices=TIMESTEP_SAMPLERS, fixed=True
    )
    dtype: str = setting(
        "float32",
        "of the network's arithmetic (autocast; in float16 the loss is scaled, and a step whose "
        "gradients overflow is left out)",
        choices=DTYPES,
    )
    seed: int = setting(0, "of the weights, data order, timesteps and noise", fixed=True)
    flip: bool = setting(False, "mirror images at random", fixed=True)
    log_every: int = setting(50, "steps between lines in metrics.jsonl")
    save_every: int = setting(1000, "steps between checkpoints (0: only at the end)")
    async_save: bool = setting(
        False,
        "write checkpoints while the training goes on, from a copy in the CPU's memory: for "
        "networks whose writing takes long, on a GPU",
    )
    keep: int = setting(3, "checkpoints kept, the newest ones (0: all)")
    sample_every: int = setting(0, "steps between sample grids (0: none)")
    sample_count: int = setting(16, "images in a sample grid")
    sample_steps: int = setting(50, "sampling steps of a sample grid")
    fid_every: int = setting(
        0,
        "steps between Fréchet distances of samples to the images, with the shares of copies and "
        "of classes covered beside them; the best weights are kept in best/ (0: none)",
    )
    fid_samples: int = setting(1000, "samples of a Fréchet distance")
    fid_features: str = setting(
        "efficientnet-lite0", "the network whose features it compares", choices=tuple(NETWORKS)
    )
    fid_weights: str = setting(
        "", "the file of Inception's weights, the folder of DINOv2's or CLIP's"
    )
    nll_every: int = setting(0, "steps between measurements of bits/dim (0: none)")
    nll_images: int = setting(16, "images the bits/dim are measured on")
    nll_steps: int = setting(
        0, "strided steps of the measured process (0: all; fewer give a looser bound)"
    )
    workers: int = setting(0, "processes that prepare batches ahead (0: none)")
    compile: bool = setting(False, "run the network through torch.compile")
    graph: str = setting(
        "off",
        "take the steps as CUDA graphs, on one GPU; auto: where that measures faster at the start",
        choices=GRAPHS,
    )
    shard: bool = setting(
        False, "spread weights, gradients and optimizer over the processes (FSDP2), for memory"
    )
    rank_minutes: float = setting(
        30.0, "how long a process waits for another of the run before it gives up"
    )
    max_minutes: float = setting(0.0, "stop and save after this wall-clock time (0: no limit)")
    tensorboard: bool = setting(True, "write TensorBoard event files")
    wandb: str = setting("", "project of Weights & Biases to log to as well (none: not)")

    def __post_init__(self) -> None:
        for name in ("betas", "ema", "ema_sigma_rel"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        for name in ("batch_size", "steps", "log_every", "sample_count", "sample_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("fid_samples", self.fid_samples >= 2, "at least 2")
        self._require("nll_images", self.nll_images >= 2, "at least 2, for a standard error")
        for name in _COUNTS:
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if choices:
                self._require(
                    field.name, getattr(self, field.name) in choices, "one of " + ", ".join(choices)
                )
        self._require("lr", math.isfinite(self.lr) and self.lr > 0, "a positive number")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        self._require("grad_clip", 0 <= self.grad_clip < math.inf, "0 or more")
        self._require("rank_minutes", 0 < self.rank_minutes < math.inf, "a positive number")
        self._require("max_minutes", 0 <= self.max_minutes < math.inf, "0 or more")
        self._require("offset_noise", 0 <= self.offset_noise < math.inf, "0 or more")
        self._require("label_dropout", 0 <= self.label_dropout < 1, "in [0, 1)")
        for name in ("cond_noise", "cond_blur"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
            least = 2 if name == "cond_blur" else 1  # pixels: a kernel reaches one to each side
            possible = not getattr(self, name) or self.upsample_from >= least
            self._require(name, possible, f"0 where upsample_from is below {least}")
        self._require(
            "betas",
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "two numbers in [0, 1)",
        )
        self._require("ema", all(0 < r < 1 for r in self.ema), "rates between 0 and 1")
        self._require("ema", len(set(self.ema)) == len(self.ema), "rates that differ")
        self._require(
            "ema_sigma_rel",
            all(0 < s < WIDEST for s in self.ema_sigma_rel),
            "widths between 0 and 0.288",
        )
        self._require(
            "ema_sigma_rel",
            len(set(self.ema_sigma_rel)) == len(self.ema_sigma_rel),
            "widths that differ",
        )
        self._require(
            "ema_snapshot_every",
            not self.ema_snapshot_every or len(self.ema_sigma_rel) > 0,
            "0 where ema_sigma_rel is none, as there is nothing to store",
        )

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise InputError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def facts(self) -> dict[str, Any]:
        """What a network that was trained so has to be given: for a checkpoint's info."""
        names = ("self_condition", "upsample_from", "cond_noise")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of ``to_dict``; InputError when a name is not a setting."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"unknown training setting {unknown[0]!r}; known: {sorted(known)}")
        return cls(**values)

    def resumed_with(self, changes: dict[str, Any]) -> "TrainConfig":
        """This configuration with ``changes``; InputError when a fixed setting would differ."""
        changed = self.from_dict({**self.to_dict(), **changes})
        for field in dataclasses.fields(self):
            before, now = getattr(self, field.name), getattr(changed, field.name)
            if field.metadata["fixed"] and before != now:
                raise InputError(
                    f"{field.name} is {now!r} but the run was started with {before!r}, and it "
                    f"cannot change when a run is resumed; leave it out or start a new run"
                )
        return changed


_COUNTS = (
    "microbatch",
    "warmup",
    "seed",
    "upsample_from",
    "save_every",
    "keep",
    "sample_every",
    "fid_every",
    "nll_every",
    "nll_steps",
    "ema_snapshot_every",
    "workers",
)


def learning_rate(step: int, config: TrainConfig, peak: float) -> float:
    """The rate of the update that follows ``step`` finished ones, ``peak`` being the largest.

    A linear warm-up, then constant, linear to zero (the published anneal when there is no warm-up)
    or half a cosine to zero (Loshchilov and Hutter 2017, eq. 5), both ending at ``config.steps``.
    """
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return peak
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    if config.lr_schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
