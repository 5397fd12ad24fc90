"""The weights a network samples with: its own, or copies in another dtype and layout."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.replicas.replica import Replica
from fastdiff.models.replicas.twin import Twin

# Autocast runs these in the lower precision, weight and bias. Copies in it change no result: they
# save the cast that every call would make. Classes derived from them may do something else.
_CAST = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class Weights:
    """The parameters that a sampler wants others of: in ``dtype`` (None: as they are), laid out.

    The copies belong to the replica's twins. ``copies()`` makes them, or brings them up to date in
    place: values that change with neither address nor version (an EMA swap, an optimizer step) are
    then seen too. The module's own parameters are never written to, nor exchanged.
    """

    def __init__(self, dtype: torch.dtype | None):
        self.low = dtype if dtype in (torch.bfloat16, torch.float16) else None

    def copies(
        self, twin: Twin, kept: Collection[nn.Parameter], channels_last: bool
    ) -> dict[str, nn.Parameter]:
        """What is to be copied of one module, copied. Parameters in ``kept`` keep their dtype;
        ``channels_last``: its weight is to be in that layout (models/layouts.py)."""
        made = {}
        for name, live, dtype, layout in self._wanted(twin.original, kept, channels_last):
            # One that was made stays: a graph outlives a parameter's replacement.
            copy = twin.copies.get(name)
            if (
                copy is None
                or (copy.shape, copy.device) != (live.shape, live.device)
                or (copy.dtype, copy.stride()) != (dtype, _strides(live, layout))
            ):
                empty = torch.empty_like(live, dtype=dtype, memory_format=layout)
                copy = nn.Parameter(empty, requires_grad=False)
            copy.copy_(live)
            made[name] = copy
        return made

    def _wanted(
        self, part: nn.Module, kept: Collection[nn.Parameter], channels_last: bool
    ) -> Iterator[tuple[str, Tensor, torch.dtype, torch.memory_format]]:
        """What is copied, with the copies' dtype and layout."""
        casts_here = self.low is not None and type(part) in _CAST and not part._forward_pre_hooks
        if not casts_here and not channels_last:
            return
        for name, parameter in part._parameters.items():
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                continue
            casts = casts_here and parameter.dtype == torch.float32 and parameter not in kept
            dtype = self.low if casts and self.low is not None else parameter.dtype
            last = channels_last and name == "weight"
            layout = torch.channels_last if last else torch.preserve_format
            if casts or (last and not parameter.is_contiguous(memory_format=layout)):
                yield name, parameter.detach(), dtype, layout


def signature(replica: Replica) -> tuple[Any, ...]:
    """What a captured step rests on: the modules with their hooks, where every tensor that it
    reads is, and in what form."""
    parts: list[tuple[int, ...]] = []
    tensors: list[Tensor | None] = []
    for original, part in replica.parts():
        hooks = (*part._forward_hooks, *part._forward_pre_hooks)
        forward = vars(part).get("forward")
        parts.append((id(original), *hooks, getattr(forward, "generation", 0)))  # of a program
        tensors.extend(part._parameters.values())
        tensors.extend(part._buffers.values())
        tensors.extend(getattr(forward, "tensors", ()))  # padded weights
    places = ((t.data_ptr(), t.shape, t.dtype, t.stride()) for t in tensors if t is not None)
    return tuple(parts), tuple(places)


def _strides(tensor: Tensor, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty_like(tensor, device="meta", memory_format=layout).stride()
