"""The count of operations: the published figures, and the fused operations beside plain ones."""

import pytest
import torch

import fastdiff
from fastdiff.models import presets
from fastdiff.models.flops import flops, unet_flops

# 10⁹ multiply-accumulates per forward pass, as printed.
PUBLISHED = {
    "iddpm-cifar10": "8.4",
    "ddpm-cifar10": "6.2",
    "ddpm-256": "249",
    "iddpm-imagenet64": "39.7",
    "iddpm-imagenet64-cond": "89",
    "iddpm-lsun256": "249",
    "adm-64": "110",
}
SMALL = {**presets.get("digits").model, "model_channels": 64}


@pytest.mark.seconds
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_take_what_is_published_to_the_printed_precision(name):
    printed = PUBLISHED[name]
    decimals = len(printed.partition(".")[2])
    model = presets.get(name).model
    assert f"{unet_flops(model, model['image_size']) / 2e9:.{decimals}f}" == printed


@pytest.mark.seconds
def test_the_kernels_count_as_plain_operations_do():
    model = fastdiff.UNet(**SMALL)
    x, t = torch.randn(2, 1, 8, 8), torch.zeros(2)

    def training():
        model(x, t).sum().backward()

    with fastdiff.backend("reference"):
        assert flops(training) == 2 * unet_flops(SMALL, 8, training=True)
    with fastdiff.backend("native"):
        scores = flops(training) - 2 * unet_flops(SMALL, 8, training=True)
    # The native attention computes the scores twice rather than keep them: 2·N·C·T² in each of 4.
    assert scores == 4 * 2 * 2 * 128 * 16**2
    with torch.no_grad(), fastdiff.backend("native"):
        assert flops(lambda: model(x, t)) == 2 * unet_flops(SMALL, 8)


def test_attention_by_its_formula():
    n, heads, width, tokens = 2, 4, 32, 16
    qkv = torch.randn(n, 3 * width, tokens, requires_grad=True)
    products = 2 * n * width * tokens**2  # operations of one
    with fastdiff.backend("native"):
        assert flops(lambda: fastdiff.ops.attention(qkv.detach(), heads)) == 2 * products
        out = fastdiff.ops.attention(qkv, heads)
        assert flops(lambda: out.sum().backward()) == 5 * products
