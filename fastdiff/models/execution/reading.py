"""A network as a UNet of fastdiff: what is planned, and where its parameters are."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastdiff.models.execution import problems
from fastdiff.models.unet import UNet

_FORWARD = inspect.signature(UNet.forward)


@dataclass
class Call:
    """A call of a network: the arguments of ``UNet.forward`` in it, and what the network answers
    where that answers ``output``."""

    arguments: dict[str, Any]
    answer: Callable[[Tensor], Any] = lambda output: output


class Reading:
    """Of a UNet of fastdiff, which is one already; the readings of other codebases' networks derive
    from it (``foreign.Foreign``)."""

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def unet(self) -> UNet:
        """What says in ``unroll`` what the network computes. Its parameters may have no values."""
        assert isinstance(self.module, UNet)
        return self.module

    def difference(self) -> str:
        """Why the network is not executed as it stands; "" where it is. Eval mode or not."""
        return problems.difference(self.module)

    def disagreement(self) -> str:
        """What the network answers else than its program would, tried once; "" where nothing."""
        return ""  # the tests of the blocks' unroll see to it

    def tensors(self, layer: nn.Module, name: str) -> Sequence[Tensor]:
        """The parts, one after the other, of the parameter that a layer of ``unet`` has under that
        name."""
        return [layer.get_parameter(name)]

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        """A call of the network's forward; None for one that its own forward is to answer."""
        given = dict(_FORWARD.bind(None, *args, **kwargs).arguments)
        del given["self"]
        return Call(given)
