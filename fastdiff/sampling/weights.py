"""The weights a network samples with: its own, or copies in another dtype and layout."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Autocast runs these in the lower precision, weight and bias. Copies in it change no result: they
# save the cast that every call would make. Classes derived from them may do something else.
_CAST = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
Place = tuple[nn.Module, str]  # a module and the name of a parameter of its own


class Weights:
    """A module's parameters as a sampler wants them: ``dtype`` (None: as they are), layout.

    ``refresh()`` makes the copies, or brings them up to date in place: values that change with
    neither address nor version (an EMA swap, an optimizer step) are then seen too. ``in_use()``
    puts them into the module; outside of it the module has its own parameters, which are never
    written to (autograd's and DDP's hooks on them stay).
    """

    def __init__(self, module: nn.Module | None, dtype: torch.dtype | None, channels_last: bool):
        self.module, self.channels_last = module, channels_last
        self.low = dtype if dtype in (torch.bfloat16, torch.float16) else None
        self.by_name: dict[str, nn.Parameter] = {}  # a graph outlives a parameter's replacement
        self.copies: dict[Place, nn.Parameter] = {}

    def refresh(self, kept: Collection[nn.Parameter] = ()) -> None:
        """Copy what is to be copied. Parameters in ``kept`` keep their dtype."""
        before, self.by_name, self.copies = self.by_name, {}, {}
        # A call in inference mode must not leave tensors that others cannot update.
        with torch.inference_mode(False), torch.no_grad():
            for name, place, live, dtype, layout in self._wanted(kept):
                copy = before.get(name)
                if (
                    copy is None
                    or (copy.shape, copy.device) != (live.shape, live.device)
                    or (copy.dtype, copy.stride()) != (dtype, _strides(live, layout))
                ):
                    empty = torch.empty_like(live, dtype=dtype, memory_format=layout)
                    copy = nn.Parameter(empty, requires_grad=False)
                copy.copy_(live)
                self.by_name[name] = self.copies[place] = copy

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The copies are the module's parameters inside."""
        live = {(part, name): part._parameters[name] for part, name in self.copies}
        try:
            for (part, name), copy in self.copies.items():
                part._parameters[name] = copy
            yield
        finally:
            for (part, name), parameter in live.items():
                part._parameters[name] = parameter

    def signature(self) -> tuple[Any, ...]:
        """What a captured step rests on: the modules with their hooks, where every tensor that it
        reads is, and in what form."""
        if self.module is None:
            return ()
        parts: list[tuple[int, ...]] = []
        tensors: list[Tensor | None] = []
        for part in self.module.modules():
            parts.append((id(part), *part._forward_hooks, *part._forward_pre_hooks))
            for name, parameter in part._parameters.items():
                tensors.append(self.copies.get((part, name), parameter))
            tensors.extend(part._buffers.values())
        places = ((t.data_ptr(), t.shape, t.dtype, t.stride()) for t in tensors if t is not None)
        return tuple(parts), tuple(places)

    def _wanted(
        self, kept: Collection[nn.Parameter]
    ) -> Iterator[tuple[str, Place, Tensor, torch.dtype, torch.memory_format]]:
        """What is copied, with the copies' dtype and layout."""
        if self.module is None or (self.low is None and not self.channels_last):
            return
        for prefix, part in self.module.named_modules():
            casts_here = self.low is not None and type(part) in _CAST
            casts_here = casts_here and not part._forward_pre_hooks
            for name, parameter in part._parameters.items():
                if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                    continue
                casts = casts_here and parameter.dtype == torch.float32 and parameter not in kept
                dtype = self.low if casts and self.low is not None else parameter.dtype
                last = self.channels_last and parameter.dim() == 4
                layout = torch.channels_last if last else torch.preserve_format
                if casts or (last and not parameter.is_contiguous(memory_format=layout)):
                    yield f"{prefix}.{name}", (part, name), parameter.detach(), dtype, layout


def _strides(tensor: Tensor, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty_like(tensor, device="meta", memory_format=layout).stride()
