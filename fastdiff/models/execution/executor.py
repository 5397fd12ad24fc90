"""A U-Net's inference as one program: planned once for calls alike, and run step by step."""

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.models.execution.bound import Bound
from fastdiff.models.execution.explanation import explanation
from fastdiff.models.execution.lowering import Lowering
from fastdiff.models.execution.plan import Plan
from fastdiff.models.execution.problems import DTYPES, difference, dtype_of
from fastdiff.models.execution.program import Program, Weight
from fastdiff.models.unet import UNet
from fastdiff.ops.arithmetic import arithmetic
from fastdiff.ops.convolution.packed import pack

MOST_PLANS = 8


class Executor:
    """What ``unet`` answers in eval mode and without gradients, computed by fused operations.

    It reads the network's own parameters. Between ``begin()`` and ``end()``, a sampler's call, they
    are packed once, and ``refresh()`` sees what changed; outside of it every call packs them.

    Args:
        unet: a UNet as its class makes it, on the CPU.
        dtype: of activations and of the weights of convolutions, float32, bfloat16 or float64; None
            is that of the parameters. Statistics, norms and embeddings are float32 (float64).

    Raises:
        InputError: a network that is not executed (``problems.difference``), another dtype.

    Source: the blocks' own ``unroll``; Ho et al. 2020, appendix B.
    """

    def __init__(self, unet: UNet, dtype: torch.dtype | None = None):
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; expected torch.float32, bfloat16 or float64")
        self.unet, self.dtype = unet, dtype
        self._modules: list[nn.Module] = []  # that the plans are of
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._packed: dict[Weight, Any] | None = None
        self._packed_of: Any = None
        self._idle: dict[Plan, list[Bound]] = {}  # between begin and end, and in no call
        self._lock = threading.Lock()
        self._last: Plan | None = None
        self._check()

    @torch.no_grad()
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
        if self._packed is None:
            self._check()
        self.unet.check(x, timesteps, y, low_res, noise_level)
        given = {"x": x, "timesteps": timesteps}
        given |= {} if y is None else {"y": y}
        given |= {} if low_res is None else {"low_res": low_res}
        given |= {} if noise_level is None else {"noise_level": noise_level}
        with torch.autocast(x.device.type, enabled=False):
            plan = self._plan({name: tensor.shape for name, tensor in given.items()})
            packed, bound = self._bound(plan)
            output = bound.run([given[name] for name in plan.inputs])
            self._give_back(plan, packed, bound)
            return output.to(x.dtype)

    def begin(self) -> None:
        """Pack the weights anew, which may have changed unseen. InputError as the constructor's."""
        self._check()
        with self._lock:
            self._packed, self._idle = {}, {}
            self._packed_of = _versions(self.unet)

    def refresh(self) -> None:
        """Pack the weights anew if one has been exchanged or written to."""
        if self._packed_of != _versions(self.unet):
            self.begin()

    def end(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._packed, self._idle, self._packed_of = None, {}, None

    def explain(self) -> str:
        """The operations of the last call as a list, and what each block reads and writes."""
        if self._last is None:
            return "nothing was executed yet"
        return explanation(self._last)

    @property
    def count(self) -> int:
        """The operations of the last call."""
        return 0 if self._last is None else len(self._last.steps)

    def plan(self, *shape: int, **others: tuple[int, ...]) -> Plan:
        """The plan for x of this shape, and for those of ``y``, ``low_res`` and ``noise_level``
        that are given."""
        return self._plan({"x": shape, "timesteps": shape[:1], **others})

    def _check(self) -> None:
        """InputError for a network that has become another one; plans are of the modules it has."""
        found = difference(self.unet)
        if found:
            raise InputError(f"this network is not executed as a program: {found}")
        modules = list(self.unet.modules())
        with self._lock:
            if modules != self._modules:
                self._modules = modules
                self._plans.clear()
                self._idle.clear()

    def _plan(self, shapes: dict[str, tuple[int, ...]]) -> Plan:
        dtype = self.dtype or dtype_of(self.unet)
        key = (dtype, *shapes.items())
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = planned(self.unet, dtype, shapes)
            self._plans.move_to_end(key)
            while len(self._plans) > MOST_PLANS:
                _, old = self._plans.popitem(last=False)
                self._idle.pop(old, None)
            self._last = plan
        return plan

    def _bound(self, plan: Plan) -> tuple[Any, Bound]:
        """(the packed weights, the plan on them, for this call alone)."""
        packed = self._packed
        if packed is None:
            return None, Bound(plan, [_in_form(weight, plan.dtype) for weight in plan.weights])
        with self._lock:
            idle = self._idle.get(plan)
            if idle and packed is self._packed:
                return packed, idle.pop()
            for weight in plan.weights:
                if weight not in packed:
                    packed[weight] = _in_form(weight, plan.dtype)
            return packed, Bound(plan, [packed[weight] for weight in plan.weights])

    def _give_back(self, plan: Plan, packed: Any, bound: Bound) -> None:
        """For the next call that finds the same weights."""
        with self._lock:
            if packed is not None and packed is self._packed:
                self._idle.setdefault(plan, []).append(bound)


def planned(unet: UNet, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> Plan:
    """The plan for arguments of these shapes by name: "x", "timesteps" and those of the network's
    conditions. It reads no values: networks on any device have one."""
    program = Program(dtype)
    values = {name: program.input(name, shape) for name, shape in shapes.items()}
    conditions = (values.get(name) for name in ("y", "low_res", "noise_level"))
    output = unet.unroll(program, values["x"], values["timesteps"], *conditions)
    names = {module: name for name, module in unet.named_modules()}
    return Plan(Lowering(program, output), names)


def _in_form(weight: Weight, dtype: torch.dtype) -> Any:
    """A weight as its steps read it."""
    parts = [layer.get_parameter(weight.name).detach() for layer in weight.layers]
    made = parts[0] if len(parts) == 1 else torch.cat(parts)
    if weight.form == "vector":
        return made.to(arithmetic(dtype))
    if weight.dims and made.dim() != weight.dims + 2:  # a kernel of one, of any dimension
        made = made.reshape(*made.shape[:2], *(1,) * weight.dims)
    return pack(made, dtype) if weight.form == "packed" else made.to(dtype)


def _versions(unet: nn.Module) -> list[tuple[int, int, torch.dtype]]:
    """Where the parameters are, and how often they were written to."""
    return [
        (p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in unet.parameters()
    ]
