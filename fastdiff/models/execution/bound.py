"""A plan's steps bound to memory: what runs, again and again, without looking anything up."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.execution import functions
from fastdiff.models.execution.ahead import Ahead
from fastdiff.models.execution.lowering import Slot, Step
from fastdiff.models.execution.plan import Plan
from fastdiff.ops import backends
from fastdiff.ops.attention import op as attention_op
from fastdiff.ops.convolution import op as convolution_op
from fastdiff.ops.convolution.packed import Packed
from fastdiff.ops.norm_coefficients import op as norm_op

Run = Callable[[], Any]
Kept = tuple[Tensor, ...]  # what a plan keeps for other calls


class Bound:
    """One set of a plan's results in memory, and its steps, which read and write there.

    ``weights``: as the plan wants them. It serves one call at a time. ``taken``: a number of the
    values that these have.
    """

    taken = 0

    def __init__(self, plan: Plan, weights: Sequence[Any]):
        memory = torch.empty(plan.nbytes, dtype=torch.uint8)
        held: dict[Slot | None, Any] = dict(zip(plan.weights.values(), weights, strict=True))
        held[None] = None
        for slot, start in plan.places.items():
            held[slot] = slot.view_of(memory[start : start + slot.nbytes])
        for slot in plan.parts:
            held[slot] = slot.part_of(held[slot.whole])
        self._inputs = [held[slot] for slot in plan.inputs.values()]
        self._output: Tensor = held[plan.output]
        self._held = held  # whose addresses the steps have
        steps = [_bound(step, [held[s] for s in step.reads], held) for step in plan.steps]
        self._plan, self._early, self._steps = plan, steps[: plan.early], steps[plan.early :]
        self._shallow = [steps[number] for number in plan.shallow if number >= plan.early]
        self._kept: list[Tensor] = [held[slot] for slot in plan.kept]

    def run(
        self, arguments: Sequence[Tensor], ahead: Ahead, kept: Kept = ()
    ) -> tuple[Tensor, Kept]:
        """The result for the arguments, in the order of the plan's ``inputs``, and what the plan
        keeps; ``kept``: what another call answered so, in place of all that leads to it."""
        for place, given in zip(self._inputs, arguments, strict=True):
            place.copy_(given)
        for place, given in zip(self._kept, kept, strict=bool(kept)):
            place.copy_(given)
        timesteps = self._held[self._plan.inputs["timesteps"]]
        rows = ahead.rows(self._plan, self._held, self.taken, timesteps)
        if rows is None:
            for step in self._early:
                step()
        else:
            for slot, row in zip(self._plan.ahead, rows, strict=True):
                self._held[slot].copy_(row)
        for step in self._shallow if kept else self._steps:
            step()
        return self._output.clone(), kept or tuple(value.clone() for value in self._kept)


def _bound(step: Step, reads: list[Any], held: dict[Slot | None, Any]) -> Run:
    writes = [held[slot] for slot in step.writes]
    binder = _BINDERS.get(step.function)
    run = binder(step, reads, writes) if binder is not None else None
    if run is not None:
        return run
    function = partial(step.function, *reads, **step.options)

    def copied() -> None:
        results = function()
        for place, result in zip(
            writes, results if isinstance(results, tuple) else (results,), strict=True
        ):
            place.copy_(result)

    return copied


def _convolution(step: Step, reads: list[Any], writes: list[Tensor]) -> Run | None:
    x, weight, bias, second, coefficients, add, residual = reads
    assert isinstance(weight, Packed)
    if weight.panels is None or backends.named() == "reference":
        return None
    options = step.options
    k, _, height, width = weight.weight.shape
    moments = bool(options.get("moments"))
    call = convolution_op.Arguments(
        x,
        weight.panels,
        bias,
        second,
        coefficients,
        add,
        residual,
        out_channels=k,
        kernel_height=height,
        kernel_width=width,
        stride=options["stride"],
        before=options["padding"][0],
        after=options["padding"][1],
        upsample=bool(options.get("upsample")),
        folded=weight.folded is not None,
        silu=options.get("activation") is not None,
        products=int(weight.products),
        moments=moments,
    )
    return convolution_op.bound(call, (writes[0], writes[1] if moments else None))


def _coefficients(step: Step, reads: list[Any], writes: list[Tensor]) -> Run | None:
    moments, weight, bias, second, scale, shift = reads
    if moments.dtype != torch.float32 or backends.named() == "reference":
        return None
    rows = (moments, second, weight, bias, scale, shift)
    call = norm_op.Arguments(*rows, step.options["groups"], step.options["eps"])
    return norm_op.bound(call, (writes[0],))


def _attention(step: Step, reads: list[Any], writes: list[Tensor]) -> Run | None:
    qkv, heads = reads[0].flatten(2), step.options["num_heads"]
    order, split = step.options["order"], step.options["split"]
    if attention_op.choose(qkv, heads).backend != "native":
        return None
    call = attention_op.Arguments(qkv, heads, order, "native", False, split)
    return attention_op.bound(call, (writes[0].flatten(2), None))


def _product(step: Step, reads: list[Any], writes: list[Tensor]) -> Run:
    x, weight, bias = reads
    return partial(torch.addmm, bias, x, weight.t(), out=writes[0])


_BINDERS: dict[Any, Callable[[Step, list[Any], list[Tensor]], Run | None]] = {
    functions.convolve: _convolution,
    functions.coefficients: _coefficients,
    functions.attend: _attention,
    torch.nn.functional.linear: _product,
}
