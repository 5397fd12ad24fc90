"""The weights a network samples with: its own, or copies in another dtype and layout."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Autocast runs these in the lower precision. Copies of their weights in it change no result: they
# save the cast that every call would make.
_CAST = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class Weights:
    """A module's parameters as a sampler wants them: ``dtype`` (None: as they are), layout.

    ``refresh()`` makes the copies, or brings them up to date in place: values that change with
    neither address nor version (an EMA swap, an optimizer step) are then seen too. ``in_use()``
    puts them into the module; outside of it the module is as its owner left it.
    """

    def __init__(self, module: nn.Module | None, dtype: torch.dtype | None, channels_last: bool):
        self.module, self.dtype, self.channels_last = module, dtype, channels_last
        self.by_name: dict[str, Tensor] = {}  # so that a graph outlives a parameter's replacement
        self.copies: dict[nn.Parameter, Tensor] = {}
        self.depth = 0

    def refresh(self, kept: Collection[nn.Parameter] = ()) -> None:
        """Copy what is to be copied. Parameters in ``kept`` keep their dtype."""
        before, self.by_name, self.copies = self.by_name, {}, {}
        for name, parameter, dtype, layout in self._wanted(set(kept)):
            live = parameter.detach()
            copy = before.get(name)
            if (
                copy is None
                or (copy.shape, copy.device) != (live.shape, live.device)
                or (copy.dtype, copy.stride()) != (dtype, _strides(live, layout))
            ):
                copy = torch.empty_like(live, dtype=dtype, memory_format=layout)
            self.by_name[name] = self.copies[parameter] = copy.copy_(live)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The copies are the module's parameters inside; may be nested."""
        if self.depth or not self.copies:
            yield
            return
        self.depth += 1
        live = {parameter: parameter.data for parameter in self.copies}
        try:
            for parameter, copy in self.copies.items():
                parameter.data = copy
            yield
        finally:
            for parameter, data in live.items():
                parameter.data = data
            self.depth -= 1

    def signature(self) -> tuple[Any, ...]:
        """What a captured step rests on: where every tensor that it reads is, and in what form."""
        if self.module is None:
            return ()
        live = [*self.module.parameters(), *self.module.buffers()]
        tensors = (self.copies.get(p, p) if isinstance(p, nn.Parameter) else p for p in live)
        return (
            tuple(id(part) for part in self.module.modules()),
            tuple((t.data_ptr(), t.shape, t.dtype, t.stride()) for t in tensors),
        )

    def _wanted(
        self, kept: set[nn.Parameter]
    ) -> Iterator[tuple[str, nn.Parameter, torch.dtype, torch.memory_format]]:
        """The parameters that are copied, with the copies' dtype and layout."""
        low = self.dtype if self.dtype in (torch.bfloat16, torch.float16) else None
        if self.module is None or (low is None and not self.channels_last):
            return
        for part in self.module.modules():
            if not isinstance(part, _CAST):  # it may use a convolution's weight too, as it is
                kept.update(part.parameters(recurse=False))
        for name, parameter in self.module.named_parameters():
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                continue
            casts = low is not None and parameter.dtype == torch.float32 and parameter not in kept
            dtype = low if casts and low is not None else parameter.dtype
            last = self.channels_last and parameter.dim() == 4
            layout = torch.channels_last if last else torch.preserve_format
            if casts or (last and not parameter.is_contiguous(memory_format=layout)):
                yield name, parameter, dtype, layout


def _strides(tensor: Tensor, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty_like(tensor, device="meta", memory_format=layout).stride()
