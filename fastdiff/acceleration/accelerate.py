"""accelerate: a model's norms and attention blocks on fused operations, in place and reversibly."""

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fastdiff.acceleration.autocast import under_autocast
from fastdiff.acceleration.example_inputs import example_inputs
from fastdiff.acceleration.families import FAMILIES
from fastdiff.acceleration.fused_class import (
    Fusion,
    Kinds,
    Refused,
    Trials,
    agreement,
    bypassed,
    check_removable,
    exchange,
    put_back,
)
from fastdiff.acceleration.outcome import Part, Report
from fastdiff.acceleration.pieces import seed
from fastdiff.checks import check_float
from fastdiff.errors import InputError
from fastdiff.models.fused import Fused
from fastdiff.models.layouts import plain_convolutions
from fastdiff.models.replicas.replica import replica_of

M = TypeVar("M", bound=nn.Module)
F = TypeVar("F", bound=Callable[..., Any])
LAST = torch.channels_last
LINEAR = "linearattention"
DTYPES = (torch.bfloat16, torch.float16)
# Of outputs over the largest output, after float32 and after a lower dtype.
MOST_ERROR, MOST_LOW_ERROR = 1e-3, 5e-2


@dataclass
class _Record:
    """What ``restore`` undoes beside the classes."""

    report: Report
    exchanged: list[weakref.ref[nn.Module]] = field(default_factory=list)
    laid_out: list[weakref.ref[nn.Module]] = field(default_factory=list)  # convolutions


_records: "weakref.WeakKeyDictionary[nn.Module, _Record]" = weakref.WeakKeyDictionary()


_changing = threading.RLock()


def _one_at_a_time(function: F) -> F:
    """Of several threads that change models, perhaps the same one."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _changing:
            return function(*args, **kwargs)

    return cast(F, alone)


@_one_at_a_time
def accelerate(
    model: M,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    verify: bool | Sequence[Any] = False,
) -> M:
    """Let a model run on fused operations; returns the model itself, changed in place.

    Known are the blocks of improved-diffusion, guided-diffusion, GLIDE, diffusers, latent diffusion
    and denoising-diffusion-pytorch (by their parts, so copies of them too: each is tried with
    random weights and left alone where it computes something else), GroupNorm before SiLU in any
    ``nn.Sequential``, and modules in whose forward torch.fx finds GroupNorm, perhaps FiLM, and
    SiLU. What is not understood is left alone, and so is a call that gives a block arguments its
    fused forward was not tried with: the block's own forward answers it.

    Parameters keep their names and, but for ``channels_last``, their storage; ``state_dict()`` is
    the original's; pickles and ``torch.save`` of the model are the original's too. Hooks on, and
    exchanges of, the modules inside a fused one are seen, and so are attributes that change: that
    one then runs as it did before. ``fastdiff.report(model)`` tells what was fused,
    what was left and why; :func:`restore` undoes it all.

    Args:
        model: any module; training works too.
        dtype: torch.bfloat16 or float16: the model runs under autocast of it and answers in the
            dtype of its first tensor. Its weights stay as they are.
        channels_last: weights of plain 2-D convolutions in that layout, which they then run in:
            faster on most machines. Not those that an adapter, a parametrization or another layer
            reads too. ``state_dict()`` has contiguous copies of these weights then, since no stock
            checkpoint has others; what writes into it does not reach the model.
        verify: run the model on the same inputs before and after, print the report with the error,
            and keep the changes only where the outputs agree: to 1e-3 of the largest output, 5e-2
            with ``dtype``. True where the model's own configuration tells its inputs, else a tuple
            of positional arguments.

    Raises:
        InputError: no module; a dtype that is none of these; inputs that are not known; outputs
            that differ by more. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected torch.bfloat16, float16 or None")
    if model in _records or isinstance(model, Fused):
        raise InputError(f"this {type(model).__name__} is accelerated; restore it first")
    inputs = None
    if verify is not False:
        inputs = example_inputs(model) if verify is True else _given(verify)
        expected = _run(model, inputs)
        if not any(tensor.any() for tensor in expected):
            raise InputError(
                "the model answers zeros, which verify nothing; load its weights first"
            )
    record = _records[model] = _Record(Report(type(model).__name__))
    try:
        seed()
        _fuse(model, record)
        if channels_last:
            _to_channels_last(model, record)
        if dtype is not None:
            _exchange(model, under_autocast(model, dtype), record)
            record.report.settings.append(f"runs under autocast of {dtype}")
        if inputs is not None:
            error = record.report.error = _difference(_run(model, inputs), expected)
            most = MOST_ERROR if dtype is None else MOST_LOW_ERROR
            if not error <= most:
                raise InputError(
                    f"accelerated, the model's output differs by {error:.1e} of the largest, more "
                    f"than {most:g}; the model was put back"
                )
            print(record.report)
    except BaseException:
        restore(model)
        raise
    return model


@_one_at_a_time
def restore(model: M) -> M:
    """Undo :func:`accelerate` (also on a deep copy of an accelerated model); returns the model.

    InputError, and nothing is changed, for a model that is not accelerated, and for one of whose
    accelerated modules somebody changed the class since (a parametrization, for one).
    """
    record = _records.get(model)
    fused: list[Any] = [part for part in model.modules() if isinstance(part, Fused)]
    exchanged = fused if record is None else [reference() for reference in record.exchanged]
    for part in exchanged:
        check_removable(part)
    if record is None:
        if not fused:
            raise InputError(f"this {type(model).__name__} is not accelerated; nothing to restore")
        for part in fused:
            while isinstance(part, Fused):
                put_back(part)
    else:
        del _records[model]
        for part in reversed(exchanged):
            put_back(part)
        for layer in filter(None, (reference() for reference in record.laid_out)):
            weight = layer._parameters.get("weight")
            if weight is not None:
                weight.data = weight.data.contiguous()
    return model


def report(model: nn.Module) -> Report:
    """What :func:`accelerate` did to this model: ``print(fastdiff.report(model))``.

    InputError for a model that is not accelerated.
    """
    if model not in _records:
        raise InputError(f"this {type(model).__name__} is not accelerated; nothing to report")
    return _records[model].report


def is_accelerated(model: nn.Module) -> bool:
    """By an ``accelerate`` of its own, or as the copy of a model that is."""
    return model in _records or any(isinstance(part, Fused) for part in model.modules())


def _exchange(
    module: nn.Module, fusion: Fusion, record: _Record, known: Kinds | None = None
) -> None:
    exchange(module, fusion, known)
    record.exchanged.append(weakref.ref(module))


def _fuse(model: nn.Module, record: _Record) -> None:
    """Exchange the classes of what is understood, outer modules first."""
    report = record.report
    inside: set[nn.Module] = set()  # what a fused module computes itself
    for name, module in list(model.named_modules()):
        if module in inside:
            continue
        if isinstance(module, Fused):  # by an accelerate of its own
            inside.update(bypassed(module))
            continue
        if type(module).__module__.startswith("fastdiff."):
            inside.update(module.modules())
            how = "runs on fused operations by itself"
            report.left.append(Part(name or "the model", type(module).__name__, how))
            continue
        fusion, known, reason = _fusion_of(module)
        part = Part(name or "the model", type(module).__name__, fusion.how if fusion else reason)
        if fusion is not None:
            inside.update(module.get_submodule(path) for path in fusion.bypassed)
            _exchange(module, fusion, record, known)
            report.replaced.append(part)
        elif reason:
            report.left.append(part)
    report.left.extend(_unknown_attention(model, inside, report))
    report.others.extend(_without_operation(model, inside, report))


def _unknown_attention(model: nn.Module, inside: set[nn.Module], report: Report) -> list[Part]:
    """Attention, by the class's name, in which the report names none yet."""
    named = [part.name for part in (*report.replaced, *report.left) if "atten" in part.kind.lower()]
    found: list[Part] = []
    for name, module in reversed(list(model.named_modules())):  # inner ones first
        kind = type(module).__name__
        attends = "attention" in kind.lower() or kind.lower().endswith(("attn", "attnblock"))
        attends = attends and LINEAR not in kind.lower()
        if module in inside or isinstance(module, Fused) or not attends:
            continue
        within = f"{name}." if name else ""
        if not any(f"{other}.".startswith(within) for other in named):
            named.append(name)
            found.append(Part(name or "the model", kind, "no attention block that is known"))
    return [part for part in found[::-1] if part.name not in {left.name for left in report.left}]


def _without_operation(model: nn.Module, inside: set[nn.Module], report: Report) -> list[Part]:
    """Norms that hold no other norm, and linear attention, by the class's name, that the report
    does not name."""
    named = {part.name for part in (*report.replaced, *report.left)}
    found: list[Part] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        holds_norm = any("norm" in type(child).__name__.lower() for child in module.children())
        is_norm = "norm" in kind.lower() and not holds_norm
        if module in inside or isinstance(module, Fused) or name in named:
            continue
        if is_norm or LINEAR in kind.lower():
            plain = isinstance(module, nn.GroupNorm)
            how = "it has no weight and bias" if plain else "fastdiff has no operation for it"
            found.append(Part(name or "the model", kind, how))
    return found


def _fusion_of(module: nn.Module) -> tuple[Fusion | None, Kinds | None, str]:
    """How to fuse it and for what arguments, or why not ("" for what has nothing to fuse)."""
    reason = ""
    for family in FAMILIES:
        try:
            for fusion, trials in family.fusions(module):
                try:
                    return fusion, _known(module, fusion, trials), ""
                except Refused as refused:
                    reason = str(refused)
        except Refused as refused:
            reason = reason or str(refused)
    return None, None, reason


def _known(module: nn.Module, fusion: Fusion, trials: Trials) -> Kinds | None:
    """Where there is nothing to try, arguments of any kind."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return agreement(module, fusion, _to(trials, device)) if trials else None


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_to(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _to_channels_last(model: nn.Module, record: _Record) -> None:
    for layer in plain_convolutions(model):
        weight = layer.get_parameter("weight")
        if weight.is_contiguous(memory_format=LAST) or not weight.is_contiguous():
            continue
        weight.data = weight.data.contiguous(memory_format=LAST)
        record.laid_out.append(weakref.ref(layer))
    if record.laid_out:
        count = len(record.laid_out)
        record.report.settings.append(f"{count} weights in channels_last")
        options = (("inner", type(model)),)
        fusion = Fusion(
            "", _contiguous_state_dict, method="state_dict", options=options, wraps=True
        )
        _exchange(model, fusion, record)


def _contiguous_state_dict(
    self: nn.Module, *args: Any, inner: type[nn.Module], **kwargs: Any
) -> dict[str, Any]:
    """safetensors takes no other tensors, and a stock checkpoint has none."""
    state = inner.state_dict(self, *args, **kwargs)
    for name, value in state.items():
        if isinstance(value, Tensor) and name.startswith(kwargs.get("prefix", "")):
            state[name] = value.contiguous()
    return state


# --- verify -----------------------------------------------------------------------------------


def _given(verify: Any) -> tuple[Any, ...]:
    if not isinstance(verify, tuple | list) or not verify:
        raise InputError(
            f"verify is a {type(verify).__name__}; expected True, False or a tuple of the model's "
            "arguments"
        )
    return tuple(verify)


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of the model's output in eval mode."""
    with replica_of(model) as replica, torch.no_grad():
        output = replica(*inputs)
    output = getattr(output, "sample", output)
    tensors = list(output) if isinstance(output, tuple | list) else [output]
    for tensor in tensors:
        check_float(tensor, "the model's output")
    return [tensor.float() for tensor in tensors]


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference over the largest value; infinite for NaN where none was."""
    errors = []
    for a, b in zip(actual, expected, strict=True):
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-12)
        errors.append(float(torch.nan_to_num(error, nan=float("inf"))))
    return max(errors)
