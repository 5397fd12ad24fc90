"""A plan in words: its operations one by one, and what they move."""

from collections import Counter
from collections.abc import Iterable

from fastdiff.models.execution.lowering import Slot, Step
from fastdiff.models.execution.plan import Plan


def counts(plan: Plan) -> Counter[str]:
    """How many operations there are of each kind."""
    return Counter(step.kind for step in plan.steps)


def copies(plan: Plan) -> int:
    """How often an image changes its layout or dtype between two layers: conversions of what is no
    argument."""
    arguments = set(plan.inputs.values())
    return sum(step.kind == "convert" and step.reads[0] not in arguments for step in plan.steps)


def bytes_moved(plan: Plan) -> dict[str, tuple[int, int]]:
    """Of each block, the bytes of activations that its operations read and write, and of the
    weights that they read."""
    moved: dict[str, tuple[int, int]] = {}
    for step in plan.steps:
        block = _block(plan, step)
        activations, weights = moved.get(block, (0, 0))
        moved[block] = (activations + _activations(step), weights + _weights(step))
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
    lines.append("bytes moved by block: activations, weights")
    for block, (activations, weights) in bytes_moved(plan).items():
        lines.append(f"  {block:36}{_mega(activations):>10}{_mega(weights):>10}")
    lines.append(f"results alive at a time: at most {_mega(plan.peak)}")
    lines.append(f"copies between layers, of layout or dtype: {copies(plan)}")
    return "\n".join(lines)


def _fused(step: Step) -> str:
    """What a convolution does beside its product."""
    if step.kind != "convolution":
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


def _activations(step: Step) -> int:
    read = (slot for slot in step.reads if slot is not None and slot.weight is None)
    return _total(read) + _total(step.writes)


def _weights(step: Step) -> int:
    return _total(slot for slot in step.reads if slot is not None and slot.weight is not None)


def _mega(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
