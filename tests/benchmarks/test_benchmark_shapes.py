"""The benchmarks' shapes are those the networks really meet."""

import collections

import pytest
import torch

import fastdiff
from fastdiff.models import blocks
from harness import shapes


@pytest.mark.parametrize("model", shapes.MODELS)
def test_the_table_counts_what_the_network_calls(model, monkeypatch):
    norms: collections.Counter = collections.Counter()
    attention: collections.Counter = collections.Counter()

    def norm(x, num_groups, *_, scale=None, shift=None, activation="silu", **__):
        assert num_groups == shapes.GROUPS
        form = "film" if scale is not None else activation or "norm"
        norms[x.shape[1], x.shape[2], form] += 1
        return x.clone()

    def attend(qkv, num_heads, *, order="heads_first"):
        n, width, tokens = qkv.shape
        attention[num_heads, tokens, width // 3 // num_heads, order] += 1
        return qkv.new_empty(n, width // 3, tokens)

    monkeypatch.setattr(blocks, "group_norm_silu", norm)
    monkeypatch.setattr(blocks, "attention", attend)
    with torch.device("meta"):
        network = fastdiff.UNet.from_preset(model)
        size = network.image_size
        y = torch.zeros(1, dtype=torch.long) if network.num_classes else None
        network(torch.empty(1, 3, size, size), torch.empty(1), y)

    assert norms == {shapes.key(s): s.count[model] for s in shapes.NORMS if model in s.count}
    assert attention == {
        (*shapes.key(s), s.order): s.count[model] for s in shapes.ATTENTION if model in s.count
    }


def test_the_choices_name_shapes_that_exist():
    norms, attention = map(shapes.key, shapes.NORMS), map(shapes.key, shapes.ATTENTION)
    assert set(norms) >= shapes.QUICK_NORMS | shapes.COMPILED_NORMS
    assert set(attention) >= shapes.QUICK_ATTENTION | shapes.COMPILED_ATTENTION
    assert len(shapes.norms("quick")) == len(shapes.QUICK_NORMS)
    assert len(shapes.norms("quick")) < len(shapes.norms("all")) < len(shapes.norms("presets"))
