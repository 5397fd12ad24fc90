"""A U-Net's inference as one program: planned once for calls alike, and run step by step."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.models.execution.ahead import Ahead
from fastdiff.models.execution.bound import Kept
from fastdiff.models.execution.explanation import explanation
from fastdiff.models.execution.lowering import Lowering
from fastdiff.models.execution.lowering_cuda import CudaLowering
from fastdiff.models.execution.plan import Plan
from fastdiff.models.execution.problems import DTYPES, device_of, dtype_of
from fastdiff.models.execution.program import Program
from fastdiff.models.execution.reading import Reading
from fastdiff.models.execution.weights import Weights
from fastdiff.models.unet import UNet

MOST_PLANS = 8
MOST_KEPT = 256 << 20  # bytes between calls, of packed weights and of results
LOWERINGS: dict[str, type[Lowering]] = {"cpu": Lowering, "cuda": CudaLowering}


class Executor:
    """What ``network`` answers in eval mode and without gradients, computed by fused operations.

    It reads the network's own parameters. Between ``begin()`` and ``end()``, a sampler's call, they
    are packed once, and ``refresh()`` sees what changed; outside of it every call packs them. The
    memory that the last call was computed in stays with the Executor where it is no more than
    ``MOST_KEPT``: fresh one costs as much again as the packing. On a GPU they stay where they are,
    for graphs that read them.

    Args:
        network: a UNet as its class makes it, on the CPU or on a GPU, or the ``Reading`` of such a
            network of another codebase (``fastdiff.models.readers.reading_of``).
        dtype: of activations and of the weights of convolutions, float32, bfloat16 or float64; None
            is that of the parameters. Statistics, norms and embeddings are float32 (float64).
        exact: convolutions and attention multiply float32 values themselves: not as two bfloat16
            each (AMX), nor by Winograd's algorithm, which are faster and off by some millionths of
            the largest result.

    Raises:
        InputError: a network that is not executed (``Reading.difference``), another dtype.

    Source: the blocks' own ``unroll``; Ho et al. 2020, appendix B.
    """

    def __init__(
        self, network: UNet | Reading, dtype: torch.dtype | None = None, *, exact: bool = False
    ):
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; expected torch.float32, bfloat16 or float64")
        self.reading = network if isinstance(network, Reading) else Reading(network)
        self.dtype, self.exact = dtype, exact
        self._modules: list[nn.Module] = []  # that the plans are of
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._weights: Weights | None = None
        self._weights_of: Any = None
        self._begun, self._ahead = False, Ahead()
        self._lock = threading.Lock()
        self._last: Plan | None = None
        self._check()

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """As ``UNet.forward``: (N, out_channels, *spatial) in the dtype of ``x``. Raises InputError
        for the arguments that it does."""
        output, _ = self.forward_cut(x, timesteps, y, low_res, noise_level)
        return output

    @torch.no_grad()
    def forward_cut(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
        noise_level: Tensor | None = None,
        *,
        depth: int = 0,
        deep: Kept = (),
    ) -> tuple[Tensor, Kept]:
        """As ``UNet.forward_cut``, but that the second answer is tensors (N, ...): the value, and
        what its readers want of it beside. ``deep`` is such an answer of this executor's.

        A shallow call runs a part of the whole call's steps, in the same memory and on the same
        weights.
        """
        begun, ahead = self._begun, self._ahead
        weights = self._weights if begun else None
        if weights is None:
            weights = self._weights_now()
        self.unet.check(x, timesteps, y, low_res, noise_level)
        conditions = {"y": y, "low_res": low_res, "noise_level": noise_level}
        given = {"x": x, "timesteps": timesteps}
        given |= {name: tensor for name, tensor in conditions.items() if tensor is not None}
        with torch.autocast(x.device.type, enabled=False):
            plan = self._plan({name: tensor.shape for name, tensor in given.items()}, depth)
            self._last = plan
            with weights.bound(plan) as bound:
                arguments = [given[name] for name in plan.inputs]
                output, deep = bound.run(arguments, ahead, deep)
        if not begun:
            self._let_go()
        return output.to(x.dtype), deep

    def begin(self, *, asked: bool = False, timesteps: Sequence[float] = ()) -> None:
        """Pack the weights anew, which may have changed unseen. InputError as the constructor's.

        ``asked``: ``reading.difference()`` was, just now, and found nothing. ``timesteps``: those
        of the calls to come, whose embeddings are computed together.
        """
        self._weights_of, self._weights = versions(self.reading.module), self._weights_now(asked)
        self._ahead = Ahead([*timesteps, *self._ahead.timesteps])  # of calls beside this one too
        self._begun = True

    def refresh(self, *, asked: bool = False) -> None:
        """``begin`` if a weight has been exchanged or written to."""
        if self._weights_of != versions(self.reading.module):
            self.begin(asked=asked)

    def end(self) -> None:
        """Give memory back that no graph may read, where it is more than ``MOST_KEPT``."""
        self._begun, self._ahead, self._weights_of = False, Ahead(), None
        self._let_go()

    def explain(self) -> str:
        """The operations of the last call as a list, and what each block reads and writes."""
        if self._last is None:
            return "nothing was executed yet"
        return explanation(self._last)

    @property
    def unet(self) -> UNet:
        """Whose ``unroll`` is planned."""
        return self.reading.unet

    @property
    def count(self) -> int:
        """The operations of the last call."""
        return 0 if self._last is None else len(self._last.steps)

    @property
    def generation(self) -> int:
        """A number that stays while a graph may go on reading the weights where they are."""
        return 0 if self._weights is None else self._weights.number

    def plan(self, *shape: int, depth: int = 0, **others: tuple[int, ...]) -> Plan:
        """The plan for x of this shape, and for those of ``y``, ``low_res`` and ``noise_level``
        that are given."""
        return self._plan({"x": shape, "timesteps": shape[:1], **others}, depth)

    @property
    def _lowering(self) -> type[Lowering]:
        return LOWERINGS[device_of(self.reading.module).type]

    def _weights_now(self, asked: bool = False) -> Weights:
        self._check(asked)
        kept, captured = self._weights, self._lowering.captured
        if kept is None or not (kept.refresh() if captured else kept.outdate()):
            kept = self._weights = Weights(self.reading.tensors)
        return kept

    def _let_go(self) -> None:
        kept = self._weights
        if kept is not None and not self._lowering.captured and kept.nbytes > MOST_KEPT:
            self._weights = None

    def _check(self, asked: bool = False) -> None:
        """InputError for a network that has become another one; plans are of the modules it has."""
        found = "" if asked else self.reading.difference()
        if found:
            raise InputError(f"this network is not executed as a program: {found}")
        modules = list(self.unet.modules())
        with self._lock:
            if modules != self._modules:
                self._modules = modules
                self._plans.clear()

    def _plan(self, shapes: dict[str, tuple[int, ...]], depth: int) -> Plan:
        dtype = self.dtype or dtype_of(self.reading.module)
        device = device_of(self.reading.module).type
        key = (device, dtype, depth, *shapes.items())
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = planned(
                    self.unet, dtype, shapes, depth=depth, device=device, exact=self.exact
                )
            self._plans.move_to_end(key)
            while len(self._plans) > MOST_PLANS:
                self._plans.popitem(last=False)
        return plan


def planned(
    unet: UNet,
    dtype: torch.dtype,
    shapes: dict[str, tuple[int, ...]],
    *,
    depth: int = 0,
    device: str = "cpu",
    exact: bool = False,
) -> Plan:
    """The plan for arguments of these shapes by name: "x", "timesteps" and those of the network's
    conditions; cut in two at ``depth`` where that is not 0. It reads no values: a network anywhere
    has one for the CPU and one for a GPU (``device``: "cpu" or "cuda")."""
    program = Program(dtype)
    values = {name: program.input(name, shape) for name, shape in shapes.items()}
    conditions = (values.get(name) for name in ("y", "low_res", "noise_level"))
    output, deep = unet.unroll(program, values["x"], values["timesteps"], *conditions, depth=depth)
    names = {module: name for name, module in unet.named_modules()}
    cut = deep if depth else None
    return Plan(LOWERINGS[device](program, output, cut=cut, exact=exact), names)


def versions(unet: nn.Module) -> list[tuple[int, int, torch.dtype]]:
    """Where the parameters are, and how often they were written to."""
    return [
        (p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in unet.parameters()
    ]
