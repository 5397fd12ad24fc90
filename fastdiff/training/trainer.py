"""Trainer: AdamW on a diffusion loss, with averages, logs and checkpoints that resume exactly."""

import contextlib
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.run_directory import checkpoint_path, held, newest_checkpoint, require_run
from fastdiff.data import BatchStream, ImageDataset, match_classes
from fastdiff.data.dataset import check_bytes
from fastdiff.errors import InputError
from fastdiff.images import save_grid, to_float
from fastdiff.models.ema import EMA
from fastdiff.models.unet import UNet
from fastdiff.ops.normal import draw_like
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.training import preview, state
from fastdiff.training.checks import check_fit, check_images, choose_device, describe_images
from fastdiff.training.config import TrainConfig, learning_rate
from fastdiff.training.guard import FiniteGuard, check_weights
from fastdiff.training.init import fit_to_init, read_init
from fastdiff.training.metrics import IntervalMeter, MetricsWriter
from fastdiff.training.progress import progress_bar
from fastdiff.training.rescue import rescued
from fastdiff.training.run_folder import opened
from fastdiff.training.saved import STATE, SavedRun, read_checkpoint
from fastdiff.training.step import autocast_to, backward, clip_gradients
from fastdiff.training.stop import StopRequest
from fastdiff.training.timestep_samplers import create_timestep_sampler


class Trainer:
    """Trains ``model`` to reverse ``diffusion`` on ``dataset``; leaves everything in ``run_dir``.

    ``run_dir`` gets checkpoints/step_XXXXXXXX/, metrics.jsonl, tensorboard/, samples/ and, at the
    end, loss_curve.png. Seeding happens in ``fit``: torch's global generators drive the timesteps,
    noise and dropout, so that one seed (or one checkpoint) decides the whole run.

    Args:
        model: a 2-D UNet; trained in place, on ``device``.
        diffusion: a GaussianDiffusion; its loss_type is what is minimised.
        dataset: images, see ``fastdiff.data.load_dataset``.
        config: see TrainConfig.
        run_dir: made if missing; must be empty or a run without checkpoints (``resume`` continues
            those). ``fit`` keeps other processes out of it.
        eval_dataset: images the bits/dim are measured on; by default the training images.
        device: by default CUDA if there is one, else the CPU.
        info: facts to record in every checkpoint beside those of the dataset.
        progress: show a bar with the loss, steps/s and the time left (needs tqdm).

    Raises InputError for parts that do not fit each other.
    """

    def __init__(
        self,
        model: UNet,
        diffusion: GaussianDiffusion,
        dataset: ImageDataset,
        config: TrainConfig,
        run_dir: str | os.PathLike[str],
        *,
        eval_dataset: ImageDataset | None = None,
        device: torch.device | str | None = None,
        info: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        check_fit(model, diffusion, dataset, config)
        if eval_dataset is not None:
            eval_dataset = match_classes(
                eval_dataset, dataset.class_names, model.num_classes, "the evaluation set"
            )
        check_images(model, eval_dataset or dataset, "evaluation")
        if config.nll_every:
            check_bytes(eval_dataset or dataset, "nll_every, a bound on bits/dim,")
        self.run_dir = Path(run_dir)
        self.device = choose_device(device)
        self.model = model.to(self.device).train()
        network = torch.compile(self.model) if config.compile else self.model
        self._predict = autocast_to(config.dtype, self.device, network)
        self.diffusion = diffusion
        self.dataset = dataset
        self.eval_dataset = eval_dataset or dataset
        self.config = config
        self.info = {**describe_images(dataset), **(info or {})}
        self.show_progress = progress

        self.step = 0
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.ema = EMA(self.model, config.ema, warmup=config.ema_warmup)
        self.timesteps = create_timestep_sampler(config.timestep_sampler, diffusion)
        self.meter = IntervalMeter(diffusion.num_timesteps, self.device)
        self.guard = FiniteGuard(self.device)
        # Looking at the loss is free on the CPU; elsewhere it would make every step wait.
        self.check_every = 1 if self.device.type == "cpu" else config.log_every
        self.stream = BatchStream(
            dataset,
            config.batch_size,
            seed=config.seed,
            random_flip=config.flip,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        self.last_checkpoint: Path | None = None
        self._reported = 0  # the step that was logged last, or had nothing to log
        self._saved_as: tuple[int, int] | None = None  # step and _reported of last_checkpoint
        self.half_done = False  # between an update of the weights and the end of its step
        self._rng: Mapping[str, Tensor] | None = None

    @classmethod
    def from_checkpoint(
        cls,
        source: str | os.PathLike[str],
        dataset: ImageDataset,
        config: TrainConfig,
        run_dir: str | os.PathLike[str],
        *,
        weights: str | float = "ema",
        diffusion: GaussianDiffusion | None = None,
        info: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "Trainer":
        """A new run that begins with the weights of ``source``: anything ``fastdiff.load`` reads.

        The network and its weights are carried over, and the process unless ``diffusion`` is
        given; the step, the optimizer, the averages and the order of the images start anew.
        ``weights`` chooses among the checkpoint's as ``load`` does; ``options`` are Trainer's.

        Raises InputError when ``source`` cannot be read, has no process and none is given, or does
        not fit the images.
        """
        init = read_init(source, weights)
        if init.warning is not None:
            warnings.warn(init.warning, RuntimeWarning, stacklevel=2)
        dataset = fit_to_init(init, dataset)
        process = diffusion or init.diffusion
        if process is None:
            raise InputError(f"{init.path} holds a network without its process: give diffusion=")
        facts = {**(info or {}), "init": init.record}
        return cls(init.model, process, dataset, config, run_dir, info=facts, **options)

    @classmethod
    def resume(
        cls,
        run_dir: str | os.PathLike[str],
        dataset: ImageDataset,
        *,
        changes: Mapping[str, Any] | None = None,
        data_changed: bool = False,
        **options: Any,
    ) -> "Trainer":
        """The trainer of the newest checkpoint in ``run_dir``, ready to continue with ``fit``.

        On a CPU it continues bit for bit as if it had never stopped. ``changes`` are settings of
        TrainConfig that shall differ from now on; batch size, seed, EMA rates and their warm-up,
        timestep sampler and flips cannot. A learning-rate schedule follows the new ``steps``.
        ``data_changed`` continues on other images of the same kind: their order starts anew, and
        the checkpoints record the change under info.data_changes. ``options`` are Trainer's.

        Raises InputError when ``run_dir`` is no run or has no checkpoint, another process trains
        into it, a file is damaged (the message names it), the data set is another one, or a
        change is not allowed.
        """
        saved = cls.read_run(run_dir)
        return cls.from_saved(
            saved, dataset, run_dir, changes=changes, data_changed=data_changed, **options
        )

    @staticmethod
    def read_run(run_dir: str | os.PathLike[str]) -> SavedRun:
        """The newest checkpoint of ``run_dir``, for ``from_saved``; InputError as ``resume``."""
        require_run(run_dir)
        with held(Path(run_dir)):  # no other process deletes it while it is read
            return read_checkpoint(newest_checkpoint(run_dir))

    @classmethod
    def from_saved(
        cls,
        saved: SavedRun,
        dataset: ImageDataset,
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
        config = saved.config.resumed_with(dict(changes or {}))
        facts = {**saved.info, **(info or {})}
        matched = match_classes(dataset, saved.info.get("class_names"), saved.model.num_classes)
        trainer = cls(saved.model, saved.diffusion, matched, config, run_dir, info=facts, **options)
        trainer._restore(saved, data_changed)
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
        settings = {
            "train": self.config.to_dict(),
            "model": self.model.config,
            "diffusion": self.diffusion.to_config(),
            "info": self.info,
        }
        with opened(self.run_dir, self.last_checkpoint, settings):
            self._seed()
            self._clock = self.step, time.monotonic()
            with (
                StopRequest(self.config.max_minutes) as stop,
                MetricsWriter(self.run_dir, self._reported, self.config.tensorboard) as metrics,
                progress_bar(self.config.steps, self.step, self.show_progress) as self.bar,
                contextlib.closing(self.stream),
            ):
                self.metrics = metrics
                self._train(stop)
            preview.plot_curve(self.run_dir)
        stop.reraise()
        return self.step

    def _train(self, stop: StopRequest) -> None:
        try:
            if self._reported < self.step:  # an error came between that step and its log line
                with rescued(self, stop):
                    self._report()
            while self.step < self.config.steps and not stop.requested:
                with rescued(self, stop):
                    self._train_step()
                    self._report()
                if self._due(self.config.save_every):
                    self.save()
            self.save()
        finally:
            self._rng = state.rng_tensors(self.device)  # from where another fit goes on

    def _train_step(self) -> None:
        """One optimizer step. Waits for nothing but the next batch (and, on the CPU, the loss)."""
        x_start, kwargs = self._next_batch()
        t, weights = self.timesteps.sample(len(x_start), self.device)
        noise = draw_like(x_start)
        self.optimizer.zero_grad(set_to_none=True)
        losses = backward(
            self.diffusion,
            self._predict,
            x_start,
            t,
            weights,
            noise,
            kwargs,
            self.config.microbatch,
        )
        grad_norm = clip_gradients(self.parameters, self.config.grad_clip)

        self.guard.record(self.step + 1, (losses["loss"] * weights).mean(), grad_norm)
        if self.check_every == 1:
            self.guard.check(self.advice())  # before the update: the weights stay good
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.half_done = True
        self.optimizer.step()
        self.ema.update()
        self.timesteps.update_with_losses(t, losses["loss"])
        self.meter.add(t, weights, losses, grad_norm)
        self.step += 1
        self.half_done = False

    def _next_batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Images in [-1, 1] (N, C, H, W) and the network's keyword arguments, on the device."""
        images, labels = next(self.stream)
        x_start = to_float(images.to(self.device, non_blocking=True))
        x_start = x_start.contiguous(memory_format=torch.channels_last)
        if self.model.num_classes is None:
            return x_start, {}
        y = labels.to(self.device, non_blocking=True)
        if self.config.label_dropout and self.model.null_label is not None:
            hidden = torch.rand(y.shape, device=self.device) < self.config.label_dropout
            y = torch.where(hidden, self.model.null_label, y)
        return x_start, {"y": y}

    def _report(self) -> None:
        """Log what is due after this step; after an error it is still to do."""
        meter = self.meter.state_dict()
        try:
            self._log()
        except BaseException:
            self.meter.load_state_dict(meter)
            raise
        self._reported = self.step
        self.bar.update()

    def _log(self) -> None:
        """The log line, bits/dim, the sample grid."""
        values: dict[str, float] = {}
        if self._due(self.config.log_every) or self.step == self.config.steps:
            self.guard.check(self.advice())
            values |= self.meter.summary()
            values["lr"] = learning_rate(self.step - 1, self.config)
            values["samples"] = self.step * self.config.batch_size
            values["steps_per_second"] = self._steps_per_second()
            self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        if self._due(self.config.nll_every):
            values |= self._measure_nll()
        if values:
            self.metrics.write(self.step, values)
        if self._due(self.config.sample_every):
            self._save_grid()

    def _steps_per_second(self) -> float:
        """Since the last call, whatever happened in between."""
        now = time.monotonic()
        rate = (self.step - self._clock[0]) / max(now - self._clock[1], 1e-9)
        self._clock = self.step, now
        return rate

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.step % interval == 0

    def save(self) -> Path:
        """Write the checkpoint of this step (unless it stands already) and prune older ones.

        Raises TrainingError instead when the run has diverged, OSError when the disk is full.
        """
        try:
            self.metrics.sync()
            return self.write_checkpoint()
        except OSError as error:
            raise OSError(f"checkpoint not saved: {error}; {self.advice()}") from error

    def write_checkpoint(self) -> Path:
        """:meth:`save` without advice in the message of an OSError."""
        path = checkpoint_path(self.run_dir, self.step)
        if self._saved_as == (self.step, self._reported):
            return path
        self.guard.check(self.advice())
        check_weights(self.parameters, self.step, self.advice())
        checkpoint.save(
            path,
            self.model,
            diffusion=self.diffusion,
            ema=self.ema,
            step=self.step,
            info=self.info,
            extra_tensors={STATE: self._state_tensors()},
            extra_json={STATE: self._state_json()},
        )
        self.last_checkpoint, self._saved_as = path, (self.step, self._reported)
        state.prune_checkpoints(self.run_dir, self.config.keep)
        return path

    def _state_tensors(self) -> dict[str, Tensor]:
        names = state.parameter_names(self.model)
        return {
            **state.prefixed("optimizer", state.optimizer_tensors(self.optimizer, names)),
            **state.prefixed("timesteps", self.timesteps.state_dict()),
            **state.prefixed("meter", self.meter.state_dict()),
            **state.prefixed("rng", state.rng_tensors(self.device)),
        }

    def _state_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "reported": self._reported,
            "batches_drawn": self.stream.position,
            "images": len(self.dataset),
            "config": self.config.to_dict(),
        }

    def _restore(self, saved: SavedRun, data_changed: bool) -> None:
        """Take over everything but the weights, which the model came with."""
        if data_changed:
            change = {"step": saved.step, "images": len(self.dataset), "before": saved.images}
            self.info["data_changes"] = [*self.info.get("data_changes", []), change]
        else:
            self._check_same_images(saved)
            self.stream.position = saved.batches_drawn
        self.step = self.ema.updates = saved.step
        self._reported = saved.reported
        for rate in self.ema.rates:
            self.ema.load_state_dict(rate, saved.averages[rate])
        state.load_optimizer_tensors(self.optimizer, self.model, saved.part("optimizer"))
        self.timesteps.load_state_dict(saved.part("timesteps"))
        self.meter.load_state_dict(saved.part("meter"))
        self._rng = saved.part("rng")
        self.last_checkpoint, self._saved_as = saved.path, (saved.step, saved.reported)

    def _check_same_images(self, saved: SavedRun) -> None:
        if len(self.dataset) != saved.images:
            raise InputError(
                f"the data set has {len(self.dataset)} images, but '{self.run_dir}' was trained on "
                f"{saved.images}: put back what is missing (a broken picture that is passed over "
                "counts as missing), or go on with what is there, in a new order: --data-changed "
                "(in Python data_changed=True)"
            )

    def _seed(self) -> None:
        if self._rng is None:
            torch.manual_seed(self.config.seed)
        else:
            state.load_rng_tensors(self._rng, self.device)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model holds its slowest average, which is what a user would sample."""
        return self.ema.swapped() if self.ema.rates else contextlib.nullcontext()

    def _measure_nll(self) -> dict[str, float]:
        with self._averaged():
            return preview.measure_nll(self.model, self.diffusion, self.eval_dataset, self.config)

    def _save_grid(self) -> None:
        size = self.dataset.image_size
        with self._averaged():
            images = preview.draw_samples(self.model, self.diffusion, size, self.config)
        save_grid(images, self.run_dir / "samples" / f"step_{self.step:08d}.png")
        self.metrics.write_images(self.step, "samples", images)

    def advice(self) -> str:
        """The end of an error message: where to go on from."""
        if self.last_checkpoint is None:
            return "no checkpoint had been saved yet"
        return f"the last good checkpoint is {self.last_checkpoint}"
