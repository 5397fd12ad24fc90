"""UNets that run as programs of fused operations while a sampler samples."""

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.models.execution.executor import Executor
from fastdiff.models.execution.problems import DTYPES, difference
from fastdiff.models.replicas.replica import Replica
from fastdiff.models.replicas.twin import Twin
from fastdiff.models.unet import UNet
from fastdiff.ops import backends, native
from fastdiff.ops.backends import KERNEL_DTYPES
from fastdiff.ops.convolution.packed import Products, products_of

# Why "auto" leaves a UNet on a GPU as it is.
UNMEASURED = "no GPU has shown a program faster yet"


def slower(dtype: torch.dtype) -> str:
    """Why a network in ``dtype`` on a CPU is better run as it is; "" where a program is faster."""
    if backends.named() not in (None, "native"):
        return f"the backend {backends.named()!r} was named"
    if dtype not in KERNEL_DTYPES:
        return f"no kernels multiply in {name_of(dtype)}"
    # Of float32 products ours are as fast as PyTorch's, and what is around them is faster; in
    # bfloat16 without tiles PyTorch's are faster.
    own = products_of(dtype) != Products.FLOAT32
    if own or (dtype == torch.float32 and native.library().current_isa() != "baseline"):
        return ""
    return f"PyTorch multiplies faster in {name_of(dtype)} on this CPU"


class Executed:
    """The forward of a UNet's twin, as a program in ``dtype``; None: in that of its weights.

    ``ran``: how the last call of it did, in words, which a graph goes on doing.
    """

    def __init__(self, twin: Twin, dtype: torch.dtype | None):
        self.twin, self.dtype = twin.twin, dtype
        self.executor = Executor(twin.original, dtype)
        self.ran = "the network as it is: its forward was called by itself, and not the network"

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        others = self.dtype is None and torch.is_autocast_enabled(x.device.type)
        if torch.is_grad_enabled() or others:
            reason = "it is under the caller's autocast" if others else "gradients are wanted"
            self.ran = f"the network as it is: {reason}"
            return UNet.forward(self.twin, x, timesteps, y, low_res, noise_level)
        output = self.executor(x, timesteps, y, low_res, noise_level)
        self.ran = f"the network as a program of {self.executor.count} operations"
        return output

    def begin(self) -> None:
        """Read weights that may have changed unseen."""
        self.executor.begin()

    def end(self) -> None:
        """Give the memory back."""
        self.executor.end()

    @property
    def generation(self) -> int:
        """Of the weights, which graphs go on reading while it stays."""
        return self.executor.generation


class Programs:
    """Which UNets of a replica run as programs, and why others do not.

    ``executor``: True, False or "auto", where it pays; ``dtype``: of the network's autocast.
    """

    def __init__(self, executor: bool | str, dtype: torch.dtype | None, compiles: bool):
        self.executor = executor
        self.dtype = None if dtype == torch.float32 else dtype
        self.wanted = not compiles and executor is not False
        self.refused = ""
        self.forwards: dict[Twin, Executed] = {}

    def of(self, replica: Replica) -> dict[Twin, Executed]:
        """What runs in place of the forwards of these twins.

        InputError where all must (``executor=True``), and one cannot.
        """
        if not self.wanted:
            return {}
        twins = {twin.original: twin for twin in replica.modules()}
        unets = [module for module, _ in replica.parts() if isinstance(module, UNet)]
        self.forwards, self.refused = {}, "" if unets else "the model has no UNet of fastdiff"
        for unet in unets:
            twin = twins.get(unet)
            said = self._refusal(unet) if twin else "it cannot be replicated"
            if said or twin is None:
                self.refused = said
            else:
                self.forwards[twin] = self._forward(twin)
        if self.refused and self.executor is True:
            raise InputError(f"executor=True: {self.refused}; take executor='auto' or False")
        return self.forwards

    def follow(self, replica: Replica) -> bool:
        """See what was done to the weights since the call began; False where a UNet has become one
        that is not executed."""
        present = {twin.original: twin for twin in replica.modules()}
        for twin, forward in self.forwards.items():
            if present.get(twin.original) is not twin or self._refusal(twin.original):
                return False
            forward.executor.refresh()
        return True

    def explain(self) -> str:
        """How the UNets run; "" where programs are not wanted, or nothing ran yet."""
        said = [f"the network as it is: {self.refused}"] if self.refused else []
        return "; ".join([*said, *(forward.ran for forward in self.forwards.values())])

    def _forward(self, twin: Twin) -> Executed:
        kept = twin.forward
        return kept if type(kept) is Executed else Executed(twin, self.dtype)

    def _refusal(self, unet: nn.Module) -> str:
        """Why this UNet is not executed; "" where it is."""
        found = difference(unet)
        if found:
            return found
        own = next(unet.parameters()).dtype
        dtype = self.dtype or own
        if dtype not in DTYPES or own not in (torch.float32, dtype):
            return f"its weights are {name_of(own)}, to be run in {name_of(dtype)}"
        if self.executor is True:
            return ""
        return slower(dtype) if next(unet.parameters()).is_cpu else UNMEASURED


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
