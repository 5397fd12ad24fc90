"""Tensors of which each rank holds a part (FSDP2's DTensors), beside plain ones: every function
here takes both."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_spread(tensor: Any) -> bool:
    """Whether other ranks hold other parts of it."""
    return hasattr(tensor, "full_tensor")


def any_spread(tensors: Iterable[Any]) -> bool:
    return any(map(is_spread, tensors))


def local(tensor: Any) -> Tensor:
    """This rank's part, which shares its memory."""
    return tensor.to_local() if is_spread(tensor) else tensor


def together(tensor: Any) -> Tensor:
    """All of it, where it is: a call that all ranks make together."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def whole(tensor: Any, *, copy: bool = False) -> Tensor:
    """All of it; where it was spread, in the CPU's memory of rank 0, while the others are left with
    zeros that take none: a call that all ranks make together.

    copy: in memory of its own, the CPU's, where it was not spread either.
    """
    if is_spread(tensor):
        found = together(tensor.detach())
        if torch.distributed.get_rank() == 0:
            return found.cpu()
        return torch.zeros((), dtype=found.dtype).expand(found.shape)
    return tensor.detach().to("cpu", copy=True) if copy else tensor


def placed(tensor: Tensor, like: Any) -> Tensor:
    """``tensor``, the same on every rank, spread as ``like`` is; says nothing to other ranks."""
    if not is_spread(like) or is_spread(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    on_device = tensor.detach().to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def spread(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Spread the network's parameters over all ranks, in place: ``fully_shard``, block by block.

    Each rank keeps its part in the parameters' own dtype; a block's are gathered, in ``dtype``
    (None: their own), when it runs. A block is an item of an ``nn.ModuleList``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # The network's inputs keep their dtype: timesteps of bfloat16 would be others.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for parameter in model.parameters():  # which it takes in one layout alone
        parameter.data = parameter.data.contiguous()
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # After a forward of its own, a preview's, the parameters must be in parts again.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def _blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The items of module lists, those inside others first."""
    for child in model.children():
        yield from _blocks(child)
        if isinstance(model, nn.ModuleList) and next(child.parameters(), None) is not None:
            yield child


def plain_class(network: nn.Module) -> type[nn.Module]:
    """The network's class as it was before its parameters were spread."""
    kinds = (k for k in type(network).__mro__ if not k.__module__.startswith("torch.distributed."))
    return next(kind for kind in kinds if issubclass(kind, nn.Module))
