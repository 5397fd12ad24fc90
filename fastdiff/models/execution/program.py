"""What a network computes, as operations on symbolic values.

Each kind of block says in ``unroll``, beside its forward, how it becomes calls of a ``Program``. A
program knows shapes and which module's parameters an operation reads, and nothing of how a device
computes it: that is lowering.py's to say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.ops.arithmetic import arithmetic
from fastdiff.ops.convolution.fastest import Products

WIDE = 8  # channels that tensor cores read at a time


@dataclass(frozen=True)
class Weight:
    """A parameter in the form in which an operation reads it.

    ``form``: "packed" for ``ops.convolution`` by its ``products``, of ``dims`` dimensions, for an
    input that is ``doubled`` (``pack``), "image" in the dtype of the activations, "wide" that with
    zeros up to ``WIDE`` channels in and out, "vector" in that of statistics and embeddings. Of
    several layers: one after the other, as one product reads them. ``plus``: for each of these a
    layer whose parameter of that name is added to it, or None.
    """

    layers: tuple[nn.Module, ...]
    name: str
    form: str
    dims: int = 0
    products: Products | None = None
    doubled: int | None = None
    plus: tuple[nn.Module | None, ...] = ()


@dataclass(frozen=True, eq=False)
class Value:
    """What one operation answers: its name, its shape, and what it is made of."""

    kind: str
    shape: tuple[int, ...]
    inputs: tuple["Value | None", ...]
    layer: nn.Module | None
    options: Mapping[str, Any]

    @property
    def size(self) -> tuple[int, ...]:
        return self.shape[2:]


class Program:
    """The operations in the order in which blocks ask for them: ``values``.

    ``dtype``: of images, (N, C, *spatial); ``vectors``: of statistics and embeddings, (N, C).
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.vectors = dtype, arithmetic(dtype)
        self.values: list[Value] = []

    def _record(
        self,
        kind: str,
        shape: tuple[int, ...],
        inputs: tuple[Value | None, ...],
        layer: nn.Module | None,
        **options: Any,
    ) -> Value:
        self.values.append(Value(kind, shape, inputs, layer, options))
        return self.values[-1]

    def input(self, name: str, shape: Sequence[int]) -> Value:
        """An argument of the network."""
        return self._record("input", tuple(shape), (), None, name=name)

    def convolution(
        self,
        layer: nn.Module,
        x: Value,
        *,
        after: int = 0,
        add: Value | None = None,
        residual: Value | None = None,
    ) -> Value:
        """layer(x) + add (N, C') + residual, like the result.

        ``after``: zeros behind the image along each of its last two axes, beside the layer's own
        padding. A layer with a kernel of one serves images of any dimension.
        """
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        size = x.size
        if set(layer.kernel_size) != {1}:
            padded = [2 * int(p) for p in layer.padding]
            for axis in range(len(size))[-2:]:
                padded[axis] += after
            size = tuple(
                (n + p - kernel) // stride + 1
                for n, p, kernel, stride in zip(
                    size, padded, layer.kernel_size, layer.stride, strict=True
                )
            )
        shape = (x.shape[0], layer.out_channels, *size)
        return self._record("convolution", shape, (x, add, residual), layer, after=after)

    def norm(
        self,
        layer: nn.Module,
        x: Value,
        *,
        film: Value | None = None,
        activation: str | None = "silu",
    ) -> Value:
        """A GroupNorm and what follows it; ``film``: a projection (N, 2C), scale and shift."""
        return self._record("norm", x.shape, (x, film), layer, activation=activation)

    def attention(self, layer: nn.Module, qkv: Value, num_heads: int, order: str) -> Value:
        """(N, C, *spatial) of (N, 3C, *spatial)."""
        shape = (qkv.shape[0], qkv.shape[1] // 3, *qkv.size)
        return self._record("attention", shape, (qkv,), layer, num_heads=num_heads, order=order)

    def concat(self, x: Value, second: Value) -> Value:
        """The channels of both."""
        shape = (x.shape[0], x.shape[1] + second.shape[1], *x.size)
        return self._record("concat", shape, (x, second), None)

    def upsample(self, layer: nn.Module, x: Value, size: Sequence[int]) -> Value:
        """Nearest-neighbour resize; ``layer`` is what asks for it."""
        return self._record("upsample", (*x.shape[:2], *size), (x,), layer)

    def projection(self, layer: nn.Module, emb: Value) -> Value:
        """A block's linear layer of the embedding; all such layers of one embedding are together
        one product."""
        assert isinstance(layer, nn.Linear)
        return self._record("projection", (emb.shape[0], layer.out_features), (emb,), layer)

    def linear(self, layer: nn.Module, x: Value) -> Value:
        assert isinstance(layer, nn.Linear)
        weights = [Weight((layer,), name, "vector") for name in ("weight", "bias")]
        shape = (x.shape[0], layer.out_features)
        return self.plain("linear", nn.functional.linear, x, shape=shape, weights=weights)

    def silu(self, x: Value) -> Value:
        return self.plain("silu", nn.functional.silu, x, shape=x.shape, layer=x.layer)

    def plain(
        self,
        kind: str,
        function: Callable[..., Tensor],
        *inputs: Value,
        shape: Sequence[int],
        layer: nn.Module | None = None,
        weights: Sequence[Weight] = (),
    ) -> Value:
        """``function`` of the inputs and then of the weights: what no operation has a place for."""
        layer = weights[0].layers[0] if weights else layer
        options = {"name": kind, "function": function, "weights": weights}
        return self._record("plain", tuple(shape), inputs, layer, **options)
