"""The stages of an experiment: each a command of fastdiff, in the order in which they are done."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands.reproduce_request import Request, Training
from fastdiff.data.spaced import evenly_spaced
from fastdiff.evaluation.features import FeatureNetwork
from fastdiff.evaluation.published import check_kinds
from fastdiff.experiments.plan import Stage
from fastdiff.experiments.table import SAMPLES, Experiment, OverCompute, OverSteps, Sampling
from fastdiff.images import samples_file_name
from fastdiff.models.flops import unet_flops
from fastdiff.models.unet import UNet
from fastdiff.models.valueless import valueless

FLOAT = 4  # bytes
MOMENTS = 2  # of Adam, beside weights and averages


@dataclass(frozen=True)
class Point:
    """What is scored: a row of a table, a point of a curve.

    Attributes:
        name: of the sampling, or of the curve.
        figures: the paper's.
        scores: the file that ``fastdiff evaluate`` writes; bits: that of ``fastdiff nll``, if any.
        x: where it stands in a figure.
    """

    name: str
    figures: Mapping[str, float]
    scores: Path
    bits: Path | None = None
    x: float = 0.0


class Stages:
    """What an experiment does, in ``stages``, and leaves, in ``points``; ``networks`` are those
    that it needs, by the names that the stages have for them."""

    def __init__(
        self, request: Request, features: FeatureNetwork, feature_words: tuple[str, ...]
    ) -> None:
        self.request, self.features, self.feature_words = request, features, feature_words
        self.feature_bytes = FLOAT * sum(features.widths.values())
        self.stages: list[Stage] = []
        self.points: list[Point] = []
        self.networks: dict[str, Training | Checkpoint] = {}
        self.real = len(evenly_spaced(request.data, request.scale.some(SAMPLES)))
        experiment = request.experiment
        if isinstance(experiment, Experiment):
            self._table(experiment)
        elif isinstance(experiment, OverSteps):
            self._over_steps(experiment)
        else:
            self._over_compute(experiment)

    def _table(self, experiment: Experiment) -> None:
        scale, out = self.request.scale, self.request.out
        given = self.request.checkpoints.get("checkpoint")
        if given is None:
            training = self.request.training(experiment.preset, *experiment.train)
            self._train("train", training)
        self.networks["network"] = training if given is None else given
        where = out / "train" if given is None else given.path
        bits = None if experiment.bits_per_dim is None else out / "nll.json"
        for sampling in experiment.samplings:
            point = Point(
                sampling.name, sampling.figures, out / sampling.name / "scores.json", bits
            )
            self._sample("network", where, sampling, scale.samples(SAMPLES), point.scores.parent)
            self._score(point, scale.samples(SAMPLES), experiment.metrics)
        if bits is not None:
            self._likelihood("network", where, bits, scale.some(len(self.request.eval_data)))

    def _over_steps(self, experiment: OverSteps) -> None:
        scale, given = self.request.scale, self.request.checkpoints
        self.networks |= given
        longest = given["learned"].diffusion.num_timesteps
        numbers = sorted({min(scale.steps(number), longest) for number in experiment.steps})
        samples = scale.samples(experiment.samples)
        for curve, (whose, flags) in experiment.curves.items():
            for steps in numbers:
                folder = self.request.out / curve / str(steps)
                sampling = Sampling(curve, steps, flags=flags)
                self._sample(whose, given[whose].path, sampling, samples, folder, exact=True)
                self._score(Point(curve, {}, folder / "scores.json", x=steps), samples, ("fid",))

    def _over_compute(self, experiment: OverCompute) -> None:
        scale = self.request.scale
        samples = scale.samples(experiment.samples)
        for preset in experiment.presets:
            training = self.request.training(preset, "--steps", str(experiment.iterations))
            self.networks[preset] = training
            spent, before = _spent(training), 0
            for number in _checked(training.config.steps, experiment.shares):
                folder = self.request.out / preset / str(number)
                run = self._train(f"{preset}/train", training, before, number)
                before = number
                self._sample(preset, run, experiment.sampling, samples, folder)
                bits = folder / "nll.json"
                point = Point(preset, {}, folder / "scores.json", bits, x=spent * number)
                self._score(point, samples, ("fid",))
                self._likelihood(preset, run, bits, samples)

    def _train(
        self, name: str, training: Training, before: int = 0, steps: int | None = None
    ) -> Path:
        """A training, or its part from the step ``before`` on: its run directory."""
        request, config = self.request, training.config
        run, network = request.out / name, name.partition("/")[0] if "/" in name else "network"
        until = config.steps if steps is None else steps
        words = ["train", "--preset", training.preset, *training.flags, *self._data(request.spec)]
        words += ["--steps", str(until), "--out", str(run), "--resume", *request.device]
        with valueless():
            weights = sum(p.numel() for p in UNet(**training.model).parameters())
        kept = (1 + MOMENTS + len(config.ema)) * max(1, config.keep)
        self.stages.append(
            Stage(
                name if steps is None else f"{name}-{steps}",
                tuple(words),
                "training",
                network,
                (until - before) * config.batch_size,
                FLOAT * weights * kept if before == 0 else 0,
            )
        )
        return run

    def _sample(
        self,
        network: str,
        checkpoint: Path,
        sampling: Sampling,
        samples: int,
        folder: Path,
        exact: bool = False,
    ) -> None:
        """exact: ``sampling.steps`` are of this scale already."""
        request = self.request
        steps = sampling.steps if exact else request.scale.steps(sampling.steps)
        words = ["sample", "--checkpoint", str(checkpoint), "--num", str(samples)]
        words += ["--steps", str(steps), *sampling.flags, "--truncate", "--no-pngs"]
        words += [*request.sample_flags, "--out", str(folder), *request.device]
        self.stages.append(
            Stage(
                self._name(folder, "sample"),
                tuple(words),
                "sampling",
                network,
                samples * steps * sampling.passes,
                samples * request.data.channels * _area(request),
            )
        )

    def _score(self, point: Point, samples: int, metrics: tuple[str, ...]) -> None:
        check_kinds(metrics, self.features)
        request, folder = self.request, point.scores.parent
        shape = (samples, *request.data.image_size, request.data.channels)
        words = ["evaluate", "--samples", str(folder / samples_file_name(shape))]
        words += [*self._data(request.spec), "--metrics", ",".join(metrics), *self.feature_words]
        words += ["--features-dir", str(request.out / "features")]
        if (real := request.scale.some(SAMPLES)) is not None:
            words += ["--num", str(real)]
        words += ["--out", str(point.scores), *request.device]
        images = samples + (0 if self.points else self.real)  # the real ones' are kept
        self.stages.append(
            Stage(
                self._name(folder, "evaluate"),
                tuple(words),
                "features",
                "",
                images,
                images * self.feature_bytes,
            )
        )
        self.points.append(point)

    def _likelihood(self, network: str, checkpoint: Path, out: Path, count: int | None) -> None:
        request, scale = self.request, self.request.scale
        all_steps = self.networks[network].diffusion.num_timesteps
        steps = all_steps if scale.whole else min(all_steps, scale.steps(all_steps))
        images = len(evenly_spaced(request.eval_data, count))
        words = ["nll", "--checkpoint", str(checkpoint), *self._data(request.eval_spec)]
        words += [] if steps == all_steps else ["--respacing", str(steps)]
        words += [] if count is None else ["--num", str(images)]
        words += ["--out", str(out), *request.device]
        name = self._name(out.parent, "nll")
        self.stages.append(Stage(name, tuple(words), "scoring", network, images * steps))

    def _data(self, spec: str) -> tuple[str, ...]:
        return ("--data", spec, *self.request.reading)

    def _name(self, folder: Path, work: str) -> str:
        return (folder / work).relative_to(self.request.out).as_posix()


def _checked(iterations: int, shares: tuple[float, ...]) -> list[int]:
    """The numbers of iterations after which a network is scored."""
    return sorted({max(1, round(share * iterations)) for share in shares})


def _spent(training: Training) -> float:
    """Operations of an iteration."""
    return training.config.batch_size * unet_flops(
        training.model, training.model["image_size"], training=True
    )


def _area(request: Request) -> int:
    height, width = request.data.image_size
    return height * width
