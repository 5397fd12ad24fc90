"""The shapes that the published U-Nets give the operations, and how often in one forward.

Counted over the presets by tests/benchmarks/test_benchmark_shapes.py, so the table cannot drift
from the models. Sizes are per image; the batch is the benchmark's.
"""

from dataclasses import dataclass

# iddpm-lsun256 has the norms and the attention of ddpm-256.
MODELS = (
    "ddpm-cifar10",
    "iddpm-cifar10",
    "iddpm-imagenet64",
    "ddpm-256",
    "iddpm-imagenet64-cond",
    "adm-64",
)
# What --shapes names. "all" are the networks of 128 channels, whose norms contain ddpm-cifar10's;
# "presets" adds those of 192 channels.
MODELS_OF_CHOICE = {"quick": MODELS[:4], "all": MODELS[:4], "presets": MODELS}

GROUPS = 32


@dataclass(frozen=True)
class Norm:
    """One GroupNorm or RMS norm: "silu" (and SiLU), "film" (FiLM and SiLU) or "norm" (alone)."""

    channels: int
    size: int  # of the square image
    form: str
    count: dict[str, int]  # model -> calls in one forward

    def __str__(self) -> str:
        return f"{self.channels}@{self.size}"


@dataclass(frozen=True)
class Attention:
    heads: int
    tokens: int
    head_dim: int
    count: dict[str, int]

    def __str__(self) -> str:
        return f"{self.heads}x{self.tokens}x{self.head_dim}"

    @property
    def order(self) -> str:
        return "qkv_first" if "adm-64" in self.count else "heads_first"


@dataclass(frozen=True)
class Image:
    """What q_sample and posterior_step see: one call in one step, whatever the network."""

    channels: int
    size: int

    def __str__(self) -> str:
        return f"{self.channels}@{self.size}"


# channels, size, form, calls in one forward of each of MODELS
_NORMS = (
    (256, 4, "film", (0, 9, 0, 0, 0, 0)),
    (256, 4, "norm", (1, 1, 0, 0, 0, 0)),
    (256, 4, "silu", (11, 5, 0, 0, 0, 0)),
    (512, 4, "silu", (3, 4, 0, 0, 0, 0)),
    (256, 8, "film", (0, 7, 0, 0, 0, 0)),
    (256, 8, "norm", (0, 7, 0, 0, 0, 0)),
    (256, 8, "silu", (7, 3, 0, 0, 0, 0)),
    (384, 8, "silu", (0, 0, 1, 0, 0, 0)),
    (512, 8, "film", (0, 0, 9, 0, 0, 0)),
    (512, 8, "norm", (0, 0, 8, 1, 0, 0)),
    (512, 8, "silu", (3, 4, 4, 11, 0, 0)),
    (576, 8, "film", (0, 0, 0, 0, 0, 1)),
    (576, 8, "silu", (0, 0, 0, 0, 1, 1)),
    (768, 8, "film", (0, 0, 0, 0, 9, 9)),
    (768, 8, "norm", (0, 0, 0, 0, 8, 8)),
    (768, 8, "silu", (0, 0, 0, 0, 4, 5)),
    (896, 8, "silu", (0, 0, 1, 0, 0, 0)),
    (1024, 8, "silu", (0, 0, 3, 3, 0, 0)),
    (1344, 8, "silu", (0, 0, 0, 0, 1, 1)),
    (1536, 8, "silu", (0, 0, 0, 0, 3, 3)),
    (128, 16, "silu", (1, 1, 0, 0, 0, 0)),
    (256, 16, "film", (0, 7, 0, 0, 0, 0)),
    (256, 16, "norm", (5, 7, 0, 0, 0, 0)),
    (256, 16, "silu", (6, 2, 1, 1, 0, 0)),
    (384, 16, "film", (0, 0, 7, 0, 0, 1)),
    (384, 16, "norm", (0, 0, 7, 0, 0, 0)),
    (384, 16, "silu", (1, 1, 2, 0, 1, 1)),
    (512, 16, "norm", (0, 0, 0, 5, 0, 0)),
    (512, 16, "silu", (2, 3, 0, 6, 0, 0)),
    (576, 16, "film", (0, 0, 0, 0, 7, 7)),
    (576, 16, "norm", (0, 0, 0, 0, 7, 7)),
    (576, 16, "silu", (0, 0, 0, 0, 2, 4)),
    (640, 16, "silu", (0, 0, 1, 0, 0, 0)),
    (768, 16, "film", (0, 0, 0, 0, 0, 1)),
    (768, 16, "silu", (0, 0, 2, 1, 0, 0)),
    (896, 16, "silu", (0, 0, 1, 0, 0, 0)),
    (960, 16, "silu", (0, 0, 0, 0, 1, 1)),
    (1024, 16, "silu", (0, 0, 0, 2, 0, 0)),
    (1152, 16, "silu", (0, 0, 0, 0, 2, 2)),
    (1344, 16, "silu", (0, 0, 0, 0, 1, 1)),
    (128, 32, "film", (0, 7, 0, 0, 0, 0)),
    (128, 32, "silu", (8, 4, 1, 0, 0, 0)),
    (192, 32, "film", (0, 0, 0, 0, 0, 1)),
    (192, 32, "silu", (0, 0, 0, 0, 1, 1)),
    (256, 32, "film", (0, 0, 7, 0, 0, 0)),
    (256, 32, "silu", (2, 3, 2, 7, 0, 0)),
    (384, 32, "film", (0, 0, 0, 0, 7, 7)),
    (384, 32, "norm", (0, 0, 0, 0, 0, 7)),
    (384, 32, "silu", (1, 1, 1, 0, 2, 4)),
    (512, 32, "silu", (0, 0, 2, 2, 0, 0)),
    (576, 32, "film", (0, 0, 0, 0, 0, 1)),
    (576, 32, "silu", (0, 0, 0, 0, 1, 1)),
    (640, 32, "silu", (0, 0, 1, 0, 0, 0)),
    (768, 32, "silu", (0, 0, 0, 1, 2, 2)),
    (960, 32, "silu", (0, 0, 0, 0, 1, 1)),
    (128, 64, "film", (0, 0, 7, 0, 0, 0)),
    (128, 64, "silu", (0, 0, 4, 1, 0, 0)),
    (192, 64, "film", (0, 0, 0, 0, 7, 7)),
    (192, 64, "silu", (0, 0, 0, 0, 4, 5)),
    (256, 64, "silu", (0, 0, 3, 6, 0, 0)),
    (384, 64, "film", (0, 0, 0, 0, 0, 1)),
    (384, 64, "silu", (0, 0, 1, 1, 3, 3)),
    (512, 64, "silu", (0, 0, 0, 2, 0, 0)),
    (576, 64, "silu", (0, 0, 0, 0, 1, 1)),
    (128, 128, "silu", (0, 0, 0, 7, 0, 0)),
    (256, 128, "silu", (0, 0, 0, 2, 0, 0)),
    (384, 128, "silu", (0, 0, 0, 1, 0, 0)),
    (128, 256, "silu", (0, 0, 0, 8, 0, 0)),
    (256, 256, "silu", (0, 0, 0, 3, 0, 0)),
)

# heads, tokens, head_dim, calls in one forward of each of MODELS
_ATTENTION = (
    (1, 16, 256, (1, 0, 0, 0, 0, 0)),
    (1, 64, 512, (0, 0, 0, 1, 0, 0)),
    (1, 256, 256, (5, 0, 0, 0, 0, 0)),
    (1, 256, 512, (0, 0, 0, 5, 0, 0)),
    (4, 16, 64, (0, 1, 0, 0, 0, 0)),
    (4, 64, 64, (0, 7, 0, 0, 0, 0)),
    (4, 64, 128, (0, 0, 8, 0, 0, 0)),
    (4, 64, 192, (0, 0, 0, 0, 8, 0)),
    (4, 256, 64, (0, 7, 0, 0, 0, 0)),
    (4, 256, 96, (0, 0, 7, 0, 0, 0)),
    (4, 256, 144, (0, 0, 0, 0, 7, 0)),
    (6, 1024, 64, (0, 0, 0, 0, 0, 7)),
    (9, 256, 64, (0, 0, 0, 0, 0, 7)),
    (12, 64, 64, (0, 0, 0, 0, 0, 8)),
)

# channels and size of denoising-diffusion-pytorch's Unet(dim=64, dim_mults=(1, 2, 4, 8)) on 64²
# images; each occurs in every form.
_RMS_NORMS = ((64, 64), (64, 32), (128, 32), (128, 16), (256, 16), (256, 8), (512, 8))

IMAGES = tuple(Image(3, size) for size in (32, 64, 256))


def _count(counts: tuple[int, ...]) -> dict[str, int]:
    return {model: n for model, n in zip(MODELS, counts, strict=True) if n}


NORMS = tuple(Norm(*row[:3], _count(row[3])) for row in _NORMS)
RMS_NORMS = tuple(Norm(*at, form, {}) for at in _RMS_NORMS for form in ("silu", "film", "norm"))
ATTENTION = tuple(Attention(*row[:3], _count(row[3])) for row in _ATTENTION)

# --shapes quick, and the shapes that meet torch.compile by default (each compilation takes ten
# seconds on a CPU): one of each kind, from the smallest to the largest.
QUICK_NORMS = {(256, 8, "norm"), (512, 4, "silu"), (128, 32, "film"), (384, 64, "silu")}
QUICK_NORMS |= {(896, 16, "silu"), (128, 128, "silu")}
COMPILED_NORMS = {(128, 32, "film"), (896, 16, "silu")}
QUICK_RMS_NORMS = {(64, 64, "norm"), (64, 32, "film"), (256, 16, "silu")}
QUICK_ATTENTION = {(1, 256, 256), (1, 256, 512), (4, 64, 64), (4, 256, 96), (6, 1024, 64)}
COMPILED_ATTENTION = {(1, 256, 512)}
QUICK_IMAGES = {32, 256}
COMPILED_IMAGES = {64}


def norms(choice: str) -> list[Norm]:
    """The norms that ``--shapes choice`` names."""
    models = set(MODELS_OF_CHOICE[choice])
    chosen = [norm for norm in NORMS if models & norm.count.keys()]
    return [n for n in chosen if choice != "quick" or key(n) in QUICK_NORMS]


def rms_norms(choice: str) -> list[Norm]:
    return [n for n in RMS_NORMS if choice != "quick" or key(n) in QUICK_RMS_NORMS]


def attention(choice: str) -> list[Attention]:
    """The attentions that ``--shapes choice`` names: all models' unless it is "quick"."""
    return [a for a in ATTENTION if choice != "quick" or key(a) in QUICK_ATTENTION]


def images(choice: str) -> list[Image]:
    return [image for image in IMAGES if choice != "quick" or image.size in QUICK_IMAGES]


def key(shape: Norm | Attention) -> tuple:
    """The shape without its counts."""
    return tuple(vars(shape).values())[:3]


def meets_compile(shape: Norm | Attention | Image) -> bool:
    """Whether torch.compile is among the shape's peers by default."""
    if isinstance(shape, Image):
        return shape.size in COMPILED_IMAGES
    return key(shape) in (COMPILED_NORMS if isinstance(shape, Norm) else COMPILED_ATTENTION)
