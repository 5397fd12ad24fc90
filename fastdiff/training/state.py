"""What a resumed run needs beyond weights and averages."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.errors import InputError
from fastdiff.models.shards import is_spread, placed

_DOOMED = ".deleting"


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints (0 keeps every one).

    Renamed first, so that a kill never leaves half a checkpoint under a name that counts.
    """
    doomed = list_checkpoints(run_dir)[:-keep] if keep else []
    for path in doomed:
        path.rename(path.with_name(f".{path.name}{_DOOMED}"))
    for leftover in (run_dir / "checkpoints").glob(f".step_*{_DOOMED}"):
        shutil.rmtree(leftover, ignore_errors=True)


def parameter_names(model: nn.Module) -> list[str]:
    """Names of the trained parameters in the order the optimizer holds them."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter>.<moment>`` tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}.{moment}": value
        for index, moments in state.items()
        for moment, value in moments.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what ``optimizer_tensors`` gave; InputError where a shape is another model's."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    order = {name: index for index, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(".")
        if name not in parameters:
            raise InputError(f"the optimizer state has {name!r}, which the network has not")
        parameter = parameters[name]
        if value.dim() and value.shape != parameter.shape:
            raise InputError(
                f"the optimizer state of {name!r} has shape {tuple(value.shape)}, "
                f"the network's is {tuple(parameter.shape)}"
            )
        # Files have no strides; the fused optimizer walks weights and moments side by side.
        if value.dim() and is_spread(parameter):
            value = placed(value, parameter)
        elif value.dim():
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(order[name], {})[moment] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``prefixed``, on a dict that holds several prefixes."""
    head = prefix + "."
    return {n.removeprefix(head): tensor for n, tensor in tensors.items() if n.startswith(head)}
