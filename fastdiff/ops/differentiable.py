"""Kernels as PyTorch knows them: operators that compilers, modes and profilers see, and gradients.

A kernel takes one record, a NamedTuple that begins with its tensors, and fills the outputs that
``allocate`` makes for it. From those two come the operator with its schema, its fake and what runs.
Where nobody listens and no subclass is among the tensors, a call goes past PyTorch's dispatcher,
which halves its cost.
"""

import operator
import typing
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops import backends
from fastdiff.ops.counters import SCHEMA, Counter, Counters

Outputs = tuple[Any, ...]  # tensors, or None where one is not wanted
Written = Annotated[Tensor | None, "in place"]  # a record's field that its kernel writes, or None
LARGEST_CACHE = 2048

_LIBRARY = torch.library.Library("fastdiff", "FRAGMENT")
_SCHEMAS: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", float | None: "float?",
    bool: "bool", str: "str",
}  # fmt: skip
_TENSORS = (Tensor, Tensor | None, Written)


class Launch:
    """A launch in two parts: ``prepared(*tensors, *outputs)`` looks up where these are, and answers
    what runs there, as often as it is called."""

    def __init__(self, prepared: Callable[..., Callable[[], Any]]) -> None:
        self.prepared = prepared

    def __call__(self, *given: Any) -> None:
        self.prepared(*given)()


class Kernel:
    """An operation's kernels: ``fastdiff::name`` for PyTorch, and a launch of its own beside it.

    ``record`` is a NamedTuple of tensors, ``Written`` where the kernel writes them in place, then
    of numbers and names, and of the fields of Counters at the end or nowhere. ``allocate(call)``
    makes the outputs (N of them; the operator returns an empty tensor in the place of None),
    ``plan(call)`` what fills them: ``launch(*tensors, *outputs, *counters)`` is kept for calls
    alike, as is that ``check(call)`` refused nothing: both look at shapes, strides, dtypes and
    devices of the tensors, at numbers and names, and of counters at whether there is a seed.
    ``readable(call)`` is the call with copies of the tensors that no kernel reads as they stand.
    """

    def __init__(
        self,
        name: str,
        record: Any,
        allocate: Callable[..., Outputs],
        plan: Callable[[Any], Callable[..., None]],
        check: Callable[[Any], None] = lambda call: None,
        readable: Callable[[Any], Any] = lambda call: call,
        outputs: int = 1,
    ) -> None:
        self.name, self.record, self.allocate = name, record, allocate
        self.plan, self.check, self.copies = plan, check, readable
        fields = typing.get_type_hints(record, include_extras=True)
        self.kinds = list(fields.values())
        self.tensors = sum(kind in _TENSORS for kind in self.kinds)
        self.written = [place for place, kind in enumerate(self.kinds) if kind == Written]
        self.counted = self.kinds[-1] == Counter
        self.plain = len(self.kinds) - len(Counters._fields) * self.counted  # what is no counter
        self.plans: dict[tuple, Any] = {}
        self.eager: Any = None  # an autograd Function's apply, where there are gradients
        plain = list(fields)[: self.plain]
        schema = [f"{self._schema(i)} {field}" for i, field in enumerate(plain)]
        schema += [SCHEMA] * self.counted
        returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
        _LIBRARY.define(f"{name}({', '.join(schema)}) -> {returns}")
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, lambda *values: self._operate(self.run, values), key)
        fake = lambda *values: self._operate(self.allocate, values)  # noqa: E731
        torch.library.register_fake(f"fastdiff::{name}", fake, lib=_LIBRARY)
        self.operator = getattr(torch.ops.fastdiff, name).default

    def __call__(self, call: Any, wants_gradient: bool = False) -> Outputs:
        """The outputs; ``wants_gradient``: autograd will ask for one."""
        if not backends.launches_directly(*call[: self.tensors]):
            self.check(call)
            return self.dispatch(call)
        return self.eager(*call) if wants_gradient else self.run(call)

    def run(self, call: Any, outputs: Outputs | None = None) -> Outputs:
        """``outputs``: where the results are to stand, in place of new memory."""
        tensors = call[: self.tensors]
        launch = self._launch(call, tensors)
        outputs = self.allocate(call) if outputs is None else outputs
        if launch is None:
            copies = self.readable(call)
            found = zip(outputs, self.run(copies), strict=True)
            for i in self.written:
                if call[i] is not None:
                    call[i].copy_(copies[i])
            return tuple(None if room is None else room.copy_(v) for room, v in found)
        given = (*tensors, *outputs, *call[self.plain :])
        if tensors[0].is_cpu:
            launch(*given)
        else:
            with backends.device_of(tensors[0]):
                launch(*given)
        for i in self.written:  # autograd may hold them for a backward
            if tensors[i] is not None and not tensors[i].is_inference():
                torch.autograd.graph.increment_version(tensors[i])
        return outputs

    def bound(self, call: Any, outputs: Outputs) -> Callable[[], Any] | None:
        """``call`` again and again, from and to the memory where its tensors and ``outputs`` are
        now, which the caller keeps; None where the kernels do not read them as they stand."""
        launch = self._planned(call)
        if launch is None:
            return None
        prepared = launch.prepared if isinstance(launch, Launch) else partial(partial, launch)
        return prepared(*call[: self.tensors], *outputs)

    def _launch(self, call: Any, tensors: tuple[Any, ...]) -> Any:
        """What fills the outputs of calls like this one; None where kernels read copies only."""
        described = [  # to ask whether it is contiguous costs less than its strides
            None if v is None else (v.shape, v.dtype, v.device, v.is_contiguous() or v.stride())
            for v in tensors
        ]
        key = (*described, *call[self.tensors : self.plain], self.counted and call.seed is None)
        launch = self.plans.get(key, self)
        if launch is self:
            self.check(call)
            if len(self.plans) >= LARGEST_CACHE:
                self.plans.clear()
            launch = self.plans[key] = self._planned(call)
        return launch

    def _planned(self, call: Any) -> Callable[..., None] | None:
        if call[0].numel() == 0:  # gradients of parameters are sums of nothing
            return self._zero
        return self.plan(call) if self.readable(call) is call else None

    def _zero(self, *given: Any) -> None:
        for output in given[self.tensors :]:
            if isinstance(output, Tensor):
                output.zero_()

    def readable(self, call: Any) -> Any:
        """The call itself where kernels read it as it stands, else on copies."""
        copies = self.copies(call)
        return call if all(map(operator.is_, call, copies)) else copies

    def dispatch(self, call: Any) -> Outputs:
        """The outputs through PyTorch's dispatcher."""
        counters = Counters(*call[self.plain :]).flat() if self.counted else ()
        outputs = self.operator(*call[: self.plain], *counters)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    def _schema(self, place: int) -> str:
        """The type of the record's field at ``place``."""
        if place in self.written:
            return f"Tensor({'abcdefgh'[self.written.index(place)]}!)?"
        return _SCHEMAS[self.kinds[place]]

    def _operate(self, function: Callable[[Any], Outputs], values: tuple[Any, ...]) -> Any:
        """``function`` as an operator has it: of flat values, to tensors."""
        call = self._built(values)
        outputs = tuple(call[0].new_empty(0) if v is None else v for v in function(call))
        return outputs if len(outputs) > 1 else outputs[0]

    def _built(self, flat: tuple[Any, ...]) -> Any:
        """The record of an operator's values."""
        counters = Counters.joined(*flat[self.plain :]) if self.counted else ()
        return self.record(*flat[: self.plain], *counters)

    def differentiate(self, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Gradients: ``setup(ctx, call, outputs)`` keeps what ``backward(ctx, grad)`` needs for the
        gradients of the record's tensors from that of the first output. The others have none."""

        def keep(ctx: Any, call: Any, outputs: Outputs, inputs: int) -> None:
            ctx.inputs = inputs
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(v for v in outputs[1:] if v is not None))
            setup(ctx, call, outputs)

        def keep_flat(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = (output,) if isinstance(output, Tensor) else output
            keep(ctx, self._built(inputs), outputs, len(inputs))

        def gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
            given = (None,) * self.tensors if grad is None else tuple(backward(ctx, grad))
            return given + (None,) * (ctx.inputs - self.tensors)

        torch.library.register_autograd(
            f"fastdiff::{self.name}", gradients, setup_context=keep_flat, lib=_LIBRARY
        )

        def forward(ctx: Any, *values: Any) -> Outputs:
            call = self.record(*values)
            outputs = self.run(call)
            keep(ctx, call, outputs, len(values))
            return outputs

        # The same in eager mode, for a fifth of what register_autograd costs per call.
        both = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
        function: Any = type(self.name, (torch.autograd.Function,), both)
        self.eager = function.apply


def differentiable_once(
    forward: Kernel,
    allocate: Callable[..., Outputs],
    plan: Callable[[Any], Callable[..., None]],
    *,
    keeps: dict[str, int],
) -> None:
    """Give ``forward`` the gradients that a kernel ``forward.name``_backward computes, and refuse
    those of gradients.

    That kernel's record is ``grad``, the first output's gradient, the outputs that ``keeps`` names
    and numbers, and the fields of ``forward``'s. Its outputs are the gradients of ``forward``'s
    tensors, None for a tensor whose gradient is that of the first (a residual).
    """
    count, first = forward.tensors, 1 + len(keeps)  # of forward's fields
    fields = {"grad": Tensor, **dict.fromkeys(keeps, Tensor)}
    fields |= typing.get_type_hints(forward.record)
    record = typing.cast(Any, typing.NamedTuple)("Backward", list(fields.items()))

    def readable(call: Any) -> Any:
        return record(*call[:first], *forward.copies(forward.record(*call[first:])))

    name = f"{forward.name}_backward"
    backward = Kernel(name, record, allocate, plan, readable=readable, outputs=count)

    def setup(ctx: Any, call: Any, outputs: Outputs) -> None:
        ctx.save_for_backward(*(outputs[i] for i in keeps.values()), *call[:count])
        ctx.rest = call[count:]

    def gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
        call = record(grad, *ctx.saved_tensors, *ctx.rest)
        tensors = call[first : first + count]
        if backends.launches_backward_directly(grad) and not torch.is_grad_enabled():
            found = backward.run(call)
        else:  # the operator refuses the derivative that whoever keeps the backward's graph may ask
            pairs = zip(backward.dispatch(call), tensors, strict=True)
            found = tuple(g if t is not None and g.shape == t.shape else None for g, t in pairs)
        residual = found[0]
        return [residual if g is None and t is not None else g for g, t in zip(found, tensors)]  # noqa: B905

    forward.differentiate(setup, gradients)
    refuse_second_derivatives(forward, backward)


def refuse_second_derivatives(forward: Kernel, backward: Kernel) -> None:
    """Whoever asks for a gradient of ``backward``'s gradients is told so."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise InputError(
            f"{forward.name} is differentiable once, its kernels have no second derivative; for "
            "higher derivatives run it under fastdiff.backend('reference')"
        )

    torch.library.register_autograd(f"fastdiff::{backward.name}", refuse, lib=_LIBRARY)
