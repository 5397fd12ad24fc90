"""The floor of a network's call: its convolutions and matrix products, each alone and hot.

Every one of them takes its best time of the ways that PyTorch has to compute it (layouts, weights
packed for oneDNN): alone, so that caches hold its operands, and after a call that nobody times. The
sum over the network is what its call would take if nothing else cost anything and no operand came
from memory.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastdiff
from fastdiff.models.valueless import valueless
from fastdiff.ops import backends
from fastdiff.sampling.network import packing
from harness import peers
from harness.timing import normal, seconds

CPU = torch.device("cpu")
CALLS = 3  # of each way in a turn

Shape = tuple[int, ...]
Way = Callable[[], object]


@dataclass(frozen=True)
class Convolution:
    """Of images x with weights of these shapes."""

    x: Shape
    weight: Shape
    stride: Shape
    padding: Shape

    @property
    def flops(self) -> int:
        sides = zip(self.x[2:], self.weight[2:], self.stride, self.padding, strict=True)
        positions = math.prod((n + 2 * pad - k) // stride + 1 for n, k, stride, pad in sides)
        return 2 * self.x[0] * positions * math.prod(self.weight)

    def ways(self, dtype: torch.dtype) -> Iterator[Way]:
        out_channels, in_channels, *kernel = self.weight
        made = nn.Conv2d(in_channels, out_channels, kernel, self.stride, self.padding)
        packed = packing.packable(made, dtype)
        for form in (torch.contiguous_format, torch.channels_last):
            layer = copy.deepcopy(made).to(dtype, memory_format=form)
            x = normal(*self.x, dtype=dtype, device=CPU).contiguous(memory_format=form)
            yield lambda layer=layer, x=x: layer(x)
            if packed:
                own = packing.PackedConvolution(layer, dtype)
                yield lambda own=own, x=x: own(x)


@dataclass(frozen=True)
class Product:
    """``count`` products at a time, of (m, k) and (k, n) each."""

    count: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        return 2 * self.count * self.m * self.k * self.n

    def ways(self, dtype: torch.dtype) -> Iterator[Way]:
        a, b = (
            normal(self.count, *shape, dtype=dtype, device=CPU, offset=i)
            for i, shape in enumerate([(self.m, self.k), (self.k, self.n)])
        )
        turned = b.mT.contiguous()  # as a layer's weight lies, and as k does in q·kᵀ
        if self.count == 1:
            a, b, turned = a[0], b[0], turned[0]
        yield lambda: a @ b
        yield lambda: a @ turned.mT


Layer = Convolution | Product


class Floor:
    """Of one call of the network ``name``; ``turn`` measures, ``floor_s`` is the best so far."""

    def __init__(self, name: str, batch: int, dtype: torch.dtype):
        self.layers, self.dtype = layers(name, batch), dtype
        self.best = dict.fromkeys(self.layers, math.inf)

    @property
    def floor_s(self) -> float:
        return sum(count * self.best[layer] for layer, count in self.layers.items())

    @torch.no_grad()
    def turn(self) -> None:
        for layer in self.layers:
            for way in layer.ways(self.dtype):
                way()  # packs, and warms the caches
                taken = min(seconds(way) for _ in range(CALLS))
                self.best[layer] = min(self.best[layer], taken)


def layers(name: str, batch: int) -> Counter[Layer]:
    """The network's convolutions and matrix products, with how often each is there."""
    from torch.utils.flop_counter import FlopCounterMode  # here, as it loads Triton

    found: Counter[Layer] = Counter()

    def convolution(
        x: Shape, weight: Shape, bias: Any, stride: list, padding: list, *_: Any, **__: Any
    ) -> int:
        return add(_convolution(x, weight, tuple(stride), tuple(padding)))

    def product(a: Shape, b: Shape, **_: Any) -> int:
        return add(Product(math.prod(a[:-2]), *a[-2:], b[-1]))

    def attention(qkv: Shape, heads: int, *_: Any, **__: Any) -> int:
        n, width, tokens = qkv
        head_dim = width // 3 // heads
        scores = add(Product(n * heads, tokens, head_dim, tokens))
        return scores + add(Product(n * heads, tokens, tokens, head_dim))

    def add(layer: Layer) -> int:
        found[layer] += 1
        return layer.flops

    aten = torch.ops.aten
    recorders = {
        aten.convolution: convolution,
        aten.mm: product,
        aten.bmm: product,
        aten.addmm: lambda _bias, a, b, **_: product(a, b),
        torch.ops.fastdiff.attention: attention,
    }
    side = peers.size(name)
    # Whatever backend is named, plain operations have what the meta device needs.
    with backends.backend(None), valueless(), torch.no_grad():
        model = fastdiff.UNet(**peers.NETWORKS[name])
        x, t = torch.empty(batch, model.in_channels, side, side), torch.empty(batch)
        with FlopCounterMode(display=False, custom_mapping=recorders):
            model(x, t)
    return found


def _convolution(x: Shape, weight: Shape, stride: Shape, padding: Shape) -> Layer:
    """One whose kernel is a single position is a matrix product."""
    if math.prod(weight[2:]) == math.prod(stride) == 1:
        return Product(1, x[0] * math.prod(x[2:]), weight[1], weight[0])
    return Convolution(tuple(x), tuple(weight), stride, padding)
