"""A network's keyword arguments: their tensors, doubled for guidance, compared for capture."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.models.wrappers import attribute_of


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in (nested) keyword arguments, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(part)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``change`` of each of its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [map_tensors(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def narrowed(value: Any, batch: int, count: int) -> Any:
    """For ``count`` samples in place of ``batch``: of tensors whose first dimension is the batch,
    the first ones."""

    def of(tensor: Tensor) -> Tensor:
        return tensor[:count] if tensor.dim() > 0 and tensor.shape[0] == batch else tensor

    return map_tensors(of, value)


class Unknown(Exception):
    """``structure`` cannot tell whether a value is still the same; says why."""


def structure(value: Any, name: str) -> Any:
    """All of keyword arguments but their tensors' values, to be compared."""
    if isinstance(value, Tensor):
        return (Tensor, value.shape, value.dtype, value.stride(), value.device)
    if isinstance(value, Mapping):
        return tuple((key, structure(value[key], f"{name}[{key!r}]")) for key in value)
    if isinstance(value, list | tuple):
        parts = tuple(structure(part, f"{name}[{i}]") for i, part in enumerate(value))
        return (type(value).__name__, parts)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return (type(value).__name__, value)
    raise Unknown(f"{name} is a {type(value).__name__}, whose changes a CUDA graph would not see")


def doubled_kwargs(
    model: Any, count: int, given: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the network is passed under guidance: for a batch of 2N, unconditional half second."""
    uncond = dict(uncond_kwargs or {})
    null_label = attribute_of(model, "null_label")
    if "y" in given and "y" not in uncond and null_label is not None:
        if not isinstance(given["y"], Tensor):
            raise InputError(f"labels y are a {type(given['y']).__name__}; expected a tensor (N,)")
        uncond["y"] = torch.full_like(given["y"], null_label)
    if not uncond:
        raise InputError(
            "guidance needs to know what unconditional means: a model with a null class (a module "
            "that holds one, not a function) and labels y in model_kwargs, or uncond_kwargs"
        )
    return _double("", given, uncond, count)


def _double(name: str, value: Any, uncond: Any, count: int) -> Any:
    """The conditional and the unconditional value of one keyword argument, or of a dict of them."""
    if isinstance(value, Mapping) and (uncond is None or isinstance(uncond, Mapping)):
        others = uncond or {}
        unknown = sorted(set(others) - set(value))
        if unknown:
            raise InputError(f"uncond_kwargs{name} has {unknown[0]!r}, which model_kwargs has not")
        return {
            key: _double(f"{name}[{key!r}]", part, others.get(key), count)
            for key, part in value.items()
        }
    batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
    if not batched:
        if uncond is None:
            return value
        raise InputError(
            f"model_kwargs{name} has an unconditional counterpart, so it must be a tensor "
            f"whose first dimension is the batch, {count}"
        )
    other = value if uncond is None else uncond
    if not isinstance(other, Tensor) or other.shape != value.shape:
        came = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
        raise InputError(
            f"uncond_kwargs{name} is {came}; expected the shape of model_kwargs{name}, "
            f"{tuple(value.shape)}"
        )
    return torch.cat([value, other.to(value)])
