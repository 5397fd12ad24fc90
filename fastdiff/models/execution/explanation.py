"""A plan in words: its operations one by one, and what they move."""

import math
from collections import Counter
from collections.abc import Iterable

from fastdiff.models.execution import functions
from fastdiff.models.execution.lowering import CHANNELS_LAST, Slot, Step
from fastdiff.models.execution.plan import Plan
from fastdiff.ops.backends import HAS_TRITON

CONVOLUTIONS = ("convolution", "plain_convolution", "product", "accumulate")
NORMS = ("group_norm_silu", "residual_norm")
# The kernels that PyTorch launches for an operation on a GPU, where it is not one.
KERNELS = {"waves": 9, "pad": 2, "widen": 2}


def counts(plan: Plan) -> Counter[str]:
    """How many operations there are of each kind."""
    return Counter(step.kind for step in plan.steps)


def copies(plan: Plan) -> int:
    """How often an image changes its layout or dtype between two layers: conversions of what is no
    argument."""
    arguments = set(plan.inputs.values())
    return sum(step.kind == "convert" and step.reads[0] not in arguments for step in plan.steps)


def kernels(plan: Plan) -> int:
    """How many kernels a GPU runs for a call of a 2-D network, where each convolution and product
    is one."""
    return sum(3 if _reads_twice(s) else KERNELS.get(s.kind, 1) for s in plan.steps)


def _reads_twice(step: Step) -> bool:
    """Whether it is a GPU's norm with groups that do not fit a program's registers: one kernel for
    parts of their moments, one for the whole, and one that reads again what was normalised."""
    if step.kind not in NORMS or not HAS_TRITON:
        return False
    from fastdiff.kernels.group_norm_tiles import choose_tiles

    result = step.writes[0]
    assert result is not None
    (_, channels, *size), last = result.shape, result.layout == CHANNELS_LAST
    tiles = choose_tiles(
        channels, step.options["groups"], math.prod(size), result.dtype.itemsize, last, False
    )
    return not tiles.read_once


def beside_convolutions(plan: Plan) -> dict[str, int]:
    """Of each block, the bytes of activations that are moved by what is no convolution."""
    moved = dict.fromkeys(bytes_moved(plan), 0)
    for step in plan.steps:
        if step.kind not in CONVOLUTIONS:
            moved[_block(plan, step)] += _activations(plan, step)
    return moved


def bytes_moved(plan: Plan) -> dict[str, tuple[int, int]]:
    """Of each block, the bytes of activations that its operations read and write, and of the
    weights that they read."""
    moved: dict[str, tuple[int, int]] = {}
    for step in plan.steps:
        block = _block(plan, step)
        activations, weights = moved.get(block, (0, 0))
        moved[block] = (activations + _activations(plan, step), weights + _weights(step))
    return moved


def explanation(plan: Plan) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts(plan).most_common())
    dtype = str(plan.dtype).removeprefix("torch.")
    lines = [f"{len(plan.steps)} operations in {dtype}, {plan.layout}: {kinds}"]
    for step in plan.steps:
        name = "" if step.layer is None else plan.names[step.layer]
        shapes = " ".join(str(slot.shape) for slot in step.writes[:1] if slot is not None)
        fused = _fused(step)
        lines.append(f"  {step.kind:18}{name:36}{shapes}{fused and f'  {fused}'}")
    lines.append("bytes moved by block: activations, of these not by convolutions, weights")
    beside = beside_convolutions(plan)
    for block, (activations, weights) in bytes_moved(plan).items():
        figures = map(_mega, (activations, beside[block], weights))
        lines.append(f"  {block:36}" + "".join(f"{figure:>10}" for figure in figures))
    lines.append(f"results alive at a time: at most {_mega(plan.peak)}")
    if plan.captured:
        lines.append(f"kernels of a call: {kernels(plan)}")
    if plan.kept:
        lines.append(f"of these a shallow call runs {len(plan.shallow)} operations")
    lines.append(f"copies between layers, of layout or dtype: {copies(plan)}")
    return "\n".join(lines)


def _fused(step: Step) -> str:
    """What a convolution does beside its product."""
    if step.function is not functions.convolve:
        return ""
    _, _, _, second, coefficients, add, residual = step.reads
    options = step.options
    said = {
        "concat": second is not None,
        "norm": coefficients is not None,
        "silu": options.get("activation") == "silu",
        "upsample": options.get("upsample", False),
        "+add": add is not None,
        "+residual": residual is not None,
        "moments": options.get("moments", False),
    }
    return " ".join(word for word, holds in said.items() if holds)


def _block(plan: Plan, step: Step) -> str:
    """The block of the published U-Net that a step is of: input_blocks.1.0, middle_block.2, out."""
    if step.layer is None:
        return f"({step.kind})"
    parts = plan.names[step.layer].split(".")
    depth = {"input_blocks": 3, "output_blocks": 3, "middle_block": 2}.get(parts[0], 1)
    return ".".join(parts[:depth])


def _total(slots: Iterable[Slot | None]) -> int:
    return sum(slot.nbytes for slot in slots if slot is not None)


def _activations(plan: Plan, step: Step) -> int:
    read = (slot for slot in step.reads if slot is not None and slot.weight is None)
    again = step.writes[:1] if plan.captured and _reads_twice(step) else []  # which is as large
    return _total(read) + _total(again) + _total(step.writes)


def _weights(step: Step) -> int:
    return _total(slot for slot in step.reads if slot is not None and slot.weight is not None)


def _mega(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
