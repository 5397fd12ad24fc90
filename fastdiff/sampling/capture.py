"""Sampling steps captured as CUDA graphs, and replayed.

A graph is one step on tensors that stay where they are: x, the x_0 of the row before, what the
method keeps, the row's number, the table, seed and guidance scale. So one graph serves every row,
number of steps, η, seed and scale; what it does depend on is its key (``key_of``).
"""

import threading
import warnings
import weakref
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError, TrainingError, first_line
from fastdiff.methods.table import COLUMNS
from fastdiff.ops import backends
from fastdiff.ops.counters import signed
from fastdiff.sampling.cuda_graph import CudaGraph, seconds_a_call
from fastdiff.sampling.kwargs import Unknown, map_tensors, structure, tensors_of
from fastdiff.sampling.network.network import Network
from fastdiff.sampling.noise import CounterNoise, HeldNoise
from fastdiff.sampling.reuse import WHOLE, Extent
from fastdiff.sampling.stats import Stats
from fastdiff.sampling.step import Run, State

MOST_GRAPHS = 8
LEAST_ROWS = 4096  # of a captured table; longer ones get a graph of their own


class CapturedStep:
    """Graphs of one step, one for each of the extents of its rows, with the tensors that they work
    on."""

    def __init__(self, run: Run, state: State, graph: type[CudaGraph], place: Any):
        x, device = state.x, state.x.device
        self.rows = max(LEAST_ROWS, _power_of_two(len(run.table)))
        self.state = replace(
            State.beginning(torch.zeros_like(x), run.table), x_start=torch.zeros_like(x)
        )
        self.row, self.seed, self.first_sample = torch.zeros(3, 1, dtype=torch.int64, device=device)
        self.failed = torch.full((1,), -1, dtype=torch.int64, device=device)
        self.scale = torch.zeros(1, device=device)
        kwargs, conditional = map_tensors(torch.clone, [run.kwargs, run.conditional])
        self.kwargs = list(tensors_of([kwargs, conditional]))
        known = run.conditions.known
        self.known = None if known is None else known.held(self.rows)
        self.noise: Any = HeldNoise(x, known is not None)
        if run.noise.kind == "counter":
            self.noise = CounterNoise(tuple(x.shape), device, self.seed, self.first_sample)
        self.run = replace(
            run,
            table=replace(
                run.table,
                packed=torch.zeros(self.rows, len(COLUMNS), device=device),
                # Whether a row is noisy is the table's to say when it is read.
                noisy_rows=(True,) * self.rows,
                reading_rows=(run.table.slots > 0,) * self.rows,
            ),
            kwargs=kwargs,
            conditional=conditional,
            cond_kwargs={},  # a classifier's, which is never captured
            guidance_scale=None if run.guidance_scale is None else self.scale,
            noise=self.noise,
            conditions=replace(run.conditions, known=self.known),
            failed=self.failed,
            stats=Stats(splits=False, compiled=set(run.stats.compiled)),
        )
        self.weights = run.network.signature()
        self.figures = ""  # what it takes, and what the eager step takes
        self.graphs: dict[Extent, Any] = {}
        self.lock = threading.RLock()  # of the tensors: one row of one call at a time
        self.user: weakref.ref[Any] | None = None
        self._begin(run, state.anew(), 0)
        with torch.no_grad():
            for extent in sorted(set(run.extents.values()), reverse=True):  # all of it first
                self.graphs[extent] = graph(partial(self._step, extent), device, place)
        run.stats.compile_seconds += self.run.stats.compile_seconds
        run.stats.compiled |= self.run.stats.compiled

    def _step(self, extent: Extent = WHOLE) -> None:
        made = replace(self.state)
        with _without_cast_cache(self.state.x.device):
            x, x_start = self.run.advance(made, self.row, extent)
        self.state.take(replace(made, x=x, x_start=x_start))
        self.row.add_(1)

    @property
    def graph(self) -> Any:
        """That of all of the network, which a call's first row runs."""
        return self.graphs[WHOLE]

    def serve(self, user: Any, i: int) -> None:
        """Be at row i of a call: ``user`` has its ``state`` and its ``run``, which has this step's
        key. The user before keeps copies of its tensors."""
        before = None if self.user is None else self.user()
        if before is user and self.next_row == i:
            return
        self.user = weakref.ref(user)
        if before is not None and before is not user and before.state is self.state:
            self.graph.join()
            before.state = self.state.copy()
        self._begin(user.run, user.state, i)

    def _begin(self, run: Run, state: State, i: int) -> None:
        if self.graphs:
            self.graph.join()
        self.next_row, self.given = i, run
        rows = len(run.table)
        self.state.take(state)
        self.row.fill_(i)
        self.run.table.packed[:rows].copy_(run.table.packed)
        held, given = self.run.update.of_x_start, run.update.of_x_start
        if held is not None and given is not None:
            held.packed[:rows].copy_(given.packed)
        if isinstance(self.noise, CounterNoise):
            self.seed.fill_(signed(run.noise.seed))
            self.first_sample.fill_(signed(run.noise.first_sample))
        if run.guidance_scale is not None:
            self.scale.fill_(run.guidance_scale)
        arguments = tensors_of([run.kwargs, run.conditional])
        for tensor, value in zip(self.kwargs, arguments, strict=True):
            tensor.copy_(value)
        if self.known is not None and run.conditions.known is not None:
            self.known.fill(run.conditions.known)
        if run.failed is not None:
            self.failed.copy_(run.failed)

    def step(self, i: int) -> State:
        """After row i; the next step writes over it."""
        if isinstance(self.noise, HeldNoise):
            self.graph.join()  # the row before may still read its noise, on another stream
            self.noise.fill(self.given.noise, i, self.given.table.noisy_rows[i])
        self.graphs[self.given.extents[i]].replay()
        self.next_row = i + 1
        if self.given.failed is not None:
            self.given.failed.copy_(self.failed)
        return self.state


class Graphs:
    """A sampler's captured steps: one per key, the least recently used dropped beyond ``most``."""

    def __init__(self, capture: bool | str, most: int = MOST_GRAPHS):
        self.capture, self.most = capture, most
        self.steps: OrderedDict[tuple, CapturedStep | str] = OrderedDict()
        self.places: dict[torch.device, Any] = {}
        self.graph: type[CudaGraph] = GRAPH
        self.attributes: tuple[Any, ...] = ()  # of the network, since the last capture
        self.warned = False
        self.lock = threading.RLock()  # of all of these

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.capture, self.most)  # a copy captures for itself

    def begin(self, network: Network) -> None:
        """Forget the graphs of a network whose attributes have changed since: of Python's values a
        graph sees nothing. Tensors and hooks it is compared with at every ``find``. What was found
        to run eagerly goes on so."""
        with self.lock:
            graphs = [key for key, step in self.steps.items() if isinstance(step, CapturedStep)]
            if graphs and network.attributes() != self.attributes:
                for key in graphs:
                    del self.steps[key]

    def find(self, run: Run, state: State) -> CapturedStep | str:
        """The captured step for this run, or why it runs eagerly."""
        with self.lock:
            return self._find(run, state)

    def _find(self, run: Run, state: State) -> CapturedStep | str:
        if self.capture is False:
            return "capture=False"
        device = state.x.device
        if not self.graph.serves(device):
            reason = f"CUDA graphs need a CUDA device, and the samples are on {device}"
            if self.capture is True:
                raise InputError(f"capture=True: {reason}; use capture='auto' or False")
            return reason
        if run.conditions.classifier is not None:
            return "cond_fn needs autograd"
        if run.network.captures:
            return "torch.compile in this mode captures CUDA graphs of its own"
        try:
            key = key_of(run, state.x)
        except Unknown as reason:
            return self._refused(str(reason))
        found = self.steps.pop(key, None)
        if isinstance(found, CapturedStep) and (
            found.weights != run.network.signature() or len(run.table) > found.rows
        ):
            found = None  # its memory is given back before the new one asks for some
        if found is None:
            while len(self.steps) >= self.most:
                self.steps.popitem(last=False)
            found = self._make(run, state)
        self.steps[key] = found
        return found

    def _make(self, run: Run, state: State) -> CapturedStep | str:
        device = state.x.device
        self.begin(run.network)
        live = [step for step in self.steps.values() if isinstance(step, CapturedStep)]
        if not any(step.state.x.device == device for step in live):
            self.places.pop(device, None)  # a pool without graphs may not take another
        with self.graph.on(device), run.stats.phase("capture"), torch.inference_mode(False):
            if device not in self.places:
                self.places[device] = self.graph.new_place(device)
            try:
                step = CapturedStep(run, state, self.graph, self.places[device])
            except BaseException as error:
                self.places.pop(device, None)  # a pool in which a capture failed is not used again
                if isinstance(error, TrainingError) or not isinstance(error, RuntimeError):
                    raise
                # What CUDA and PyTorch say of what a graph cannot hold; the end of a capture that
                # failed says only that it did.
                cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
                return self._refused(first_line(cause))
            with torch.no_grad():
                both = (step.graph.replay, step._step)
                replayed, eager = (seconds_a_call(call, device) for call in both)
        self.attributes = run.network.attributes()  # a forward may count its calls in one
        figures = f"{1e3 * replayed:.3g} ms a step, {1e3 * eager:.3g} ms eagerly"
        if self.capture == "auto" and eager < replayed:
            return f"measured faster than a CUDA graph ({figures})"
        step.figures = figures
        return step

    def _refused(self, reason: str) -> str:
        if self.capture is True:
            raise InputError(
                f"the step cannot be captured as a CUDA graph: {reason}; use capture='auto' or "
                "False, or mend the model"
            )
        if not self.warned:
            message = f"the step runs eagerly: it cannot be captured as a CUDA graph: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        self.warned = True
        return f"it cannot be captured as a CUDA graph: {reason}"

    def close(self) -> None:
        """Forget all graphs and give their memory back."""
        with self.lock:
            self.steps.clear()
            self.places.clear()
            self.attributes = ()


GRAPH: type[CudaGraph] = CudaGraph


def key_of(run: Run, x: Tensor) -> tuple:
    """All that a captured step depends on beside the weights. Unknown for what cannot be
    compared."""
    table, conditions = run.table, run.conditions
    autocast = (torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type))
    return (
        (x.shape, x.stride(), x.device),
        (run.network.dtype, autocast if run.network.dtype is None else None),
        structure(run.kwargs, "model_kwargs"),
        run.guidance_scale is not None,
        (frozenset(run.extents.values()), run.depth),
        run.noise.kind,
        (table.doubled_output, table.learned_variance, table.scales_input, table.slots),
        (conditions.x_start, run.mean_is_output, conditions.known is not None, run.self_condition),
        (backends.named(), torch.get_float32_matmul_precision()),
    )


def _without_cast_cache(device: torch.device) -> Any:
    """The caller's autocast, if any, without its cache of casts: a graph must make its own."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
