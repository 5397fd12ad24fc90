"""A program as the kernels that a GPU runs: convolutions without bias, and norms that add it.

A convolution leaves open what is to be added to it: its bias, the embedding, the skip. The norm
that reads it first adds these as it reads. Where others read the sum too, it is ``residual_norm``,
which writes the sum where the convolution's result stood; it reads a concatenation as two tensors,
and none is written. A block moves so 6N beside its convolutions: 4N there, 2N in its second norm.
The first convolution's bias is in the embedding's projection, all of which are one product. A
kernel of one is a matrix product, which adds its bias itself, and of a concatenation two, the
second onto the first. A first reader that is no norm (a resampling) has the sum made for it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdiff.models.execution import functions, functions_cuda
from fastdiff.models.execution.lowering import Lowering, Slot
from fastdiff.models.execution.program import WIDE, Program, Value


@dataclass
class Open:
    """A convolution's result, and what is to be added to it: ``residual``, like it, ``row``, (C,),
    or ``embedding``, (N, C)."""

    product: Slot
    residual: Slot | None = None
    row: Slot | None = None
    embedding: Slot | None = None

    @property
    def addends(self) -> list[Slot]:
        return [v for v in (self.residual, self.row, self.embedding) if v is not None]


class CudaLowering(Lowering):
    """Of 2-D networks; others run as the forward's own functions do."""

    captured = True

    def __init__(self, program: Program, output: Value, **options: Any):
        self._open: dict[Value, Open] = {}
        self._readers = Counter(v for value in program.values for v in value.inputs)
        self._two_axes, self._last = len(output.shape) == 4, output
        super().__init__(program, output, **options)

    def _start(self, value: Value) -> None:
        if self._two_axes and value.kind == "convolution":
            self._begin(value)
            if value is self.cut:  # the norm that adds what is open is of this call alone
                self._closed(value, value.layer)
        else:
            super()._start(value)

    def _input(self, value: Value) -> Slot:
        if not self._two_axes:
            return super()._input(value)
        # Converted for who reads it first: a convolution may want more channels.
        slot = self.inputs[value.options["name"]] = Slot(value.shape, self.program.vectors)
        return slot

    # --- Convolutions ---------------------------------------------------------------------------

    def _begin(self, value: Value) -> None:
        """Multiply, and leave open what is to be added."""
        x, embedding, residual = value.inputs
        layer = value.layer
        assert x is not None and isinstance(layer, nn.Conv1d | nn.Conv2d)
        if set(layer.kernel_size) == {1}:
            opened = Open(self._product(value, x, layer))
        else:
            opened = Open(self._product_of_taps(value, x, layer))
            if embedding is None:
                opened.row = self._weight(layer, "bias", "vector")
        opened.residual = None if residual is None else self._image(residual)
        opened.embedding = self._maybe(embedding)
        if opened.addends:
            self._open[value] = opened
        else:
            self._made[value] = opened.product

    def _product(self, value: Value, x: Value, layer: nn.Module) -> Slot:
        first, second = x.inputs if x.kind == "concat" else (x, None)
        assert first is not None
        weight = self._weight(layer, "weight", "image")
        reads = [self._closed(first, layer), weight, self._weight(layer, "bias", "image")]
        made = self._emit("product", layer, functions_cuda.product, reads, self._result(value))
        if second is None:
            return made
        return self._onto(
            made,
            "accumulate",
            layer,
            functions_cuda.accumulate,
            self._closed(second, layer),
            weight,
        )

    def _product_of_taps(self, value: Value, x: Value, layer: nn.Conv1d | nn.Conv2d) -> Slot:
        """By cuDNN. At the network's ends it is given ``WIDE`` channels of half precision."""
        half, ins, outs = self.program.dtype.itemsize == 2, layer.in_channels, layer.out_channels
        widens = half and x.kind == "input" and ins < WIDE <= outs
        narrows = half and value is self._last and outs < WIDE <= ins
        image = self._widened(x) if widens else self._closed(x, layer)
        after = value.options["after"]
        if after:
            n, channels, *size = image.shape
            padded = Slot((n, channels, *(k + after for k in size)), image.dtype, self.layout)
            image = self._emit("pad", layer, functions_cuda.pad, [image], padded, after=after)
        weight = self._weight(layer, "weight", "wide" if widens or narrows else "image", 2)
        shape = (value.shape[0], WIDE, *value.size) if narrows else value.shape
        return self._emit(
            "convolution",
            layer,
            functions_cuda.convolve,
            [image, weight],
            Slot(shape, self.program.dtype, self.layout),
            stride=layer.stride[0],
            padding=layer.padding[0],
        )

    def _widened(self, x: Value) -> Slot:
        slot = self._tensor(x)
        made = Slot((x.shape[0], WIDE, *x.size), self.program.dtype, self.layout)
        options = {"dtype": made.dtype, "layout": torch.channels_last, "channels": WIDE}
        return self._emit("widen", None, functions_cuda.widen, [slot], made, **options)

    # --- What was left open -----------------------------------------------------------------------

    def _convolution(self, value: Value) -> Slot:
        if not self._two_axes:
            return super()._convolution(value)
        return self._closed(value, value.layer)

    def _closed(self, value: Value, reader: nn.Module | None) -> Slot:
        """The image as a reader wants it that is no norm: what is open is added for it."""
        opened = self._open.pop(value, None)
        if opened is None:
            return self._image(value)
        made = opened.product
        if made.shape != value.shape:  # the network's own, which has a bias and nothing else
            reads, result = [made, opened.row], Slot(value.shape, self.program.vectors, self.layout)
            made = self._emit("narrow", reader, functions_cuda.narrow, reads, result)
        else:
            for addend in opened.addends:
                made = self._onto(made, "add", reader, functions_cuda.add, addend)
        self._made[value] = made
        return made

    def _onto(
        self,
        slot: Slot,
        kind: str,
        layer: nn.Module | None,
        function: Callable[..., Any],
        *others: Slot,
    ) -> Slot:
        """A step that writes over a slot."""
        return self._emit(kind, layer, function, [slot, *others], _over(slot))

    def _upsample(self, value: Value) -> Slot:
        (source,) = value.inputs
        assert source is not None
        if self._two_axes:
            self._closed(source, value.layer)
        return super()._upsample(value)

    # --- Norms ------------------------------------------------------------------------------------

    def _norm(self, value: Value) -> Slot:
        x, film = value.inputs
        layer = value.layer
        assert x is not None and isinstance(layer, nn.GroupNorm)
        if not self._two_axes:
            return super()._norm(value)
        first, second = x.inputs if x.kind == "concat" else (x, None)
        assert first is not None
        opened = self._open.get(first)
        shared = second is not None or self._readers[first] > 1
        if opened is not None and not (shared or opened.residual):
            return self._norm_alone(value, layer, self._open.pop(first))
        simple = film is None and (opened is None or opened.embedding is None)
        if not simple or (opened is None and second is None):
            return self._norm_alone(value, layer, Open(self._closed(x, layer)))
        opened = self._open.pop(first, None) or Open(self._image(first))
        affine = (self._weight(layer, name, "vector") for name in ("weight", "bias"))
        beside = None if second is None else self._closed(second, layer)
        results = [self._result(value)]
        if opened.addends:
            self._made[first] = _over(opened.product)
            results.append(self._made[first])
        return self._emit(
            "residual_norm",
            layer,
            functions_cuda.sum_and_norm,
            [opened.product, *affine, opened.residual, opened.row, beside],
            *results,
            groups=layer.num_groups,
            eps=layer.eps,
            **value.options,
        )

    def _norm_alone(self, value: Value, layer: nn.GroupNorm, x: Open) -> Slot:
        affine = (self._weight(layer, name, "vector") for name in ("weight", "bias"))
        film = self._film(value.inputs[1])
        reads = [x.product, *affine, *film, x.row or x.embedding]
        options = {"groups": layer.num_groups, "eps": layer.eps, **value.options}
        result = self._result(value)
        return self._emit("group_norm_silu", layer, functions.norm, reads, result, **options)

    # --- Biases -----------------------------------------------------------------------------------

    def _added_to(self, projections: Sequence[Value]) -> tuple[nn.Module | None, ...]:
        """The convolutions that the embedding is added to."""
        if not self._two_axes:
            return ()
        convolutions = (v for v in self.program.values if v.kind == "convolution")
        layers = {v.inputs[1]: v.layer for v in convolutions}
        return tuple(layers.get(v) for v in projections)


def _over(slot: Slot) -> Slot:
    """Another result where this one stands."""
    return Slot(slot.shape, slot.dtype, slot.layout, whole=slot.whole or slot)
