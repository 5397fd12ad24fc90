"""The training step as CUDA graphs: the kernels of a step, thousands in a small network, are
recorded once and launched again together.

A graph works on tensors that stay where they are: each batch is copied into those of the capture,
and what is another number at each step is read on the device, as are the noise's step, the learning
rate (in float32) and where torch's generator stands, of which the network's dropout is. Python's
own values are those of the capture.

There are two graphs, so that a step that breaks between them leaves whole weights: of the gradients
(noise, forward and backward of all microbatches, clipping), and of AdamW's update. Averages and
figures, some launches in all, are not in them.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError, TrainingError, first_line
from fastdiff.ranks import Ranks
from fastdiff.sampling.cuda_graph import CudaGraph, seconds_a_call
from fastdiff.training.config import TrainConfig
from fastdiff.training.run import Run

GRAPH: type[CudaGraph] = CudaGraph


class StepInputs(NamedTuple):
    """What a step takes the gradients of.

    ``x_start`` (n, ...); ``t``, ``weights`` (n,); ``kwargs``: the network's, each (n, ...);
    ``drawn``: the noise (n, ...), where it is drawn already.
    """

    x_start: Tensor
    t: Tensor
    weights: Tensor
    kwargs: dict[str, Tensor]
    drawn: Tensor | None

    def tensors(self) -> list[Tensor]:
        given = [self.x_start, self.t, self.weights, *self.kwargs.values(), self.drawn]
        return [tensor for tensor in given if tensor is not None]

    def copied(self) -> "StepInputs":
        x_start, t, weights = (value.clone() for value in self[:3])
        kwargs = {name: value.clone() for name, value in self.kwargs.items()}
        drawn = None if self.drawn is None else self.drawn.clone()
        return StepInputs(x_start, t, weights, kwargs, drawn)


# The loss terms of the inputs, each (n,), and the norm of the gradient, which is left in the
# parameters and clipped; of a step whose number is given, or read on the device.
Gradients = Callable[[int | Tensor, StepInputs], tuple[dict[str, Tensor], Tensor]]


class StepGraphs:
    """How a trainer takes its steps: by graphs, or eagerly.

    ``compute``: the gradients, eagerly.

    Attributes:
        why: a line that says which and why, "" until it is known.

    Raises InputError where the settings ask for graphs that cannot be.
    """

    def __init__(self, run: Run, compute: Gradients) -> None:
        self.compute, self.update, self.model = compute, run.update, run.model
        self.mode, self.device = run.config.graph, run.device
        self.captured: _CapturedGradients | None = None
        self.applied: CudaGraph | None = None
        self.place: Any = None
        self.why = ""
        self.eager = self.mode == "off"
        reason = "" if self.eager else obstacle(run.config, run.device, run.ranks)
        if reason:
            self._run_eagerly(reason)

    def gradients(
        self, step: int, inputs: StepInputs, seed: Callable[[], None]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What ``compute`` gives; with graphs it stands until the next step. ``seed`` seeds torch's
        generators for the step."""
        if not self.eager:
            self._capture(step, inputs)
        seed()  # the runs before a capture have drawn
        if self.captured is None:
            return self.compute(step, inputs)
        return self.captured.replay(step, inputs)

    def apply(self, number: int) -> None:
        """The update that follows ``number`` finished ones."""
        self.update.step(number, None if self.applied is None else self.applied.replay)

    def _capture(self, step: int, inputs: StepInputs) -> None:
        """Capture what can be and is not yet, or find out that steps are better taken eagerly."""
        self.device = inputs.t.device  # with its number, by which streams and pools are found
        if self.captured is not None and self.captured.weights != _places(self.model):
            self.captured = self.applied = None
        try:
            with GRAPH.on(self.device):
                if self.captured is None:
                    self.place = GRAPH.new_place(self.device)
                    self._capture_gradients(step, inputs)
                elif self.applied is None and self.update.can_be_captured:
                    self.captured.give_gradients()
                    self.applied = self._captured_update()
        except RuntimeError as error:
            if isinstance(error, TrainingError):
                raise
            # The end of a capture that failed says only that it did.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            reason = f"it cannot be captured as a CUDA graph: {first_line(cause)}"
            self._run_eagerly(reason)
            warnings.warn(self.why, RuntimeWarning, stacklevel=2)

    def _capture_gradients(self, step: int, inputs: StepInputs) -> None:
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            captured = _CapturedGradients(self.compute, self.model, step, inputs)
            if self.mode == "auto":  # before the graph: afterwards the gradients are its own
                eagerly = seconds_a_call(captured.run, self.device)
            captured.capture(self.device, self.place)
            if self.mode == "auto":
                replayed = seconds_a_call(captured.graph.replay, self.device)
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
        self.captured, self.why = captured, "the step runs as CUDA graphs"
        if self.mode == "auto":
            figures = f"{1e3 * replayed:.3g} ms for gradients, {1e3 * eagerly:.3g} ms eagerly"
            self.why += f" ({figures})"
            if eagerly < replayed:
                self._run_eagerly(f"measured faster than as CUDA graphs ({figures})")

    def _captured_update(self) -> CudaGraph:
        groups = self.update.optimizer.param_groups
        for group in groups:
            rate = torch.tensor(float(group["lr"]), device=self.device)
            group |= {"lr": rate, "capturable": True}
        try:
            # The update before was its first run; another would change the weights.
            return GRAPH(self.update.optimizer.step, self.device, self.place, warm=False)
        finally:
            for group in groups:  # of no meaning in a fused AdamW, which warns of it where it runs
                group["capturable"] = False

    def _run_eagerly(self, reason: str) -> None:
        if self.mode == "on":
            raise InputError(f"graph is 'on', and the step has to run eagerly: {reason}")
        self.captured = self.applied = None
        self.eager, self.why = True, f"the step runs eagerly: {reason}"


class _CapturedGradients:
    """The gradients as a graph, with the tensors it works on."""

    def __init__(self, compute: Gradients, model: nn.Module, step: int, inputs: StepInputs) -> None:
        self.compute, self.weights = compute, _places(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.inputs = inputs.copied()
        self.step = torch.tensor([step], device=inputs.t.device)

    def run(self) -> None:
        self.losses, self.norm = self.compute(self.step, self.inputs)

    def capture(self, device: torch.device, place: Any) -> None:
        self.graph = GRAPH(self.run, device, place)
        self.grads = [p.grad for p in self.parameters]

    def replay(self, step: int, inputs: StepInputs) -> tuple[dict[str, Tensor], Tensor]:
        self.step.fill_(step)
        for mine, given in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
            mine.copy_(given)
        self.graph.replay()
        self.give_gradients()
        return self.losses, self.norm

    def give_gradients(self) -> None:
        """To the parameters, where somebody may have taken them away since the last step."""
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad


def obstacle(config: TrainConfig, device: torch.device, ranks: Ranks) -> str:
    """Why the steps of a run cannot be graphs; "" where they may be."""
    if not GRAPH.serves(device):
        return f"CUDA graphs need a CUDA device, and it is on {device}"
    if ranks.group is not None:
        return f"it is taken by {ranks.count} processes together"
    if config.dtype == "float16":
        return "in float16 it is left out where gradients overflow, which is found out in it"
    if config.self_condition:
        return "with self_condition it has one or two passes"
    return ""


def _places(model: nn.Module) -> list[tuple[int, bool]]:
    """Where the weights lie, and which are trained: what a graph holds on to."""
    return [(p.data_ptr(), p.requires_grad) for p in model.parameters()]
