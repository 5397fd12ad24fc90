"""What an optimizer and a scheduler remember, as tensors by name and JSON: no pickles.

A value that JSON has no form for (a tuple, a Counter of milestones) is put back in the form that
the object it is put into has at that place.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.parts import Like
from fastdiff.errors import InputError
from fastdiff.models.shards import is_spread, placed

Optimizer = torch.optim.Optimizer
NOT_NUMBERS = ("params", "param_names")  # of a group


def plain(value: Any, where: str | None) -> Any:
    """``value``, the state of ``where``, for JSON; a number on a device is waited for."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [plain(item, where) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: plain(item, where) for key, item in value.items()}
        return [[plain(key, where), plain(item, where)] for key, item in value.items()]
    raise InputError(
        f"the state of {where} holds a {type(value).__name__}, which no checkpoint can: expected "
        "numbers, text and lists of them (and tensors by parameter)"
    )


def of_form(value: Any, like: Any) -> Any:
    """What ``plain`` was given, in the form of ``like``."""
    if isinstance(like, Tensor):
        return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(like.shape)
    if isinstance(value, dict):
        known = like if isinstance(like, dict) else {}
        return {key: of_form(item, known.get(key)) for key, item in value.items()}
    if isinstance(value, list) and isinstance(like, dict):
        return type(like)({key: item for key, item in value})
    if isinstance(value, list):
        forms = like if isinstance(like, list | tuple) else ()
        forms = [*forms, *[None] * len(value)]
        items = [of_form(item, form) for item, form in zip(value, forms, strict=False)]
        return tuple(items) if isinstance(like, tuple) else items
    return value


def check_groups(optimizer: Optimizer) -> None:
    """InputError where the numbers of a group cannot be saved."""
    optimizer_groups(optimizer)


def optimizer_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The numbers of the optimizer's groups, for JSON."""
    return [
        plain({name: v for name, v in group.items() if name not in NOT_NUMBERS}, _name(optimizer))
        for group in optimizer.param_groups
    ]


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the optimizer's state, as ``<parameter>.<moment>``."""
    return {
        f"{name}.{moment}": value
        for name, moments in _states(optimizer, model)
        for moment, value in moments.items()
        if isinstance(value, Tensor)
    }


def optimizer_values(optimizer: Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    """The rest of the optimizer's state, by parameter, for JSON."""
    found = {
        name: {
            moment: plain(value, _name(optimizer))
            for moment, value in moments.items()
            if not isinstance(value, Tensor)
        }
        for name, moments in _states(optimizer, model)
    }
    return {name: values for name, values in found.items() if values}


def _states(optimizer: Optimizer, model: nn.Module) -> list[tuple[str, Mapping[str, Any]]]:
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for key in optimizer.state:
        if key not in names:
            raise InputError(
                f"a {_name(optimizer)} keeps a state of {key!r}, which no checkpoint can hold: "
                "expected states of parameters alone"
            )
    return [(names[parameter], moments) for parameter, moments in optimizer.state.items()]


def moments_like(model: nn.Module) -> Like:
    """What each tensor of ``optimizer_tensors`` is read into, before the optimizer has any: a
    parameter's twin, in parts where the parameter is, or one of its own shape."""
    parameters = dict(model.named_parameters())

    def like(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        parameter = parameters.get(name.rpartition(".")[0])
        if parameter is None or parameter.shape != shape:
            return torch.empty(shape, dtype=dtype)
        return torch.empty_like(parameter.detach(), dtype=dtype)

    return like


def load_optimizer(
    optimizer: Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Mapping[str, Any]],
    groups: list[dict[str, Any]] | None,
) -> None:
    """Put back what ``optimizer_tensors`` and ``optimizer_values`` gave, and what
    ``optimizer_groups`` did (None: the groups stay as they are).

    InputError where a parameter, a shape or the number of groups is another optimizer's.
    """
    parameters = dict(model.named_parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {parameter: index for index, parameter in enumerate(held)}
    state: dict[int, dict[str, Any]] = {}
    moments = [(*key.rpartition(".")[::2], value) for key, value in tensors.items()]
    moments += [(name, key, v) for name, found in values.items() for key, v in found.items()]
    for name, moment, value in moments:
        parameter = parameters.get(name)
        if parameter is None or parameter not in index_of:
            raise InputError(f"the optimizer state has {name!r}, which the network has not")
        if isinstance(value, Tensor):
            value = _moment(name, value, parameter)
        state.setdefault(index_of[parameter], {})[moment] = value
    packed = optimizer.state_dict()["param_groups"]
    if groups is not None:
        if len(groups) != len(packed):
            raise InputError(
                f"the optimizer has {len(packed)} groups of parameters, the checkpoint's had "
                f"{len(groups)}: make it as it was made when the run was started"
            )
        packed = [
            {**form, **of_form(numbers, form)} for form, numbers in zip(packed, groups, strict=True)
        ]
    optimizer.load_state_dict({"state": state, "param_groups": packed})


def _moment(name: str, value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of the state as the optimizer had it: a parameter's twin, a number, or a factor."""
    if value.dim() == parameter.dim() and value.shape != parameter.shape:
        of_axes = zip(value.shape, parameter.shape, strict=True)
        if any(mine not in (1, theirs) for mine, theirs in of_axes):  # Adafactor's are of one axis
            raise InputError(
                f"the optimizer state of {name!r} has shape {tuple(value.shape)}, "
                f"the network's is {tuple(parameter.shape)}"
            )
    if value.shape != parameter.shape or not value.dim():
        return value
    if is_spread(parameter):
        return placed(value, parameter)
    # Files have no strides; the fused optimizer walks weights and moments side by side.
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__
