"""U-Nets that run as programs of fused operations while a sampler samples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdiff.errors import InputError
from fastdiff.models.execution.bound import Kept
from fastdiff.models.execution.executor import Executor
from fastdiff.models.execution.problems import DTYPES, device_of, dtype_of, name_of
from fastdiff.models.execution.reading import Reading
from fastdiff.models.readers import reading_of
from fastdiff.models.replicas.replica import Replica
from fastdiff.models.replicas.twin import Twin
from fastdiff.ops import backends, native
from fastdiff.ops.backends import KERNEL_DTYPES
from fastdiff.ops.convolution.fastest import Products, products_of

# Why "auto" leaves a UNet on a GPU as it is.
UNMEASURED = "no GPU has shown a program faster yet"
UNCALLED = "its forward was called by itself, and not the network"


def slower(dtype: torch.dtype) -> str:
    """Why a network in ``dtype`` on a CPU is better run as it is; "" where a program is faster."""
    if backends.named() not in (None, "native"):
        return f"the backend {backends.named()!r} was named"
    if dtype not in KERNEL_DTYPES:
        return f"no kernels multiply in {name_of(dtype)}"
    # Of float32 products ours are as fast as PyTorch's, and what is around them is faster; they are
    # faster than PyTorch's of bfloat16 too, where these have no tiles.
    own = products_of(dtype) != Products.FLOAT32
    if own or (dtype != torch.float16 and native.library().current_isa() != "baseline"):
        return ""
    return f"PyTorch multiplies faster in {name_of(dtype)} on this CPU"


@dataclass
class Features:
    """What one call of a network reuses of its U-Net, which is cut at ``depth``: the deep features
    that are ``kept``; where there are none, they are kept now. ``runs``: of the U-Net, so far."""

    depth: int
    kept: Kept = ()
    runs: int = 0

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Inside, by the U-Net that this thread runs; InputError where it did not run once."""
        token = _reused.set(self)
        try:
            yield
        finally:
            _reused.reset(token)
        if self.runs != 1:
            what = f"the U-Net ran {self.runs} times" if self.runs else UNCALLED
            raise InputError(f"reuse: at a step {what}; leave reuse out")


_reused: ContextVar[Features | None] = ContextVar("features", default=None)


class Executed:
    """The forward of a network's twin, as a program in ``dtype``; None: in that of its weights.

    ``ran``: how the last call of it did, in words, which a graph goes on doing. ``timesteps``: of
    the calls to come.
    """

    timesteps: Sequence[float] = ()

    def __init__(self, twin: Twin, reading: Reading, dtype: torch.dtype | None, exact: bool):
        self.twin, self.reading, self.dtype = twin.twin, reading, dtype
        self.executor = Executor(reading, dtype, exact=exact)
        self.ran = f"the network as it is: {UNCALLED}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reason, call = self._refusal(), None
        if not reason:
            call = self.reading.call(args, kwargs)
            reason = "its program is not for such arguments"
        features = _reused.get()
        if call is None:
            self.ran = f"the network as it is: {reason}"
            if features is not None:
                raise InputError(f"reuse needs a program of the U-Net, but {reason}")
            return type(self.twin).forward(self.twin, *args, **kwargs)
        self.ran = f"the network as a program of {self.executor.count} operations"
        if features is None:
            return call.answer(self.executor(**call.arguments))
        depth, deep = features.depth, features.kept
        answer = self.executor.forward_cut(**call.arguments, depth=depth, deep=deep)
        output, features.kept = answer
        features.runs += 1
        self.ran += f", cut at depth {features.depth}"
        return call.answer(output)

    def _refusal(self) -> str:
        if torch.is_grad_enabled():
            return "gradients are wanted"
        device = device_of(self.reading.module).type
        others = self.dtype is None and torch.is_autocast_enabled(device)
        return "it is under the caller's autocast" if others else ""

    def begin(self) -> None:
        """Read weights that may have changed unseen."""
        self.executor.begin(asked=True, timesteps=self.timesteps)  # asked by ``Programs.of``

    def end(self) -> None:
        """Give the memory back."""
        self.executor.end()

    @property
    def generation(self) -> int:
        """Of the weights, which graphs go on reading while it stays."""
        return self.executor.generation


class Programs:
    """Which U-Nets of a replica run as programs, and why others do not.

    ``executor``: True, False or "auto", where it pays; ``exact``: the Executor's; ``dtype``: of the
    network's autocast.
    """

    def __init__(
        self, executor: bool | str, exact: bool, dtype: torch.dtype | None, compiles: bool
    ):
        self.executor, self.exact = executor, exact
        self.dtype = None if dtype == torch.float32 else dtype
        self.wanted = not compiles and executor is not False
        self.refused = ""
        self.depths: Sequence[int] = ()
        self.forwards: dict[Twin, Executed] = {}
        self.readings: dict[nn.Module, Reading] = {}

    def of(
        self, replica: Replica, timesteps: Sequence[float] = (), depths: Sequence[int] = ()
    ) -> dict[Twin, Executed]:
        """What runs in place of the forwards of these twins, at these timesteps, cut at any of
        these depths.

        InputError where all must (``executor=True``), and one cannot; or where one has to be cut.
        """
        self.depths = depths
        if not self.wanted and not depths:
            return {}
        twins = {twin.original: twin for twin in replica.modules()}
        found = {m: self.readings.get(m) or reading_of(m) for m, _ in replica.parts()}
        self.readings = {module: reading for module, reading in found.items() if reading}
        self.forwards, self.refused = {}, ""
        if not self.readings and (self.executor is True or depths):
            self.refused = "the model has no U-Net that is known"
        for module, reading in self.readings.items():
            twin = twins.get(module)
            said = self._refusal(reading) if twin else "it cannot be replicated"
            if said or twin is None:
                self.refused = said
            else:
                kept = type(twin.forward) is Executed
                self.forwards[twin] = (
                    twin.forward if kept else Executed(twin, reading, self.dtype, self.exact)
                )
                self.forwards[twin].timesteps = timesteps
        if depths:
            self._check_cut(max(depths))
        if self.refused and self.executor is True:
            raise InputError(f"executor=True: {self.refused}; take executor='auto' or False")
        return self.forwards

    def _check_cut(self, depth: int) -> None:
        """InputError where not one U-Net can be cut in two there."""
        if self.refused:
            raise InputError(f"reuse needs a program of a U-Net: {self.refused}; leave reuse out")
        if len(self.readings) != 1:
            raise InputError(f"reuse is of one U-Net; the model has {len(self.readings)}")
        (reading,) = self.readings.values()
        most = len(reading.unet.input_blocks)
        if depth > most:
            raise InputError(f"depth is {depth}; expected 1 … {most}, as the U-Net's input blocks")

    def follow(self, replica: Replica) -> bool:
        """See what was done to the weights since the call began; False where a U-Net has become one
        that is not executed."""
        present = {twin.original: twin for twin in replica.modules()}
        for twin, forward in self.forwards.items():
            if present.get(twin.original) is not twin or self._refusal(forward.reading):
                return False
            forward.executor.refresh(asked=True)
        return True

    def explain(self) -> str:
        """How the U-Nets run; "" where programs are not wanted, or nothing ran yet."""
        said = [f"the network as it is: {self.refused}"] if self.refused else []
        return "; ".join([*said, *(forward.ran for forward in self.forwards.values())])

    def _refusal(self, reading: Reading) -> str:
        """Why this network is not executed; "" where it is."""
        found = reading.difference()
        if found:
            return found
        own = dtype_of(reading.module)
        dtype = self.dtype or own
        if dtype not in DTYPES or own not in (torch.float32, dtype):
            return f"its weights are {name_of(own)}, to be run in {name_of(dtype)}"
        if self.executor is not True and not self.depths:
            said = slower(dtype) if device_of(reading.module).type == "cpu" else UNMEASURED
            if said:
                return said
        return reading.disagreement()
