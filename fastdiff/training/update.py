"""The update of the weights: the optimizer, the learning rates it goes by, and in float16 the scale
of the loss."""

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastdiff.errors import InputError
from fastdiff.training.config import TrainConfig, learning_rate
from fastdiff.training.memory_order import memory_order
from fastdiff.training.step import clip_gradients
from fastdiff.training.update_state import (
    check_groups,
    load_optimizer,
    of_form,
    optimizer_groups,
    optimizer_tensors,
    optimizer_values,
    plain,
)

Optimizer = torch.optim.Optimizer
GivenOptimizer = Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None
GivenScheduler = LRScheduler | Callable[[Optimizer], LRScheduler] | None

# The settings that belong to the optimizer they describe.
OF_ADAMW = ("lr", "weight_decay", "betas")
OF_SCHEDULE = {"lr_schedule": "constant", "warmup": 0}


class Update:
    """How gradients change the weights of ``model``, which lies on ``device``.

    Args:
        optimizer, scheduler: as Trainer's; None: AdamW, and the rates of ``config``.

    Raises InputError for an optimizer of other parameters or of which no step can be taken or
    saved, and for a scheduler of another optimizer or beside a schedule of ``config``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        optimizer: GivenOptimizer = None,
        scheduler: GivenScheduler = None,
    ) -> None:
        self.model, self.config = model, config
        trained = [p for p in model.parameters() if p.requires_grad]
        if optimizer is None:
            self.optimizer = _adamw(trained, config, device)
        else:
            self.optimizer = _checked(optimizer, trained)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))  # as torch's schedulers call it
        self.scheduler = None
        if scheduler is not None:
            self.scheduler = _schedule(scheduler, self.optimizer, config)
        self.kinds = {
            "optimizer": None if optimizer is None else _kind(self.optimizer),
            "scheduler": None if scheduler is None else _kind(self.scheduler),
        }
        is_half = config.dtype == "float16"
        if is_half and device.type not in ("cpu", "cuda"):
            raise InputError(f"dtype is 'float16', which trains on cpu and cuda, not on {device}")
        # Without float16 it does nothing, and a scale of 1 changes no bit.
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_half)
        self.lr = self.optimizer.param_groups[0]["lr"]  # of the last step
        self._can_be_saved = optimizer is None
        self._in_memory_order = optimizer is None and device.type == "cpu"  # elsewhere no copies

    @property
    def is_given(self) -> bool:
        """Whether the optimizer's numbers are not those of the settings."""
        return any(self.kinds.values())

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradients :meth:`clip` and :meth:`step` take."""
        return self.scaler.scale(loss)

    def clip(self) -> Tensor:
        """Clip the gradients as the settings say; their norm before, a scalar on the device: not
        finite where a scaled gradient was too large for float16, whose step changes nothing."""
        self.scaler.unscale_(self.optimizer)
        return clip_gradients(self.parameters, self.config.grad_clip)

    @property
    def can_be_captured(self) -> bool:
        """Whether :meth:`step` is one that a CUDA graph can take: AdamW's, by the settings' rates,
        once it has moments."""
        return not self.is_given and bool(self.optimizer.state)

    def step(self, number: int, apply: Callable[[], None] | None = None) -> None:
        """The update that follows ``number`` finished ones. ``apply``: what takes the optimizer's
        step in its place."""
        self._set_rates(number)
        if apply is None:
            self._apply()
        else:
            apply()
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        if not self._can_be_saved:  # better said after one step than after a thousand
            self.tensors(), self.record()
            self._can_be_saved = True

    def _set_rates(self, number: int) -> None:
        groups = self.optimizer.param_groups
        if self.scheduler is not None:
            self.lr = groups[0]["lr"]
            return
        rates = [learning_rate(number, self.config, group["initial_lr"]) for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):  # whose place somebody knows
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.lr = rates[0]

    def _apply(self) -> None:
        with memory_order(self.optimizer) if self._in_memory_order else contextlib.nullcontext():
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def measured(self, loss: float) -> None:
        """Tell a ReduceLROnPlateau the mean loss of a log line."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's, as ``<parameter>.<moment>``."""
        return optimizer_tensors(self.optimizer, self.model)

    def record(self) -> dict[str, Any]:
        """What else there is to save, for JSON."""
        groups = optimizer_groups(self.optimizer) if self.is_given else None
        schedule = self.scheduler and plain(self.scheduler.state_dict(), self.kinds["scheduler"])
        values = optimizer_values(self.optimizer, self.model)
        return {
            "kinds": self.kinds,
            "lr": float(self.lr),
            "groups": groups,
            "values": values,
            "schedule": schedule,
            "scaler": self.scaler.state_dict(),
        }

    def load(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None) -> None:
        """Put back what :meth:`tensors` and :meth:`record` gave.

        The numbers of groups are put back where optimizer or scheduler was given: a scheduler goes
        on from them. Otherwise the settings say what they are.
        """
        record = record or {"kinds": dict.fromkeys(self.kinds), "lr": self.lr, "values": {}}
        for name, kind in self.kinds.items():
            if record["kinds"][name] != kind:
                before, now = (k or "the settings' own" for k in (record["kinds"][name], kind))
                raise InputError(
                    f"the run's {name} was {before}, and now it is {now}: resume with the "
                    f"{name}= that it was started with, or start a new run from its weights"
                )
        groups = record["groups"] if self.is_given else None
        load_optimizer(self.optimizer, self.model, tensors, record["values"], groups)
        self.lr = record["lr"]
        if self.scaler.is_enabled() and record.get("scaler"):
            self.scaler.load_state_dict(record["scaler"])
        if self.scheduler is not None:
            state = of_form(record["schedule"], self.scheduler.state_dict())
            self.scheduler.load_state_dict(state)

    def check_changes(self, before: TrainConfig) -> None:
        """InputError where settings that a checkpoint's groups decide differ from ``before``."""
        for name in OF_ADAMW if self.is_given else ():
            was, now = getattr(before, name), getattr(self.config, name)
            if was != now:
                raise InputError(
                    f"{name} is {now!r} but the run was started with {was!r}, and with a given "
                    "optimizer or scheduler its numbers are the checkpoint's: leave it out"
                )


def _adamw(
    parameters: Sequence[nn.Parameter], config: TrainConfig, device: torch.device
) -> Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def _checked(given: Any, parameters: list[nn.Parameter]) -> Optimizer:
    """The optimizer that is given, or made by what is given."""
    optimizer = given if isinstance(given, Optimizer) else _made("optimizer", given, parameters)
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            f"optimizer= is or makes a {type(optimizer).__name__}; expected a "
            "torch.optim.Optimizer, or a function of the parameters that makes one"
        )
    known = set(parameters)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(p not in known for p in held)
    if foreign:
        raise InputError(
            f"{foreign} of the optimizer's {len(held)} parameters are not trained ones of the "
            "network, as those of a network that was copied, read anew or sharded are not: give "
            "a function of the parameters, such as optimizer=torch.optim.SGD"
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise InputError(
            f"a {type(optimizer).__name__} evaluates the loss several times in a step (closure), "
            "and a step has one batch and one noise: give another optimizer"
        )
    check_groups(optimizer)
    return optimizer


def _schedule(given: Any, optimizer: Optimizer, config: TrainConfig) -> LRScheduler:
    """The scheduler that is given, or made by what is given."""
    for name, default in OF_SCHEDULE.items():
        if getattr(config, name) != default:
            raise InputError(
                f"{name} is {getattr(config, name)!r}, and a scheduler is given, which decides "
                f"the learning rate alone: leave one of them out"
            )
    scheduler = given if isinstance(given, LRScheduler) else _made("scheduler", given, optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise InputError(
            f"scheduler= is or makes a {type(scheduler).__name__}; expected one of "
            "torch.optim.lr_scheduler, or a function of the optimizer that makes one"
        )
    if scheduler.optimizer is not optimizer:
        raise InputError(
            "the scheduler is that of another optimizer: give its optimizer as optimizer=, or a "
            "function of the optimizer that makes the scheduler"
        )
    plain(scheduler.state_dict(), _kind(scheduler))
    return scheduler


def _made(name: str, make: Any, of: Any) -> Any:
    if not callable(make):
        raise InputError(f"{name}= is a {type(make).__name__}; expected an object or a function")
    return make(of)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
