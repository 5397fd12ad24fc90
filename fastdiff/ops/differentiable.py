"""Kernels as PyTorch knows them: operators that compilers, modes and profilers see, and gradients.

A kernel takes one record, a NamedTuple that begins with its tensors, and fills the outputs that
``allocate`` makes for it. From those two come the operator with its schema, its fake and what runs.
Where nobody listens and no subclass is among the tensors, a call goes past PyTorch's dispatcher,
which halves its cost.
"""

import itertools
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends, counters
from fastdiff.ops.counters import Counters
from fastdiff.ops.layouts import dense

Outputs = tuple[Any, ...]  # tensors, or None where one is not wanted

_LIBRARY = torch.library.Library("fastdiff", "FRAGMENT")
_SCHEMAS: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", float | None: "float?",
    bool: "bool", str: "str",
}  # fmt: skip


class Kernel:
    """An operation's kernels: ``fastdiff::name`` for PyTorch, and a launch of its own beside it.

    ``record`` is a NamedTuple of tensors, then of numbers, names, Counters or another such record.
    ``allocate(call)`` makes the outputs (N of them; the operator returns an empty tensor in the
    place of None), ``launch(call, plan, *outputs)`` fills them. ``plan(call)`` is what the launch
    needs to know of layouts, or None where some argument has a layout or dtype that no kernel
    reads: ``readable(call)``, the same call on copies, runs then.
    """

    def __init__(
        self,
        name: str,
        record: Any,
        allocate: Callable[..., Outputs],
        launch: Callable[..., None],
        *,
        outputs: int,
        plan: Callable[[Any], Any] = lambda call: (),
        readable: Callable[[Any], Any] = dense,
    ) -> None:
        self.name, self.record, self.allocate = name, record, allocate
        self.launch, self.plan, self.readable = launch, plan, readable
        kinds = typing.get_type_hints(record).values()
        tensors = itertools.takewhile(lambda kind: kind in (Tensor, Tensor | None), kinds)
        self.tensors = len(list(tensors))
        self.eager: Any = None  # an autograd Function's apply, where there are gradients
        returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
        _LIBRARY.define(f"{name}({', '.join(_fields(record))}) -> {returns}")
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, lambda *values: self._operate(self.run, values), key)
        fake = lambda *values: self._operate(self.allocate, values)  # noqa: E731
        torch.library.register_fake(f"fastdiff::{name}", fake, lib=_LIBRARY)
        self.operator = getattr(torch.ops.fastdiff, name).default

    def __call__(self, call: Any, wants_gradient: bool = False) -> Outputs:
        """The outputs; ``wants_gradient``: autograd will ask for one."""
        if not backends.launches_directly(*call[: self.tensors]):
            return self.dispatch(call)
        return self.eager(*call) if wants_gradient else self.run(call)

    def run(self, call: Any) -> Outputs:
        outputs = self.allocate(call)
        if outputs[0].numel() == 0:
            for output in outputs:
                if output is not None:
                    output.zero_()
            return outputs
        plan = self.plan(call)
        if plan is None:
            pairs = zip(outputs, self.run(self.readable(call)), strict=True)
            return tuple(v if v is None or _alike(v, room) else room.copy_(v) for room, v in pairs)
        if outputs[0].is_cpu:
            self.launch(call, plan, *outputs)
        else:
            with backends.device_of(outputs[0]):
                self.launch(call, plan, *outputs)
        return outputs

    def dispatch(self, call: Any) -> Outputs:
        """The outputs through PyTorch's dispatcher."""
        outputs = self.operator(*_flat(call))
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    def _operate(self, function: Callable[[Any], Outputs], values: tuple[Any, ...]) -> Any:
        """``function`` as an operator has it: of flat values, to tensors."""
        first, *others = function(_built(self.record, iter(values)))
        if not others:
            return first
        return first, *(first.new_empty(0) if other is None else other for other in others)

    def differentiate(
        self, setup: Callable[..., None], backward: Callable[..., Any], *, returns: int
    ) -> None:
        """Gradients: ``setup(ctx, call, outputs)`` keeps what ``backward(ctx, grad)`` needs for the
        gradients of the record's tensors from that of the first output. The others have none; only
        the first ``returns`` outputs are the caller's."""
        fields = len(self.record._fields)

        def padded(ctx: Any, grad: Tensor | None, count: int) -> tuple[Any, ...]:
            given = (None,) * self.tensors if grad is None else tuple(backward(ctx, grad))
            return given + (None,) * (count - self.tensors)

        def setup_flat(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.count = len(inputs)
            ctx.set_materialize_grads(False)
            outputs = (output,) if isinstance(output, Tensor) else output
            ctx.mark_non_differentiable(*outputs[1:])
            setup(ctx, _built(self.record, iter(inputs)), outputs)

        torch.library.register_autograd(
            f"fastdiff::{self.name}",
            lambda ctx, grad, *_: padded(ctx, grad, ctx.count),
            setup_context=setup_flat,
            lib=_LIBRARY,
        )

        class Eager(torch.autograd.Function):
            """The same in eager mode, for a fifth of what register_autograd costs per call."""

            @staticmethod
            def forward(ctx: Any, *values: Any) -> Outputs:
                call = self.record(*values)
                outputs = self.run(call)
                ctx.set_materialize_grads(False)
                setup(ctx, call, outputs)
                if returns > 1:
                    ctx.mark_non_differentiable(*(v for v in outputs[1:] if v is not None))
                return outputs[:returns]

            @staticmethod
            def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
                return padded(ctx, grad, fields)

        self.eager = Eager.apply


def differentiable_once(
    forward: Kernel,
    allocate: Callable[..., Outputs],
    launch: Callable[..., None],
    *,
    keeps: dict[str, int],
) -> None:
    """Give ``forward`` the gradients that a kernel ``forward.name``_backward computes, and refuse
    those of gradients.

    That kernel's record is ``grad``, the first output's gradient, the outputs that ``keeps`` names
    and numbers, and ``call``, ``forward``'s record. Its outputs are the gradients of ``forward``'s
    tensors, None for a tensor whose gradient is that of the first (a residual).
    """
    count, places = forward.tensors, keeps.values()
    fields = [(name, Tensor) for name in ("grad", *keeps)]
    backward = Kernel(
        f"{forward.name}_backward",
        typing.NamedTuple("Backward", [*fields, ("call", forward.record)]),  # type: ignore[misc]
        allocate,
        launch,
        outputs=count,
        plan=lambda given: forward.plan(given.call),
        readable=lambda given: given._replace(call=forward.readable(given.call)),
    )

    def setup(ctx: Any, call: Any, outputs: Outputs) -> None:
        ctx.save_for_backward(*(outputs[i] for i in places), *call[:count])
        ctx.rest = call[count:]

    def gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
        saved = ctx.saved_tensors
        kept, tensors = saved[: len(keeps)], saved[len(keeps) :]
        call = backward.record(grad, *kept, forward.record(*tensors, *ctx.rest))
        if backends.launches_backward_directly(grad) and not torch.is_grad_enabled():
            found = backward.run(call)
        else:  # the operator refuses the derivative that whoever keeps the backward's graph may ask
            pairs = zip(backward.dispatch(call), tensors, strict=True)
            found = tuple(g if t is not None and g.shape == t.shape else None for g, t in pairs)
        first = found[0]
        return [first if g is None and t is not None else g for g, t in zip(found, tensors)]  # noqa: B905

    forward.differentiate(setup, gradients, returns=1)

    def refuse(ctx: Any, *_: Any) -> Any:
        raise InputError(
            f"{forward.name} is differentiable once, its kernels have no second derivative; for "
            "higher derivatives run it under fastdiff.backend('reference')"
        )

    torch.library.register_autograd(f"fastdiff::{backward.name}", refuse, lib=_LIBRARY)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride()


# --- Records and operators' arguments ---------------------------------------------------------


def _fields(record: Any) -> Iterator[str]:
    """The operator's arguments for a record's fields."""
    for name, kind in typing.get_type_hints(record).items():
        if kind is Counters:
            yield counters.SCHEMA
        elif hasattr(kind, "_fields"):
            yield from _fields(kind)
        else:
            yield f"{_SCHEMAS[kind]} {name}"


def _flat(record: Any) -> list[Any]:
    """A record's values as the operator takes them."""
    values: list[Any] = []
    for value in record:
        if isinstance(value, Counters):
            values += value.flat()
        elif isinstance(value, tuple):
            values += _flat(value)
        else:
            values.append(value)
    return values


def _built(record: Any, values: Iterator[Any]) -> Any:
    """The inverse of ``_flat``."""
    if record is Counters:
        return Counters.joined(*itertools.islice(values, 4))
    kinds = typing.get_type_hints(record).values()
    return record(*(_built(k, values) if hasattr(k, "_fields") else next(values) for k in kinds))
