"""Sampler: draw samples with a network, by any method a StepTable describes.

One step is: run the network at row i's timestep, apply row i, i ← i + 1. On a GPU it is captured
once as a CUDA graph and replayed for every row.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_device
from fastdiff.errors import InputError
from fastdiff.methods.protocol import check_process
from fastdiff.methods.table import StepTable
from fastdiff.optional import require
from fastdiff.process.update import CondFn, DenoisedFn, check_moves, classifier_gain
from fastdiff.records import called_with
from fastdiff.sampling.call import Call, Inputs, WatchedInputs
from fastdiff.sampling.capture import CapturedStep, Graphs
from fastdiff.sampling.network.network import Model, Network
from fastdiff.sampling.out_of_memory import explains_out_of_memory
from fastdiff.sampling.reuse import Reuse, Rows
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.stats import Stats
from fastdiff.sampling.step import Run, State

Step = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Sampler:
    """Samples from ``model`` by any method of ``fastdiff.methods``, over some steps of a process.

    Args:
        model: called ``model(x, timesteps, **model_kwargs)`` with x (N, C, ...) and float32 (N,)
            timesteps; answers (N, C, ...), or (N, 2C, ...) where the process learns its variance,
            or an object whose ``sample`` is that (diffusers).
            A module is run in eval mode, whatever mode it is in; so are the modules that a function
            calls, as far as its closure, its globals or its object name them. Weights are read anew
            at every call.
        diffusion: the process the model was trained with, a GaussianDiffusion, a VarianceExploding
            or an EDM; or a StepTable, whose rows are then taken as they are (``image``, ``known``
            and ``cond_fn`` need a process).
        steps: an int or a respacing string ("50", "10,15,20", "ddim25"), counted in the process's
            own steps; None takes all of them.
        spacing: of ``steps``: "uniform", "quadratic", "trailing", "logsnr", "karras",
            "exponential", "beta" or "polynomial" (fastdiff.process.respacing); None is "uniform",
            or what goes with ``method`` "auto".
        spacing_options: of the spacing, by name.
        timesteps: the process's steps to take, ascending, in place of ``steps``.
        method: "ddpm" (with the process's variance), "ddim" or another file's of
            fastdiff/methods; ``fastdiff.methods.registry.METHODS`` has them all. "auto": that with
            the least measured error by so many steps (fastdiff/sampling/recommended.py).
        eta: the share of noise: of DDIM 0 deterministic, 1 the DDPM posterior's variance; None is
            the method's own.
        method_options: of the method, by name, such as {"order": 2} of "unipc".
        guidance_scale: s of classifier-free guidance, unconditional + s·(conditional −
            unconditional); the network then sees a batch of 2N. None is no guidance.
        guide: a network that answers in place of the unconditional half: autoguidance, by a weaker
            network than ``model`` (Karras et al. 2024, arXiv:2406.02507). It is given what the
            model is, but for ``uncond_kwargs``, and runs as the model does.
        guidance_rescale: φ of rescaled guidance: the guided output is multiplied by φ·(standard
            deviation of the conditional one / its own) + 1 − φ, each sample's (Lin et al. 2023,
            arXiv:2305.08891, section 3.4). 0 is none.
        guidance_interval: (low, high), the network's timesteps between which (inclusive) guidance
            is used; elsewhere the network runs on the condition alone (Kynkäänniemi et al. 2024,
            arXiv:2404.07724). None is everywhere.
        clip_denoised: clip the predicted x_0 to [−1, 1].
        dynamic_threshold: a quantile such as 0.995: dynamic thresholding of x_0 (Saharia et al.
            2022) in place of the clip.
        reuse: 3 runs the whole of a U-Net at every third row, and at the others its shallow layers
            alone, on the deep features that were kept (Ma et al. 2023, arXiv:2312.00858); [0, 4, 9]
            names the rows that run it whole, and :class:`fastdiff.sampling.reuse.Reuse` says what
            is shallow. The network has to be one that can run as a program (``executor``), and runs
            as one. None reuses nothing.
        guidance_reuse: the rows of guidance that run the unconditional half, in the same way; at
            the others it is the conditional one less the last difference of the two. None is all.
        denoised_fn: applied to the predicted x_0 before it is clipped.
        cond_fn: classifier guidance: cond_fn(x, timesteps, **model_kwargs) answers
            ∇ log p(y | x_t), like x (Dhariwal & Nichol 2021); ``fastdiff.classifier_gradient``
            makes one of a classifier. Such steps run eagerly.
        dtype: the network runs under autocast of this dtype (torch.bfloat16, ...), with weights
            that are cast when a call begins; x_t stays float32. None runs it in the dtype of its
            parameters.
        channels_last: the layout of x and of the weights of plain 2-D convolutions; None: as they
            are.
        rng: "counter": sample i of a seed is the same in any batch. "torch": torch.randn from a
            generator of that seed, x_T first and then step by step: the samples of the published
            improved-diffusion loops.
        capture: "auto": on CUDA the step is captured as a graph, measured beside the eager one, and
            the faster is kept. True insists on the graph, False never takes one. New values of
            weights, moved weights, hooks, and attributes of the model's modules (an adapter
            switched off, a processor's scale) are seen when a call begins; of Python state
            elsewhere ``close()`` tells the graphs. cuDNN measures its kernels for the graph
            (``torch.backends.cudnn.benchmark``), unless asked for deterministic ones.
        self_condition: the name of a keyword argument by which the network is given the x_0 that it
            predicted a step before, zeros first (Chen et al. 2022, arXiv:2208.04202).
        compile: run the network through torch.compile: True, or its keyword arguments. Inductor's
            freezing makes the weights constants: after a change of them make a new sampler.
        executor: whether a U-Net runs as a program of fused operations, with the same answers up to
            rounding: one of fastdiff, diffusers' UNet2DModel, improved-diffusion's or
            guided-diffusion's. "auto": where that pays (on no GPU yet); True insists (InputError,
            at a call, for a network that cannot); False never. ``explain()`` says why one does not.
            On a CPU the sampler holds up to 256 MiB from call to call, where the next one computes.
        exact_products: a program's float32 convolutions and attention multiply the values
            themselves, as PyTorch's do: not as sums of two bfloat16 (AMX), nor by Winograd's
            algorithm, which are two to three times faster and off by some millionths of the largest
            result.
        device: where to sample; by default that of the model's parameters, else of ``noise``, else
            the CPU.

    Attributes: ``table``, the StepTable; ``diffusion``, the strided process; ``stats``, where the
    last call's time went (:class:`fastdiff.sampling.stats.Stats`).

    Raises InputError for arguments that do not fit each other.

    What runs is a replica of the model (fastdiff/models/replicas), which shares its parameters:
    while a sampler samples others may call the model, train it, and sample from it, in any thread,
    with other samplers or this one. Samples are those of the weights that a call begins with where
    these are cast, padded or laid out anew, else of the weights as each step finds them. What a
    forward writes to its module's attributes the module has when the call is over. Modules that
    cannot be replicated (scripted or compiled ones, FSDP, classes with ``__slots__``) run as they
    are, in eval mode for as long as some sampler uses them.
    """

    def __init__(
        self,
        model: Model,
        diffusion: Any,
        *,
        steps: int | str | None = None,
        spacing: str | None = None,
        spacing_options: Mapping[str, Any] | None = None,
        timesteps: Sequence[float] | None = None,
        method: str = "ddpm",
        eta: float | None = None,
        method_options: Mapping[str, Any] | None = None,
        guidance_scale: float | None = None,
        guide: Model | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        clip_denoised: bool = True,
        dynamic_threshold: float | None = None,
        reuse: Reuse | Rows | None = None,
        guidance_reuse: Rows | None = None,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool | None = None,
        rng: str = "counter",
        capture: bool | str = "auto",
        compile: bool | dict[str, Any] = False,
        executor: bool | str = "auto",
        exact_products: bool = False,
        self_condition: str | None = None,
        device: torch.device | str | None = None,
    ):
        for name, network in (("model", model), ("guide", guide)):
            if not callable(network) and not (name == "guide" and network is None):
                kind = type(network).__name__
                raise InputError(f"{name} is a {kind}; expected a module or a function")
        if guide is not None and guidance_scale is None:
            raise InputError("guide belongs to guidance; give guidance_scale too")
        if rng not in ("counter", "torch"):
            raise InputError(f"rng is {rng!r}; expected 'counter' or 'torch'")
        if not (isinstance(capture, bool) or capture == "auto"):
            raise InputError(f"capture is {capture!r}; expected 'auto', True or False")
        if not isinstance(compile, bool | dict):
            raise InputError(f"compile is {compile!r}; expected True, False or a dict of options")
        if not (isinstance(executor, bool) or executor == "auto"):
            raise InputError(f"executor is {executor!r}; expected 'auto', True or False")
        if executor is True and compile is not False:
            raise InputError("executor=True and compile exclude each other; choose one")
        if dtype is not None and dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; expected torch.float32, bfloat16 or float16")
        if capture is True and cond_fn is not None:
            raise InputError("cond_fn needs autograd, so capture must be 'auto' or False")
        self.model = model
        self.denoised_fn, self.cond_fn, self.rng = denoised_fn, cond_fn, rng
        self.self_condition = self_condition
        self.device = None if device is None else check_device(device)
        self.stats = Stats()
        runs = (dtype, channels_last, compile, executor, exact_products)
        self.network = Network(model, *runs)
        self.guide = None if guide is None else Network(guide, *runs)
        self._graphs = Graphs(capture)
        self._ran = "nothing was sampled yet"
        self._set(
            diffusion,
            Settings(
                steps=steps,
                spacing=spacing,
                spacing_options=spacing_options,
                timesteps=timesteps,
                method=method,
                eta=eta,
                method_options=method_options,
                guidance_scale=guidance_scale,
                guidance_interval=guidance_interval,
                guidance_rescale=guidance_rescale,
                clip_denoised=clip_denoised,
                dynamic_threshold=dynamic_threshold,
                reuse=reuse,
                guidance_reuse=guidance_reuse,
            ),
        )

    def configure(self, *, diffusion: Any = None, **changes: Any) -> "Sampler":
        """Change steps, spacing, timesteps, method, eta, their options, guidance_scale,
        guidance_interval, guidance_rescale, guidance_reuse, reuse, clip_denoised, dynamic_threshold
        or the process (or table) itself, as in the constructor; the rest stays. Returns itself.
        Raises InputError as the constructor does.

        What was captured stays too: a graph reads all of these from device memory, but for how much
        the method keeps, whether there is guidance, its rescaling, and dynamic_threshold.
        """
        process = self.process if diffusion is None else diffusion
        self._set(process, self.asked.changed(changes))
        return self

    def _set(self, process: Any, settings: Settings) -> None:
        if not isinstance(process, StepTable):
            check_process(process, "respace", "prior_std")
        if settings.depth and not self.network.programs.wanted:
            raise InputError("reuse and executor=False or compile exclude each other; choose one")
        asked, settings = settings, settings.chosen(process)
        strided = settings.strided(process)
        table = settings.table(strided)
        moves = {"denoised_fn": self.denoised_fn, "cond_fn": self.cond_fn}
        check_moves(strided, table, moves | {"dynamic_threshold": settings.dynamic_threshold})
        if self.cond_fn is not None:
            check_process(strided, "last_variance")
            if not classifier_gain(strided, table).isfinite().all():
                raise InputError(
                    "cond_fn moves ε, which leaves x_0 undetermined at a step without signal "
                    "(zero terminal SNR); use method 'ddpm'"
                )
        with self.network.lock:
            self.process, self.asked, self.settings = process, asked, settings
            self.diffusion, self.table = strided, table

    @called_with(WatchedInputs)
    def sample(self, inputs: WatchedInputs) -> Tensor:
        """Samples of ``shape`` (N, C, ...), float32 on the sampling device.

        ``progress`` True shows a bar over the steps (needs tqdm); a function is called after each.
        ``callback`` gets what :meth:`iterate` yields. The rest, and the errors, as :meth:`iterate`.
        """
        call, callback, progress = self._call(inputs), inputs.callback, inputs.progress
        # Closed whatever happens: what a callback raises finds the model as it was.
        with closing(self._iterate(call, watched=callback is not None)) as steps:
            shown: Any = steps
            if progress is True:
                bar = require("tqdm.auto", "train").tqdm
                shown = bar(steps, total=len(call.timesteps), leave=False)
            for step in shown:
                if callback is not None:
                    callback(step)
                if callable(progress):
                    progress()
        return step["sample"]

    @called_with(Inputs)
    def iterate(self, inputs: Inputs) -> Iterator[Step]:
        """Yield every step: {"step", "timestep", "sample", "pred_xstart"}.

        ``step`` counts from 0, ``timestep`` is what the network was given (a number), the tensors
        are (N, C, ...) float32 copies: x after the step, and the x_0 it predicted.

        Args:
            shape: (N, C, ...).
            seed: of all that is drawn.
            first_sample: with rng="counter", the number of the batch's first sample: batches that
                continue the numbering give what one large batch would.
            noise: x_T, (N, C, ...), in place of a draw.
            image: image-to-image: x_0 (N, C, ...), noised to the level from which the last
                ``strength`` (0 < strength ≤ 1) of the steps lead back; only these are taken.
            known: inpainting: x_0 where ``known_mask`` is true. That region is put into x at its
                noise level after every step, and comes back as it was given.
            known_mask: true (not 0) where x_0 is known; both are broadcastable to ``shape``.
            model_kwargs: passed to the network. For guidance, tensors whose first dimension is N
                are doubled with their unconditional counterpart.
            uncond_kwargs: what replaces ``model_kwargs`` in the unconditional half; by default the
                model's ``null_label`` replaces the labels ``y`` (also that of a network inside
                torch.compile, DataParallel and their like).
            cond_kwargs: passed to ``cond_fn`` in place of ``model_kwargs``: the classes that an
                unconditional network is guided to.
            step_noise: the N(0, I) draw of every step: one tensor for all, or a callable that gets
                the index t (K − 1 first, 0 last).

        Raises InputError for arguments or a network output that do not fit and for a batch that
        does not fit into memory, TrainingError when the samples stop being finite (it names the
        step; on a CPU at that step, elsewhere after the last one).
        """
        return self._iterate(self._call(inputs), watched=True)

    def explain(self) -> str:
        """How the last call ran: as a CUDA graph or eagerly, and why; and whether its network did
        as a program of fused operations, where that was asked for."""
        networks = [network.programs.explain() for network in self._networks]
        return "; ".join(filter(None, [self._ran, *networks]))

    def close(self) -> None:
        """Drop all captured graphs and their memory. The sampler can be used again."""
        self._graphs.close()

    @property
    def _networks(self) -> list[Network]:
        return [self.network] if self.guide is None else [self.network, self.guide]

    def _call(self, inputs: Inputs) -> Call:
        device = self._device_of(inputs.image if inputs.noise is None else inputs.noise)
        stats = self.stats.begin(inputs.shape[0], splits=device.type == "cpu")
        with stats.phase("prepare"):
            return Call(self, inputs, device, stats)

    def _iterate(self, call: Call, watched: bool) -> Generator[Step, None, None]:
        """The steps; unwatched, only the last one has its tensors."""
        engine: _Replayed | _Eager = _Eager(call.plain, State.beginning(call.x, call.table))
        last = len(call.timesteps) - 1
        looked_at = watched or self.denoised_fn is not None or self.cond_fn is not None
        with ExitStack() as stack:
            with call.stats.phase("prepare"):
                given = (looked_at, call.timesteps)
                stack.enter_context(self.network.sampling(*given, call.plain.depth))
                if self.guide is not None:
                    stack.enter_context(self.guide.sampling(*given))
                self._graphs.begin(self._networks)
            for i, timestep in enumerate(call.timesteps):
                run = call.run_of(i)
                # The caller's own gradient mode is back while the generator waits at the yield.
                with torch.no_grad(), explains_out_of_memory(run, engine.state.x, i):
                    if looked_at and i > 0:  # somebody had a chance to change the model
                        for network in self._networks:
                            network.follow()
                    if i == 0 or watched or call.changes_at(i):
                        engine = self._engine(run, engine)
                    with call.stats.phase("sampling"):
                        # Copies: the next replay writes over what a graph has made.
                        made = engine.step(i, copied=watched or i == last)
                        call.stats.steps += 1
                        run.check_finite(made[0], i)
                step: Step = {"step": i, "timestep": timestep}
                if watched or i == last:
                    step |= {"sample": made[0], "pred_xstart": made[1]}
                yield step

    def _engine(self, run: Run, before: "_Replayed | _Eager") -> "_Replayed | _Eager":
        """What does row i, and those after it until something changes."""
        found = self._graphs.find(run, before.state)
        if not isinstance(found, CapturedStep):
            self._ran = f"eager: {found}"
            return _Eager(run, before.position(run))
        self._ran = f"a captured CUDA graph: {found.figures}"
        if isinstance(before, _Replayed) and before.graph is found and before.run is run:
            return before
        return _Replayed(run, before.position(run), found)

    def _device_of(self, tensor: Tensor | None) -> torch.device:
        if self.device is not None:
            return self.device
        if self.network.device is not None:
            return self.network.device
        return torch.device("cpu") if tensor is None else tensor.device


class _Eager:
    """A call's steps, run one after the other; ``state``: where it is."""

    def __init__(self, run: Run, state: State):
        self.run, self.state = run, state

    def position(self, run: Run) -> State:
        """Tensors that nobody else writes to, for the rows of a run."""
        return self.state if run is self.run else self.state.anew()

    def step(self, i: int, copied: bool) -> tuple[Tensor, Tensor]:
        x, x_start = self.run.advance(self.state, i, self.run.extents[i])
        self.state = replace(self.state, x=x, x_start=x_start)
        return (x.clone(), x_start.clone()) if copied else (x, x_start)


class _Replayed(_Eager):
    """A call's steps, replayed. Its tensors are the graph's, as long as no other call wants the
    graph: it then keeps copies of them, and goes on from these."""

    def __init__(self, run: Run, state: State, graph: CapturedStep):
        super().__init__(run, state)
        self.graph = graph

    def position(self, run: Run) -> State:
        with self.graph.lock:
            state = self.state.copy()
        return state if run is self.run else state.anew()

    def step(self, i: int, copied: bool) -> tuple[Tensor, Tensor]:
        with self.graph.lock:
            self.graph.serve(self, i)
            self.state = self.graph.step(i)
            x, x_start = self.state.x, self.state.x_start
            assert x_start is not None
            return (x.clone(), x_start.clone()) if copied else (x, x_start)
