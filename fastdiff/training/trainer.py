"""Trainer: AdamW on a diffusion loss, with averages, logs and checkpoints that resume exactly."""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.data import BatchStream, ImageDataset, match_classes
from fastdiff.diffusion import GaussianDiffusion
from fastdiff.errors import InputError
from fastdiff.images import save_grid, to_float
from fastdiff.models import checkpoint
from fastdiff.models.ema import EMA
from fastdiff.models.run_directory import checkpoint_path, list_checkpoints, newest_checkpoint
from fastdiff.models.unet import UNet
from fastdiff.rng import draw_like
from fastdiff.timestep_samplers import create_timestep_sampler
from fastdiff.training import preview, state
from fastdiff.training.checks import check_fit, check_images, choose_device, describe_images
from fastdiff.training.config import TrainConfig, learning_rate
from fastdiff.training.guard import FiniteGuard, check_weights
from fastdiff.training.metrics import IntervalMeter, MetricsWriter, replace_text
from fastdiff.training.progress import progress_bar
from fastdiff.training.saved import STATE, SavedRun, read_checkpoint
from fastdiff.training.stop import StopRequest


class Trainer:
    """Trains ``model`` to reverse ``diffusion`` on ``dataset``; leaves everything in ``run_dir``.

    ``run_dir`` gets checkpoints/step_XXXXXXXX/, metrics.jsonl, tensorboard/, samples/ and, at the
    end, loss_curve.png. Seeding happens in ``fit``: torch's global generators drive the timesteps,
    noise and dropout, so that one seed (or one checkpoint) decides the whole run.

    Args:
        model: a 2-D UNet; trained in place, on ``device``.
        diffusion: a GaussianDiffusion; its loss_type is what is minimised.
        dataset: uint8 images, see ``fastdiff.data.load_dataset``.
        config: see TrainConfig.
        run_dir: made if missing; must hold no checkpoints (``resume`` continues those).
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
        self.run_dir = Path(run_dir)
        self.device = choose_device(device)
        self.model = model.to(self.device).train()
        self.network = torch.compile(self.model) if config.compile else self.model
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
        self.ema = EMA(self.model, config.ema)
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
        self._rng: Mapping[str, Tensor] | None = None

    @classmethod
    def resume(
        cls,
        run_dir: str | os.PathLike[str],
        dataset: ImageDataset,
        *,
        changes: Mapping[str, Any] | None = None,
        eval_dataset: ImageDataset | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> "Trainer":
        """The trainer of the newest checkpoint in ``run_dir``, ready to continue with ``fit``.

        On a CPU it continues bit for bit as if it had never stopped. ``changes`` are settings of
        TrainConfig that shall differ from now on; batch size, seed, EMA rates, timestep sampler
        and flips cannot. A learning-rate schedule follows the new ``steps``.

        Raises InputError when there is no checkpoint, a file of it is damaged (the message names
        it), the data set is another one, or a change is not allowed.
        """
        return cls.from_saved(
            read_checkpoint(newest_checkpoint(run_dir)),
            dataset,
            run_dir,
            changes=changes,
            eval_dataset=eval_dataset,
            device=device,
            progress=progress,
        )

    @classmethod
    def from_saved(
        cls,
        saved: SavedRun,
        dataset: ImageDataset,
        run_dir: str | os.PathLike[str],
        *,
        changes: Mapping[str, Any] | None = None,
        eval_dataset: ImageDataset | None = None,
        device: torch.device | str | None = None,
        info: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> "Trainer":
        """``resume`` for a checkpoint that was read already; ``info`` is added to its facts."""
        trainer = cls(
            saved.model,
            saved.diffusion,
            match_classes(dataset, saved.info.get("class_names"), saved.model.num_classes),
            saved.config.resumed_with(dict(changes or {})),
            run_dir,
            eval_dataset=eval_dataset,
            device=device,
            info={**saved.info, **(info or {})},
            progress=progress,
        )
        trainer._restore(saved)
        return trainer

    def fit(self) -> int:
        """Train up to ``config.steps`` and return the number of finished steps.

        Stops early, after saving a checkpoint, when ``config.max_minutes`` are over, on SIGTERM
        (then raises SystemExit) and on Ctrl-C (then raises KeyboardInterrupt).

        Raises:
            TrainingError: the loss or the weights stopped being finite. Nothing of that reaches a
                checkpoint; the message names the step and the last good checkpoint.
            OSError: a file could not be written; earlier checkpoints are intact.
            InputError: run_dir holds checkpoints and this trainer does not come from them.
        """
        self._open_run_dir()
        self._seed()
        self._clock = self.step, time.monotonic()
        with (
            StopRequest(self.config.max_minutes) as stop,
            MetricsWriter(self.run_dir, self.step, self.config.tensorboard) as self.metrics,
            progress_bar(self.config.steps, self.step, self.show_progress) as self.bar,
            contextlib.closing(self.stream),
        ):
            while self.step < self.config.steps and not stop.requested:
                self._train_step()
                self._report()
                if self._due(self.config.save_every):
                    self.save()
            self.save()
        preview.plot_curve(self.run_dir)
        stop.reraise()
        return self.step

    def _train_step(self) -> None:
        """One optimizer step. Waits for nothing but the next batch (and, on the CPU, the loss)."""
        x_start, kwargs = self._next_batch()
        t, weights = self.timesteps.sample(len(x_start), self.device)
        losses = self._backward(x_start, t, weights, draw_like(x_start), kwargs)
        grad_norm = self._clip_gradients()

        self.guard.record(self.step + 1, (losses["loss"] * weights).mean(), grad_norm)
        if self.check_every == 1:
            self.guard.check(self._advice())  # before the update: the weights stay good
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.optimizer.step()
        self.ema.update()
        self.timesteps.update_with_losses(t, losses["loss"])
        self.meter.add(t, weights, losses, grad_norm)
        self.step += 1

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

    def _backward(
        self,
        x_start: Tensor,
        t: Tensor,
        weights: Tensor,
        noise: Tensor,
        kwargs: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Gradients of the batch's mean loss, part by part; the loss terms, each (N,)."""
        self.optimizer.zero_grad(set_to_none=True)
        batch = len(x_start)
        size = self.config.microbatch or batch
        parts = []
        for part in (slice(i, i + size) for i in range(0, batch, size)):
            losses = self.diffusion.training_losses(
                self._predict,
                x_start[part],
                t[part],
                {name: value[part] for name, value in kwargs.items()},
                noise=noise[part],
            )
            ((losses["loss"] * weights[part]).sum() / batch).backward()
            parts.append({name: value.detach() for name, value in losses.items()})
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def _predict(self, x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        """The network, under autocast or not; the losses around it stay in float32."""
        if self.config.dtype == "float32":
            return self.network(x, t, **kwargs)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.network(x, t, **kwargs)

    def _clip_gradients(self) -> Tensor:
        """The gradient norm before clipping, a scalar on the device."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
        return norm

    def _report(self) -> None:
        """What is due after this step: the log line, bits/dim, the sample grid."""
        values: dict[str, float] = {}
        if self._due(self.config.log_every) or self.step == self.config.steps:
            self.guard.check(self._advice())
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
        self.bar.update()

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
        path = checkpoint_path(self.run_dir, self.step)
        if path == self.last_checkpoint:
            return path
        self.guard.check(self._advice())
        check_weights(self.parameters, self.step, self._advice())
        self.metrics.sync()
        try:
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
        except OSError as error:
            raise OSError(f"checkpoint not saved: {error}; {self._advice()}") from error
        self.last_checkpoint = path
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
            "batches_drawn": self.stream.position,
            "images": len(self.dataset),
            "config": self.config.to_dict(),
        }

    def _restore(self, saved: SavedRun) -> None:
        """Take over everything but the weights, which the model came with."""
        self._check_same_images(saved)
        self.step = saved.step
        self.stream.position = saved.batches_drawn
        for rate in self.ema.rates:
            self.ema.load_state_dict(rate, saved.averages[rate])
        state.load_optimizer_tensors(self.optimizer, self.model, saved.part("optimizer"))
        self.timesteps.load_state_dict(saved.part("timesteps"))
        self.meter.load_state_dict(saved.part("meter"))
        self._rng = saved.part("rng")
        self.last_checkpoint = saved.path

    def _check_same_images(self, saved: SavedRun) -> None:
        if len(self.dataset) != saved.images:
            raise InputError(
                f"the data set has {len(self.dataset)} images, but '{self.run_dir}' was trained on "
                f"{saved.images}: a run resumes on the same images"
            )

    def _open_run_dir(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.last_checkpoint is None and list_checkpoints(self.run_dir):
            raise InputError(
                f"'{self.run_dir}' holds checkpoints of an earlier run: resume it, or choose "
                "another directory"
            )
        settings = {
            "train": self.config.to_dict(),
            "model": self.model.config,
            "diffusion": self.diffusion.to_config(),
            "info": self.info,
        }
        replace_text(self.run_dir / "config.json", json.dumps(settings, indent=2) + "\n")

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

    def _advice(self) -> str:
        """The end of an error message: where to go on from."""
        if self.last_checkpoint is None:
            return "no checkpoint had been saved yet"
        return f"the last good checkpoint is {self.last_checkpoint}"
