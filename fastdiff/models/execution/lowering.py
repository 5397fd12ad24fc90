"""A program as the steps that a CPU runs: norms, additions and resampling inside convolutions.

A norm before a 2-D convolution is never computed: of the moments that the convolution before it
answers beside its result, ``norm_coefficients`` makes a scale and a shift, which the next
convolution applies as it reads. A concatenation is its second input, a doubling its ``upsample``.
What ``ops.convolution`` has no place for runs as the forward's own functions do, on tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.execution import functions
from fastdiff.models.execution.program import WIDE, Program, Value, Weight
from fastdiff.ops import native
from fastdiff.ops.backends import KERNEL_DTYPES
from fastdiff.ops.convolution.fastest import (
    Products,
    Workload,
    fastest,
    folded_is_faster,
    units,
)
from fastdiff.ops.convolution.reference import moments_of

CHANNELS_LAST, CONTIGUOUS = "channels_last", "contiguous"
MOST_TRANSFORMED = 1 << 30  # bytes of weights that Winograd's algorithm has transformed


@dataclass(eq=False)
class Slot:
    """Room for one tensor: an argument, a weight (then ``weight`` says which), a result, or columns
    of another result, ``whole``, from ``start`` on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = CONTIGUOUS
    weight: Weight | None = None
    whole: "Slot | None" = None
    start: int = 0

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view_of(self, memory: Tensor) -> Tensor:
        """Such a tensor in ``nbytes`` of memory."""
        values = memory.view(self.dtype)
        if self.layout == CONTIGUOUS:
            return values.view(self.shape)
        n, channels, *size = self.shape
        return values.view(n, *size, channels).movedim(-1, 1)

    def part_of(self, whole: Tensor) -> Tensor:
        return whole[:, self.start : self.start + self.shape[1]]


@dataclass(eq=False)
class Step:
    """One operation: ``function`` of what the slots ``reads`` hold, and where its results go.

    ``layer``: the module that it is of.
    """

    kind: str
    layer: nn.Module | None
    function: Callable[..., Any]
    reads: list[Slot | None]
    writes: list[Slot | None]
    options: dict[str, Any] = field(default_factory=dict)


class Lowering:
    """``steps``; ``inputs`` by name; ``weights``; ``output``, where the program's result is.

    ``cut``: a value that a later call takes as it is; ``kept``: where it is, and what was computed
    of it before it was read.
    ``captured``: the steps allocate what they answer, and are recorded in graphs, which go on
    reading the weights where they are. ``exact``: float32 products are of the values themselves.
    """

    captured = False

    def __init__(
        self, program: Program, output: Value, *, cut: Value | None = None, exact: bool = False
    ):
        self.program, self.cut, self.exact = program, cut, exact
        self.layout = CHANNELS_LAST if len(output.shape) == 4 else CONTIGUOUS
        self.steps: list[Step] = []
        self.inputs: dict[str, Slot] = {}
        self.weights: dict[Weight, Slot] = {}
        self._made: dict[Value, Slot] = {}
        self._producers: dict[Slot, Step] = {}
        self._moments: dict[Value, Slot] = {}
        self._parts: dict[Value, list[Slot]] = {}  # of a projection
        self._transformed = 0  # bytes of weights
        for value in program.values:
            self._start(value)
        self.output = self._tensor(output)
        found = [] if cut is None else [self._made[cut], self._moments.get(cut)]
        self.kept = [slot for slot in found if slot is not None]

    # --- Values as tensors --------------------------------------------------------------------

    def _start(self, value: Value) -> None:
        if value.kind not in ("norm", "concat", "upsample"):  # which wait for who reads them
            self._tensor(value)

    def _tensor(self, value: Value) -> Slot:
        if value not in self._made:
            made = getattr(self, f"_{value.kind}")(value)
            self._made.setdefault(value, made)
        return self._made[value]

    def _image(self, value: Value) -> Slot:
        """In the layout that all operations on images read."""
        slot = self._tensor(value)
        if slot.layout != self.layout:
            slot = self._made[value] = self._converted(slot)
        return slot

    def _maybe(self, value: Value | None) -> Slot | None:
        return None if value is None else self._tensor(value)

    def _result(self, value: Value) -> Slot:
        if len(value.shape) > 2:
            return Slot(value.shape, self.program.dtype, self.layout)
        return Slot(value.shape, self.program.vectors)

    def _emit(
        self,
        kind: str,
        layer: nn.Module | None,
        function: Callable[..., Any],
        reads: Sequence[Slot | None],
        *writes: Slot,
        **options: Any,
    ) -> Slot:
        step = Step(kind, layer, function, list(reads), list(writes), options)
        self.steps.append(step)
        self._producers[writes[0]] = step
        return writes[0]

    def _weight(self, layer: nn.Module | None, name: str, form: str, dims: int = 0) -> Slot:
        assert layer is not None
        return self._weight_slot(Weight((layer,), name, form, dims))

    def _packed(
        self, layer: nn.Conv1d | nn.Conv2d, value: Value, before: int, upsample: bool
    ) -> Slot:
        """A convolution's weight for the products that are fastest for its shapes."""
        n, out_channels, height, width = value.shape
        kernel = layer.kernel_size if len(layer.kernel_size) == 2 else (1, 1)
        products = doubled = None
        if self.program.dtype in KERNEL_DTYPES:
            channels, stride = layer.in_channels, layer.stride[0]
            shape = (n, channels, out_channels, height, width, kernel, stride)
            work = Workload(self.program.dtype, *shape, units(), upsample)
            products, _ = fastest(work, exact=self.exact)
            doubled = before if folded_is_faster(work) else None
            if products in (Products.WINOGRAD2, Products.WINOGRAD4):
                products = self._within_bounds(products, out_channels, channels)
        return self._weight_slot(Weight((layer,), "weight", "packed", 2, products, doubled))

    def _within_bounds(self, products: Products, out_channels: int, channels: int) -> Products:
        """Winograd's, as long as the weights, which are two to four times larger, fit into memory:
        the large images come first, which gain most and have small weights."""
        panels = native.library().convolution_panels
        self._transformed += panels(int(products), out_channels, channels, 9)
        return products if self._transformed <= MOST_TRANSFORMED else Products.FLOAT32

    def _weight_slot(self, weight: Weight) -> Slot:
        if weight not in self.weights:
            image = weight.form != "vector"
            dtype = self.program.dtype if image else self.program.vectors
            shapes = [layer.get_parameter(weight.name).shape for layer in weight.layers]
            shape = (sum(s[0] for s in shapes), *shapes[0][1:])
            if weight.form == "wide":
                shape = (max(shape[0], WIDE), max(shape[1], WIDE), *shape[2:])
            self.weights[weight] = Slot(shape, dtype, weight=weight)
        return self.weights[weight]

    def _input(self, value: Value) -> Slot:
        slot = self.inputs[value.options["name"]] = Slot(value.shape, self.program.vectors)
        return self._converted(slot) if len(value.shape) > 2 else slot

    def _converted(self, slot: Slot) -> Slot:
        made = Slot(slot.shape, self.program.dtype, self.layout)
        layout = functions.MEMORY_FORMATS[self.layout]
        options = {"dtype": made.dtype, "layout": layout}
        return self._emit("convert", None, functions.convert, [slot], made, **options)

    # --- Operations ---------------------------------------------------------------------------

    def _convolution(self, value: Value) -> Slot:
        if len(value.shape) != 4:
            return self._plain_convolution(value)
        x, add, residual = value.inputs
        layer, options = value.layer, {}
        assert x is not None and isinstance(layer, nn.Conv1d | nn.Conv2d)
        coefficients = second = None
        if x.kind == "upsample" and _doubles(x):
            options["upsample"] = True
            x = _source(x)
        if x.kind == "norm":
            coefficients = self._coefficients(x)
            options["activation"] = x.options["activation"]
            x = _source(x)
        if x.kind == "concat":
            x, second = x.inputs
            assert x is not None and second is not None
        before, upsample = int(layer.padding[0]), "upsample" in options
        return self._emit(
            "convolution",
            layer,
            functions.convolve,
            [
                self._image(x),
                self._packed(layer, value, before, upsample),
                self._weight(layer, "bias", "vector"),
                None if second is None else self._image(second),
                coefficients,
                self._maybe(add),
                None if residual is None else self._image(residual),
            ],
            self._result(value),
            stride=layer.stride[0],
            padding=(before, before + value.options["after"]),
            **options,
        )

    def _coefficients(self, norm: Value) -> Slot:
        """The norm as a scale and a shift, (N, 2, C)."""
        x, film = norm.inputs
        layer = norm.layer
        assert x is not None and isinstance(layer, nn.GroupNorm)
        sources = x.inputs if x.kind == "concat" else (x, None)
        moments, second = (None if v is None else self._moments_of(v) for v in sources)
        scale, shift = self._film(film)
        affine = (self._weight(layer, name, "vector") for name in ("weight", "bias"))
        made = Slot((x.shape[0], 2, x.shape[1]), self.program.vectors)
        reads = [moments, *affine, second, scale, shift]
        options = {"groups": layer.num_groups, "eps": layer.eps}
        return self._emit(
            "norm_coefficients", layer, functions.coefficients, reads, made, **options
        )

    def _moments_of(self, value: Value) -> Slot:
        """The mean and variance of each sample's channels, (N, 2, C): the convolution's that made
        it, which is asked for them now, or computed."""
        if value not in self._moments:
            image = self._image(value)
            made = Slot((value.shape[0], 2, value.shape[1]), self.program.vectors)
            producer = self._producers[image]
            if producer.function is functions.convolve:
                producer.writes.append(made)
                producer.options["moments"] = True
            else:
                self._emit("moments", value.layer, moments_of, [image], made)
            self._moments[value] = made
        return self._moments[value]

    def _attention(self, value: Value) -> Slot:
        (qkv,) = value.inputs
        assert qkv is not None
        # Whatever the layout of q, k and v, its result has tokens before channels.
        made = Slot(value.shape, self.program.dtype, CHANNELS_LAST)
        return self._emit(
            "attention",
            value.layer,
            functions.attend,
            [self._image(qkv)],
            made,
            **value.options,
            split=not self.exact,
        )

    def _projection(self, value: Value) -> Slot:
        """The first one computes all: one product of the embedding with their weights. Those that
        are FiLM's come apart as scale and shift."""
        emb = value.inputs[0]
        assert emb is not None
        together = [v for v in self.program.values if v.kind == "projection" and v.inputs == (emb,)]
        films = {v.inputs[1] for v in self.program.values if v.kind == "norm"}
        layers = tuple(v.layer for v in together if v.layer is not None)
        bias = Weight(layers, "bias", "vector", plus=self._added_to(together))
        weights = map(self._weight_slot, (Weight(layers, "weight", "vector"), bias))
        n, vectors = emb.shape[0], self.program.vectors
        whole = Slot((n, sum(v.shape[1] for v in together)), vectors)
        start = 0
        for v in together:
            parts = 2 if v in films else 1
            width = v.shape[1] // parts
            self._parts[v] = []
            for _ in range(parts):
                self._parts[v].append(Slot((n, width), vectors, whole=whole, start=start))
                start += width
            self._made[v] = self._parts[v][0]
        self._emit("projections", None, F.linear, [self._tensor(emb), *weights], whole)
        return self._made[value]

    def _added_to(self, projections: Sequence[Value]) -> tuple[nn.Module | None, ...]:
        """Layers whose biases the projections' take in."""
        return ()

    def _film(self, film: Value | None) -> list[Slot | None]:
        """A projection's scale and shift."""
        if film is None:
            return [None, None]
        self._tensor(film)
        return [*self._parts[film]]

    # --- What ops.convolution has no place for -------------------------------------------------

    def _plain(self, value: Value) -> Slot:
        reads = [self._image(v) if len(v.shape) > 2 else self._tensor(v) for v in value.inputs if v]
        reads += [self._weight_slot(weight) for weight in value.options["weights"]]
        name, function = value.options["name"], value.options["function"]
        return self._emit(name, value.layer, function, reads, self._result(value))

    def _plain_convolution(self, value: Value) -> Slot:
        x, add, residual = value.inputs
        layer = value.layer
        assert x is not None and isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        pointwise = set(layer.kernel_size) == {1}
        dims = len(value.size)
        return self._emit(
            "plain_convolution",
            layer,
            functions.plain_convolution,
            [
                self._image(x),
                self._weight(layer, "weight", "image", dims),
                self._weight(layer, "bias", "image"),
                self._maybe(add),
                None if residual is None else self._image(residual),
            ],
            self._result(value),
            stride=1 if pointwise else layer.stride,
            padding=0 if pointwise else layer.padding,
            after=value.options["after"],
        )

    def _norm(self, value: Value) -> Slot:
        x, film = value.inputs
        layer = value.layer
        assert x is not None and isinstance(layer, nn.GroupNorm)
        affine = (self._weight(layer, name, "vector") for name in ("weight", "bias"))
        reads = [self._image(x), *affine, *self._film(film)]
        options = {"groups": layer.num_groups, "eps": layer.eps, **value.options}
        result = self._result(value)
        return self._emit("group_norm_silu", layer, functions.norm, reads, result, **options)

    def _concat(self, value: Value) -> Slot:
        reads = [self._image(v) for v in value.inputs if v is not None]
        return self._emit("concat", None, functions.concat, reads, self._result(value))

    def _upsample(self, value: Value) -> Slot:
        reads, result = [self._image(_source(value))], self._result(value)
        options = {"size": value.size}
        return self._emit("upsample", value.layer, functions.upsample, reads, result, **options)


def _source(value: Value) -> Value:
    """What a norm or a resize is of."""
    source = value.inputs[0]
    assert source is not None
    return source


def _doubles(upsample: Value) -> bool:
    return upsample.size == tuple(2 * n for n in _source(upsample).size)
