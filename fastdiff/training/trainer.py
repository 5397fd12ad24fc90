"""Trainer: gradient steps on a diffusion loss, with averages, logs and checkpoints that resume
exactly."""

import contextlib
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.network import Given
from fastdiff.checkpoints.run_directory import held_for_all, newest_checkpoint, require_run
from fastdiff.checks import choose_device
from fastdiff.data import ImageDataset, match_classes
from fastdiff.data.processes import is_gone, unreadable, unwatched
from fastdiff.data.words import TIMESTEPS
from fastdiff.models import shards
from fastdiff.models.ema import EMA
from fastdiff.ranks import ALONE, Ranks, join
from fastdiff.training import network, preview, saved
from fastdiff.training.batches import Batches, batches_of, describe
from fastdiff.training.checks import checked, facts, match_eval
from fastdiff.training.config import TrainConfig
from fastdiff.training.feed import Feed
from fastdiff.training.graph import StepGraphs, StepInputs
from fastdiff.training.guard import FiniteGuard
from fastdiff.training.init import fit_to_init, read_init
from fastdiff.training.metrics import IntervalMeter
from fastdiff.training.noise import Noise
from fastdiff.training.reports import Reports
from fastdiff.training.rescue import rescued
from fastdiff.training.run_folder import opened
from fastdiff.training.saved import SavedRun, read_checkpoint
from fastdiff.training.saving import Saving
from fastdiff.training.scores import Scores
from fastdiff.training.self_condition import SelfCondition
from fastdiff.training.step import backward
from fastdiff.training.stop import StopRequest
from fastdiff.training.timestep_samplers import create_timestep_sampler
from fastdiff.training.update import GivenOptimizer, GivenScheduler, Update

T = TypeVar("T")


class Trainer:
    """Trains ``model`` to reverse ``diffusion`` on ``data``; leaves everything in ``run_dir``.

    ``run_dir`` gets checkpoints/step_XXXXXXXX/, averages/ (snapshots), metrics.jsonl, tensorboard/,
    samples/ and, at the end, loss_curve.png. Timesteps, noise, flips and hidden labels follow from
    (seed, step, sample number), so that one seed decides the run, whatever the number of processes:
    started by torchrun, each of N ranks takes 1/N of every batch, gradients are averaged over them
    (DistributedDataParallel), and rank 0 writes. Dropout, the network's own, is each rank's.

    Args:
        model: any network that is called ``model(x, t, **arguments)``; trained in place, on
            ``device``.
        diffusion: a process with ``training_losses`` and ``to_config``: a GaussianDiffusion, whose
            loss_type is what is minimised, a VarianceExploding, an EDM; or of a classifier of noisy
            images a NoisyClassification.
        data: an ImageDataset (``fastdiff.data.load_dataset``), a torch Dataset, IterableDataset or
            DataLoader, a Hugging Face datasets.Dataset. Items are x, (x, label) or dicts: see
            ``fastdiff.data.Items``; uint8 and uint16 are scaled to [-1, 1].
        config: see TrainConfig.
        run_dir: made if missing; must be empty or a run without checkpoints (``resume`` continues
            those). ``fit`` keeps other processes out of it.
        eval_dataset: what the bits/dim are measured on, uint8 items of the same kinds; by default
            ``data``.
        device: by default CUDA if there is one, else the CPU; each of several ranks takes its own.
        info: facts to record in every checkpoint beside those of the data.
        progress: show a bar with the loss, steps/s and the time left (needs tqdm).
        ranks: the processes that train together; by default those that torchrun has started.
        optimizer: a torch optimizer of the network's parameters, or a function of the list of them
            that makes one, such as ``torch.optim.SGD``; by default AdamW, by the settings ``lr``,
            ``betas`` and ``weight_decay``, which are its alone. One with ``shard`` or of a resumed
            run has to be a function: the parameters are made anew.
        scheduler: of ``torch.optim.lr_scheduler``, or a function of the optimizer that makes it;
            it takes a step after each of the optimizer's, a ReduceLROnPlateau after each log line,
            by its loss. By default the settings ``warmup`` and ``lr_schedule`` multiply the rate
            of each of the optimizer's groups.
        callbacks: each is called ``callback(trainer, values)`` after every step, on every rank;
            ``values`` are the step's log line, {} where it has none. On all ranks they are the
            same, but for what the clock says. What a callback raises ends the run, whose step is
            saved.

    Raises InputError for parts that do not fit each other, and where ranks were started otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: Any,
        data: Any,
        config: TrainConfig,
        run_dir: str | os.PathLike[str],
        *,
        eval_dataset: Any = None,
        device: torch.device | str | None = None,
        info: Mapping[str, Any] | None = None,
        progress: bool = True,
        ranks: Ranks | None = None,
        optimizer: GivenOptimizer = None,
        scheduler: GivenScheduler = None,
        callbacks: Sequence[Callable[["Trainer", dict[str, float]], Any]] = (),
    ) -> None:
        self.ranks = ranks or join(None if device is None else str(device), config.rank_minutes)
        self.data = self.ranks.together(lambda: checked(model, diffusion, data, config))
        self.run_dir = Path(run_dir)
        self.device = choose_device(self.ranks.device if self.ranks.count > 1 else device)
        self.model = model.train()
        self.diffusion = diffusion
        self.config = config
        self.eval_dataset = self.ranks.together(
            lambda: match_eval(model, self.data, eval_dataset, config)
        )
        self.info = {**describe(self.data), **(info or {}), **config.facts()}
        self.self_condition: SelfCondition | None = None
        if config.self_condition:
            self.self_condition = SelfCondition(
                config.self_condition, diffusion, config.seed, self.device
            )
        if config.wandb:
            self.info.setdefault("wandb", uuid.uuid4().hex)  # which run it is there
        self.ranks.agree(facts(self))

        self.description = self.ranks.together(lambda: saved.model_config(model))
        self._over_ranks = network.over_ranks(model, config, self.ranks, self.device)
        self._predict = network.predictor(self._over_ranks, config, self.device)
        self.step = 0
        self.update = self.ranks.together(
            lambda: Update(model, config, self.device, optimizer, scheduler)
        )
        self.ranks.agree(self.update.kinds)
        self.graphs = self.ranks.together(lambda: StepGraphs(self, self._gradients))
        self.parameters, self.optimizer = self.update.parameters, self.update.optimizer
        widths = config.ema_sigma_rel
        self.ema = EMA(self.model, config.ema, warmup=config.ema_warmup, sigma_rel=widths)
        self.timesteps = create_timestep_sampler(config.timestep_sampler, diffusion)
        levels = 1 if diffusion.continuous else diffusion.num_timesteps
        self.meter = IntervalMeter(levels, self.device)
        self.guard = FiniteGuard(self.device)
        self.noise = self.ranks.together(lambda: Noise(config))
        # Looking at the loss is free on the CPU; elsewhere it would make every step wait.
        self.check_every = 1 if self.device.type == "cpu" else config.log_every
        self.stream: Batches = self.ranks.together(
            lambda: batches_of(self.data, config, self.ranks, self.device)
        )
        label = network.label_of(model, diffusion)
        self.feed = Feed(self.stream, self.model, label, config, self.ranks, self.device)
        self.reports, self.show_progress = Reports(), progress
        self.scores = self.ranks.together(lambda: Scores(config, self.device))
        self.callbacks = list(callbacks)
        self.saving = Saving()
        self.half_done = False  # between an update of the weights and the end of its step

    @classmethod
    def from_checkpoint(
        cls,
        source: str | os.PathLike[str],
        data: Any,
        config: TrainConfig,
        run_dir: str | os.PathLike[str],
        *,
        weights: str | float = "ema",
        model: Given = None,
        diffusion: Any = None,
        info: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "Trainer":
        """A new run that begins with the weights of ``source``: anything ``fastdiff.load`` reads.

        The network and its weights are carried over, and the process unless ``diffusion`` is
        given; the step, the optimizer, the averages and the order of the images start anew.
        ``weights`` chooses among the checkpoint's as ``load`` does, and ``model`` is what it needs
        of a checkpoint of weights alone; ``options`` are Trainer's.

        Raises InputError when ``source`` cannot be read, has no process and none is given, or does
        not fit the images.
        """
        init = read_init(source, weights, model)
        if init.warning is not None:
            warnings.warn(init.warning, RuntimeWarning, stacklevel=2)
        data = fit_to_init(init, data)
        facts = {**(info or {}), "init": init.record}
        process = init.process(diffusion)
        return cls(init.model, process, data, config, run_dir, info=facts, **options)

    @classmethod
    def resume(
        cls,
        run_dir: str | os.PathLike[str],
        data: Any,
        *,
        model: Given = None,
        changes: Mapping[str, Any] | None = None,
        data_changed: bool = False,
        **options: Any,
    ) -> "Trainer":
        """The trainer of the newest checkpoint in ``run_dir``, ready to continue with ``fit``.

        On a CPU it continues bit for bit as if it had never stopped. ``model``, a network or a
        function that makes one, is needed of a network of which the checkpoints hold weights alone
        (see ``fastdiff.save``). ``changes`` are settings of
        TrainConfig that shall differ from now on; batch size, seed, EMA rates and their warm-up,
        timestep sampler and flips cannot. A learning-rate schedule follows the new ``steps``.
        ``data_changed`` continues on other images of the same kind: their order starts anew, and
        the checkpoints record the change under info.data_changes. ``options`` are Trainer's.

        Raises InputError when ``run_dir`` is no run or has no checkpoint, another process trains
        into it, a file is damaged (the message names it), the data set is another one, or a
        change is not allowed.
        """
        device = options.get("device")
        ranks = options.pop("ranks", None) or join(device and str(device), TrainConfig.rank_minutes)
        read = cls.read_run(run_dir, ranks, model)
        options |= {"changes": changes, "data_changed": data_changed, "ranks": ranks}
        return cls.from_saved(read, data, run_dir, **options)

    @staticmethod
    def read_run(
        run_dir: str | os.PathLike[str], ranks: Ranks = ALONE, model: Given = None
    ) -> SavedRun:
        """The newest checkpoint of ``run_dir``, for ``from_saved``; InputError as ``resume``."""
        run = Path(run_dir)
        ranks.on_first(lambda: require_run(run))
        with held_for_all(run, ranks):  # no other process deletes it while it is read
            return ranks.together(lambda: read_checkpoint(newest_checkpoint(run), model))

    @classmethod
    def from_saved(
        cls,
        read: SavedRun,
        data: Any,
        run_dir: str | os.PathLike[str],
        *,
        changes: Mapping[str, Any] | None = None,
        data_changed: bool = False,
        info: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "Trainer":
        """:meth:`resume` for a checkpoint that :meth:`read_run` has read already.

        ``info`` is added to its facts; arguments and errors otherwise as there.
        """
        config = read.config.resumed_with(dict(changes or {}))
        facts = {**read.info, **(info or {})}
        if isinstance(data, ImageDataset):
            classes = getattr(read.model, "num_classes", None)
            data = match_classes(data, read.info.get("class_names"), classes)
        trainer = cls(read.model, read.diffusion, data, config, run_dir, info=facts, **options)
        saved.restore(trainer, read, data_changed)
        return trainer

    def fit(self) -> int:
        """Train up to ``config.steps`` and return the number of finished steps.

        Stops early, after saving a checkpoint, when ``config.max_minutes`` are over, on SIGTERM
        (then raises SystemExit) and on Ctrl-C (then raises KeyboardInterrupt). A second Ctrl-C
        stops at once. Any other error is raised after a checkpoint was saved, which its message
        names, if weights and optimizer are good; resumed, the run goes on as if it had not been.

        Raises:
            TrainingError: the loss or the weights stopped being finite. Nothing of that reaches a
                checkpoint; the message names the step and the last good checkpoint.
            OSError: a file could not be written; earlier checkpoints are intact.
            InputError: an image could not be read; or run_dir is not this run's, or another process
                trains into it, and then nothing of it was touched.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.ranks.heard())
            self.ranks.agree({"the step to go on from": self.step})
            settings = {**saved.settings_of(self), "started_by": self.ranks.agents()}
            folder = opened(self.run_dir, self.last_checkpoint, settings)
            self.ranks.on_first(lambda: stack.enter_context(folder) and None)
            stop = stack.enter_context(StopRequest(self.config.max_minutes))
            stack.enter_context(self.reports.opened(self))
            stack.enter_context(contextlib.closing(self.stream))
            stack.enter_context(contextlib.closing(self.saving))
            self._train(stop)
            self.ranks.on_first(lambda: preview.plot_curve(self.run_dir))
        stop.reraise()
        return self.step

    def _train(self, stop: StopRequest) -> None:
        if self.reports.done < self.step:  # an error came between that step and its log line
            with rescued(self, stop):
                self._finish_step()
        while self.step < self.config.steps:
            with rescued(self, stop), self.ranks.lost():
                if stop.asked_of(self.ranks, self.saving.failed):
                    break
                self._train_step()
                self._finish_step()
            if self.due(self.config.save_every):
                self.save()
        self.save()
        self.saving.finish(self)

    def _finish_step(self) -> None:
        """What follows a step; a resumed run makes up for it where an error came between."""
        if self.due(self.config.ema_snapshot_every):
            self.check_finite()
            saved.take_snapshot(self)
        values = self.reports.make(self)
        if "loss" in values:
            self.update.measured(values["loss"])
        for callback in self.callbacks:
            callback(self, dict(values))

    def _train_step(self) -> None:
        """One optimizer step. Waits for nothing but the next batch (and, on the CPU, the loss)."""
        x_start, kwargs = self.feed.next_batch(self.step)
        u = self.feed.uniform(self.step, TIMESTEPS)
        t, weights = self.timesteps.sample(len(x_start), self.device, u=u)
        drawn = self.noise.drawn(x_start, self.step, self.feed.first_sample)
        inputs = StepInputs(x_start, t, weights, kwargs, drawn)
        seed = partial(self.feed.seed, self.step)
        losses, grad_norm = self.graphs.gradients(self.step, inputs, seed)
        seen = [(losses["loss"] * weights).mean()]
        if not self.update.scaler.is_enabled():  # which leaves out what overflows
            seen.append(grad_norm)
        self.guard.record(self.step + 1, *seen)
        if self.check_every == 1:
            self.check_finite()  # before the update: the weights stay good
        with unwatched():  # half an update can be neither saved nor taken back
            self.half_done = True
            self.graphs.apply(self.step)
            self.ema.update()
            self.timesteps.update_with_losses(*self._of_all_ranks(t, losses["loss"].detach()))
            self.meter.add(t, weights, losses, grad_norm)
            self.step += 1
            self.half_done = False

    def _gradients(self, step: int | Tensor, of: StepInputs) -> tuple[dict[str, Tensor], Tensor]:
        """See ``graph.Gradients``."""
        self.optimizer.zero_grad(set_to_none=True)
        first_sample = self.feed.first_sample
        losses = backward(
            self.diffusion,
            self._predict,
            *of[:4],
            microbatch=self.config.microbatch,
            noise={"seed": self.config.seed, "step": step, "first_sample": first_sample},
            drawn=of.drawn,
            self_condition=self.self_condition,
            scaled=self.update.scaled,
            unsynchronised=network.unsynchronised(self._over_ranks),
        )
        return losses, self.update.clip()

    def _of_all_ranks(self, *values: Tensor) -> list[Tensor]:
        """Each of ``values`` (n,) of every rank, in the order of the batch (N,)."""
        if self.ranks.group is None or not self.timesteps.state_dict():
            return list(values)
        return [self.ranks.joined(value) for value in values]

    def check_finite(self) -> None:
        """TrainingError where the loss or a gradient of some rank is not finite."""
        self.guard.check(self.saving.advice(), self.ranks)

    def due(self, interval: int) -> bool:
        return interval > 0 and self.step % interval == 0

    # --- Checkpoints ----------------------------------------------------------------------------

    def save(self) -> Path:
        """Write the checkpoint of this step (unless it stands already) and prune older ones.

        With ``config.async_save`` it is on the disk when the next one begins, or ``fit`` ends.
        Raises TrainingError instead when the run has diverged, OSError when the disk is full.
        """
        self.check_finite()
        shares = saved.shares_of(self, self.ranks)
        try:
            with unwatched():  # a worker's death would cut it off
                return self.saving.save(self, shares)
        except RuntimeError as error:
            if not is_gone(error):
                raise
            raise OSError(f"{unreadable('a batch', error)}; {self.saving.advice()}") from error

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest one that is on the disk."""
        return self.saving.last

    @property
    def is_spread(self) -> bool:
        """Whether each rank holds a part of the weights alone."""
        return shards.any_spread(self.parameters)

    def with_weights(self, work: Callable[[], T]) -> T:
        """``work()`` where all of the weights can be had: on rank 0, or of a network spread over
        the ranks on all of them together. All ranks call."""
        return (self.ranks.together if self.is_spread else self.ranks.on_first)(work)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model holds what a user would sample: the average that suits best."""
        best = self.ema.best_suited
        return contextlib.nullcontext() if best is None else self.ema.swapped(best)
