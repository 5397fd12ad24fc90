"""Another codebase's U-Net read as one of fastdiff's: its parameters shared, its forward tried."""

import inspect
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError, first_line
from fastdiff.models.execution.executor import Executor, versions
from fastdiff.models.execution.problems import (
    Form,
    changed,
    class_name,
    device_of,
    dtype_of,
    forms,
    name_of,
)
from fastdiff.models.execution.reading import Call, Reading
from fastdiff.models.fused import unfused
from fastdiff.models.replicas.replica import twin_of
from fastdiff.models.unet import UNet
from fastdiff.models.valueless import valueless
from fastdiff.models.wrappers import tensor_of

# Of a network's answer, over the largest value; bfloat16 is rounded otherwise by every program, and
# on GPUs float32 too, whose convolutions multiply as TF32.
MOST_ERROR, MOST_LOW_ERROR = 1e-3, 5e-2


class Foreign(Reading):
    """Such a reading. A subclass, in a file of ``models/readers/``, says what is its codebase's.

    ``classes``: the module and the name of each class that it reads; ``free``: their attributes
    that change nothing of what is computed in eval mode; ``names``: their forward's arguments and
    those of ``UNet.forward`` that they are.
    """

    classes: Collection[tuple[str, str]]
    free: Collection[str]
    names: Mapping[str, str]

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._settings: Any = None  # that ``_likeness`` is of
        self._likeness: _Likeness | None = None

    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of the network's class, and those of UNet that mean the same.

        InputError, with the reason, where there are none.
        """
        raise NotImplementedError

    def layers(self, unet: UNet) -> Mapping[str, Sequence[str]]:
        """Of each layer of ``unet``, by name, those whose parameters are the parts of its own."""
        raise NotImplementedError

    def answer(self, output: Tensor, given: Mapping[str, Any]) -> Any:
        """What the network answers where ``output`` was computed, of the arguments given to it."""
        return output

    # --- What a program needs to know ---------------------------------------------------------

    @property
    def unet(self) -> UNet:
        assert self._likeness is not None
        return self._likeness.unet

    def difference(self) -> str:
        kind = unfused(type(self.module))
        if (kind.__module__, kind.__qualname__) not in self.classes:
            return f"it is a {class_name(kind)}; known is only the class that it derives from"
        try:
            theirs, ours = self.settings()
        except InputError as error:
            return str(error)
        settings = (kind, repr(theirs))
        if self._likeness is None or self._settings != settings:
            self._likeness, self._settings = _Likeness(self, kind, theirs, ours), settings
        return self._likeness.problem or changed(self.module, self._likeness.forms)

    def tensors(self, layer: nn.Module, name: str) -> Sequence[Tensor]:
        assert self._likeness is not None
        parts = self._likeness.layers[layer]
        return [self.module.get_parameter(f"{part}.{name}") for part in parts]

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        forward = inspect.signature(unfused(type(self.module)).forward)
        try:
            given = dict(forward.bind(self.module, *args, **kwargs).arguments)
        except TypeError:
            return None
        del given["self"]
        given |= given.pop("kwargs", {})  # of one that hands them on
        arguments = {self.names[name]: given[name] for name in given.keys() & self.names.keys()}
        if given.keys() - self.names.keys() - {"return_dict"} or not self._fits(arguments):
            return None
        return Call(arguments, lambda output: self.answer(output, given))

    def _fits(self, arguments: dict[str, Any]) -> bool:
        """Whether the network's own forward would take these: of others it is to speak itself."""
        x, timesteps = arguments["x"], arguments["timesteps"]
        if not (isinstance(x, Tensor) and isinstance(timesteps, Tensor | int | float)):
            return False
        if not isinstance(timesteps, Tensor) or timesteps.dim() == 0:
            timesteps = torch.as_tensor(timesteps, device=x.device)
        if timesteps.numel() == 1:
            timesteps = timesteps.reshape(1).expand(len(x))
        arguments["timesteps"] = timesteps
        others = [arguments.get(name) for name in ("y", "low_res", "noise_level")]
        try:
            self.unet.check(x, timesteps, *others)
        except InputError:
            return False
        device = device_of(self.module)
        if any(v is not None and v.device != device for v in (x, timesteps, *others)):
            return False
        # Unlike ours, these go to twice the size on the way up.
        halved = x.shape[2:] if x.dim() < 5 else x.shape[3:]
        sizes_fit = all(side % _factor(self.unet) == 0 for side in halved)
        low = torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32
        return sizes_fit and (low or x.dtype == dtype_of(self.module))

    # --- Trying it ----------------------------------------------------------------------------

    def disagreement(self) -> str:
        """``difference`` is to be asked before."""
        kinds = {type(module) for module in self.module.modules()}
        forwards = {kind: kind.forward for kind in kinds}  # somebody may exchange one for a class
        form = (self._settings, dtype_of(self.module), forwards)
        last = _trials.get(self.module)
        if last is None or last.form != form or (last.said and last.of != versions(self.module)):
            of = versions(self.module)
            last = _trials[self.module] = _Trial(form, of, self._tried())
        return last.said

    @torch.no_grad()
    def _tried(self) -> str:
        dtype, device = dtype_of(self.module), device_of(self.module)
        small = _small(self.unet, dtype)
        arguments = {name: tensor.to(device) for name, tensor in small.items()}
        theirs = {ours: name for name, ours in self.names.items()}
        given = {theirs[name]: tensor for name, tensor in arguments.items()}
        try:
            with twin_of(self.module) as twin, torch.autocast(device.type, enabled=False):
                expected = tensor_of(twin(**given)).float()
            found = Executor(self)(**arguments).float()
        except Exception as error:  # whatever such a network does with such inputs
            return f"tried on small inputs it fails ({first_line(error)})"
        largest = expected.abs().max()
        if not largest:
            return "it answers zeros, on which no program can be tried"
        differs = float((found - expected).abs().max() / largest)
        rounds = dtype == torch.bfloat16 or (dtype == torch.float32 and device.type != "cpu")
        most = MOST_LOW_ERROR if rounds else MOST_ERROR
        if differs <= most:
            return ""
        return f"tried on small inputs in {name_of(dtype)} its program differs by {differs:.1e}"


class _Trial(NamedTuple):
    """What was tried, of which weights, and what was said. Other weights are tried again where it
    failed: they answered zeros or not-a-number, or somebody wrote to them meanwhile."""

    form: Any
    of: Any
    said: str


_trials: "weakref.WeakKeyDictionary[nn.Module, _Trial]" = weakref.WeakKeyDictionary()


class _Likeness:
    """What a network of these arguments is made of, and the UNet without values that it is.

    ``problem``: why it is none; ``layers``: of each layer of ``unet``, the names of theirs.
    """

    def __init__(self, reading: Foreign, kind: Any, theirs: dict[str, Any], ours: dict[str, Any]):
        self.unet: Any = None
        self.forms: dict[str, Form] = {}
        self.layers: dict[nn.Module, Sequence[str]] = {}
        try:
            with valueless():
                network = kind(**theirs)
        except Exception as error:  # whatever another release of its class makes of them
            self.problem = f"its class does not make it of its arguments ({first_line(error)})"
            return
        try:
            with valueless():
                self.unet = UNet(**ours)
        except InputError as error:
            self.problem = str(error)
            return
        self.forms = forms(network, reading.free)
        self.problem = self._mapped(dict(network.named_parameters()), reading.layers(self.unet))

    def _mapped(self, theirs: dict[str, Tensor], names: Mapping[str, Sequence[str]]) -> str:
        read: set[str] = set()
        for name, layer in self.unet.named_modules():
            self.layers[layer] = names.get(name, ())
            for parameter, ours in layer.named_parameters(recurse=False):
                parts = [f"{part}.{parameter}" for part in self.layers[layer]]
                found = [theirs[part] for part in parts if part in theirs]
                sizes = sum(len(part) for part in found), sum(part.numel() for part in found)
                if sizes != (len(ours), ours.numel()):
                    shapes = [tuple(part.shape) for part in found]
                    return f"it has {shapes} for a {name}.{parameter} of {tuple(ours.shape)}"
                read.update(parts)
        strange = sorted(theirs.keys() - read)
        return f"it has a {strange[0]}, which fastdiff's U-Net has not" if strange else ""


def _factor(unet: UNet) -> int:
    """What its images become smaller by."""
    return int(2 ** (len(unet.widths) - 1))


def _small(unet: UNet, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of a batch of two."""
    generator, factor = torch.Generator().manual_seed(0), _factor(unet)
    sides = (2, 2 * factor, 3 * factor)[3 - unet.dims :]

    def random(*size: int) -> Tensor:
        return torch.randn(2, unet.in_channels, *size, generator=generator).to(dtype)

    arguments = {"x": random(*sides), "timesteps": torch.tensor([10.0, 900.0])}
    if unet.num_classes is not None:
        arguments["y"] = torch.tensor([0, unet.num_classes - 1])
    if unet.super_res:
        arguments["low_res"] = random(*(max(side // 2, 1) for side in sides))
    return arguments
