"""Published configurations: parameter counts to the printed precision, and every part usable."""

import pytest
import torch

from fastdiff import EncoderUNet, UNet
from fastdiff.errors import InputError
from fastdiff.models import presets
from fastdiff.models.encoder import Encoder
from fastdiff.process.gaussian import create_diffusion
from fastdiff.training.config import TrainConfig

PRINTED = {
    "ddpm-cifar10": "35.75",
    "ddpm-256": "113.7",
    "ddpm-lsun256": "113.7",
    "iddpm-cifar10": "52.5",
    "iddpm-imagenet64": "121",
    "iddpm-imagenet64-cond": "273",
    "iddpm-lsun256": "113.7",
    "adm-64": "296",
    "adm-64-256": "312",
    "adm-128-512": "309",
    # The paper says "about 30M, 68M, 120M, 270M".
    "iddpm-imagenet64-64": "30",
    "iddpm-imagenet64-96": "68",
    "iddpm-imagenet64-128": "121",
    "iddpm-imagenet64-192": "272",
    "classifier-64": "65",
    "classifier-128": "43",
    "classifier-256": "54",
    "classifier-512": "54",
}
# (heads, tokens, head_dim): count, in one forward pass at the preset's image size.
ATTENTION = {
    "ddpm-cifar10": {(1, 256, 256): 5, (1, 16, 256): 1},
    "ddpm-256": {(1, 256, 512): 5, (1, 64, 512): 1},
    "iddpm-cifar10": {(4, 256, 64): 7, (4, 64, 64): 7, (4, 16, 64): 1},
    "iddpm-imagenet64": {(4, 256, 96): 7, (4, 64, 128): 8},
    "iddpm-imagenet64-cond": {(4, 256, 144): 7, (4, 64, 192): 8},
    "iddpm-lsun256": {(1, 256, 512): 5, (1, 64, 512): 1},
    "adm-64": {(6, 1024, 64): 7, (9, 256, 64): 7, (12, 64, 64): 8},
    "adm-64-256": {(4, 1024, 96): 5, (4, 256, 192): 5, (4, 64, 192): 6},
}


def on_meta(name: str) -> Encoder:
    kind = {"UNet": UNet, "EncoderUNet": EncoderUNet}[presets.get(name).network]
    with torch.device("meta"):
        return kind.from_preset(name)


@pytest.mark.parametrize("name", PRINTED)
def test_parameter_count_to_the_printed_precision(name):
    printed = PRINTED[name]
    decimals = len(printed.partition(".")[2])
    millions = sum(p.numel() for p in on_meta(name).parameters()) / 1e6
    assert f"{millions:.{decimals}f}" == printed
    assert presets.get(name).params == printed


@pytest.mark.parametrize("name", ["digits", "classifier-digits"])
def test_digits_presets_are_small(name):
    count = sum(p.numel() for p in on_meta(name).parameters())
    assert 0.3e6 < count < 1e6 and f"{count / 1e6:.1f}" == presets.get(name).params


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_shapes_of_one_forward_pass(name, monkeypatch):
    seen: dict[tuple[int, int, int], int] = {}

    def note(qkv, num_heads, *, order):
        n, rows, tokens = qkv.shape
        shape = (num_heads, tokens, rows // (3 * num_heads))
        seen[shape] = seen.get(shape, 0) + 1
        assert order == ("qkv_first" if name == "adm-64" else "heads_first")
        return qkv[:, : rows // 3]

    monkeypatch.setattr("fastdiff.models.blocks.attention", note)
    model = on_meta(name)
    size = presets.get(name).model["image_size"]
    with torch.device("meta"):
        y = None if model.num_classes is None else torch.empty(1, dtype=torch.int64)
        small = torch.empty(1, 3, size // 4, size // 4) if model.super_res else None
        model(torch.empty(1, 3, size, size), torch.empty(1), y, small)
    assert seen == ATTENTION[name]


@pytest.mark.parametrize("name", presets.names())
def test_network_diffusion_and_training_fit_each_other(name):
    preset = presets.get(name)
    diffusion = create_diffusion(**preset.diffusion)
    learned = diffusion.var_type in ("learned", "learned_range")
    channels, config = preset.model["in_channels"], TrainConfig(**preset.train)
    assert config.lr == preset.train["lr"]
    if preset.network == "UNet":
        assert preset.model["out_channels"] == (2 * channels if learned else channels)
        assert config.ema
    else:
        assert not learned and preset.model["pool"] == "attention"


def test_published_hyperparameters():
    """Figures of the configuration table."""
    table = {
        "ddpm-cifar10": (2e-4, 128, 800_000, 0.1, 1000),
        "iddpm-cifar10": (1e-4, 128, 500_000, 0.3, 4000),
        "iddpm-imagenet64": (1e-4, 128, 1_500_000, 0.0, 4000),
        "iddpm-imagenet64-cond": (3e-4, 2048, 250_000, 0.0, 4000),
        "adm-64": (3e-4, 2048, 540_000, 0.1, 1000),
        "adm-64-256": (1e-4, 256, 500_000, 0.0, 1000),
    }
    for name, expected in table.items():
        preset = presets.get(name)
        train = preset.train
        assert expected == (
            train["lr"],
            train["batch_size"],
            train["steps"],
            preset.model.get("dropout", 0.0),
            preset.diffusion["steps"],
        )
    assert create_diffusion(**presets.get("ddpm-cifar10").diffusion).var_type == "fixed_large"
    assert create_diffusion(**presets.get("ddpm-256").diffusion).var_type == "fixed_small"
    rates = [presets.get(f"iddpm-imagenet64-{c}").train["lr"] for c in (64, 96, 128, 192)]
    assert rates == pytest.approx([1.414e-4, 1.155e-4, 1e-4, 8.165e-5], rel=1e-3)


def test_published_classifiers():
    """The flags that train and sample with them, and create_classifier's defaults."""
    rows = {name: presets.get(f"classifier-{name}") for name in (64, 128, 256, 512)}
    assert [row.model["num_res_blocks"] for row in rows.values()] == [4, 2, 2, 2]
    assert rows[64].model["attention_resolutions"] == (2, 4, 8)
    assert rows[512].model["channel_mult"] == (0.5, 1, 1, 2, 2, 4, 4)
    schedules = [row.diffusion["noise_schedule"] for row in rows.values()]
    assert schedules == ["cosine", "linear", "linear", "linear"]
    train = rows[128].train
    found = train["lr"], train["batch_size"], train["steps"], train["weight_decay"]
    assert found == (3e-4, 256, 300_000, 0.05) and train["lr_schedule"] == "linear"


def test_overrides_win():
    assert UNet.from_preset("digits", num_classes=10).num_classes == 10


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="no preset named 'ddpm'; there are ddpm-cifar10, "):
        UNet.from_preset("ddpm")
