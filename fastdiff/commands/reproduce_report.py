"""What an experiment came to: a table beside the paper's figures, or a figure, and what differs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.commands.paper_scores import TITLES
from fastdiff.commands.reports import write_csv
from fastdiff.commands.reproduce_request import Request, Training
from fastdiff.commands.reproduce_stages import Point, Stages
from fastdiff.experiments.report import comparison, plot_curves
from fastdiff.experiments.table import SAMPLES, Experiment, OverSteps
from fastdiff.files import replace_text

BITS = "bits/dim"
LABELS = {
    "steps": "sampling steps",
    "flops": "operations of the training",
    "fid": "FID",
    "bits_per_dim": "bits/dim",
}


def report(request: Request, stages: Stages) -> str:
    """For a terminal; the same is written into the folder."""
    experiment = request.experiment
    if isinstance(experiment, Experiment):
        text, found = _table(experiment, stages)
    else:
        text, found = _figure(request, stages)
    differs = differences(request, stages)
    document = {
        "experiment": experiment.name,
        "source": experiment.source,
        "results": found,
        "differs": differs,
    }
    file = request.out / "report.json"
    replace_text(file, json.dumps(document, indent=2) + "\n")
    lines = [f"{experiment.name}: {experiment.source}", text, "what differs from the paper:"]
    return "\n".join([*lines, *(f"- {line}" for line in differs), str(file)])


def _table(experiment: Experiment, stages: Stages) -> tuple[str, list[dict[str, Any]]]:
    rows: list[tuple[str, str, float | None, float]] = []
    for point in stages.points:
        scores = _read(point.scores)
        for name, title in TITLES.items():
            if scores.get(name) is not None:
                rows.append((point.name, title, point.figures.get(name), _first(scores[name])))
    if experiment.bits_per_dim is not None:
        ours = _bits(stages.points[0])
        rows.append(("", BITS, experiment.bits_per_dim, ours))
    keys = ("sampling", "score", "paper", "here")
    return comparison(rows), [dict(zip(keys, row, strict=True)) for row in rows]


def _figure(request: Request, stages: Stages) -> tuple[str, list[dict[str, Any]]]:
    """The points of the curves, which become a .csv and a .png."""
    experiment = request.experiment
    over_steps = isinstance(experiment, OverSteps)
    x = "steps" if over_steps else "flops"
    ys = ["fid"] if over_steps else ["fid", "bits_per_dim"]
    rows: list[dict[str, Any]] = []
    for point in stages.points:
        row = {"curve": point.name, x: point.x, "fid": _read(point.scores)["fid"]}
        rows.append(row if over_steps else {**row, "bits_per_dim": _bits(point)})
    table, picture = (request.out / f"{experiment.name}.{kind}" for kind in ("csv", "png"))
    write_csv(table, rows)
    plot_curves(picture, rows, x=x, ys=ys, labels=LABELS, title=f"after {experiment.source}")
    names = [x, *ys]
    first = max(len(row["curve"]) for row in rows) + 2
    lines = [" " * first + "".join(f"{LABELS[name]:>28}" for name in names)]
    for row in rows:
        lines.append(f"{row['curve']:{first}}" + "".join(f"{row[name]:28.6g}" for name in names))
    return "\n".join([*lines, str(table), str(picture)]), rows


def differences(request: Request, stages: Stages) -> list[str]:
    """From the paper, a line each."""
    experiment, scale = request.experiment, request.scale
    scores = _read(stages.points[0].scores)
    lines = list(experiment.differs) if isinstance(experiment, Experiment) else []
    lines += scores["notes"]
    wanted = SAMPLES if isinstance(experiment, Experiment) else experiment.samples
    if not scale.whole:
        lines.append(f"scale {scale.factor:g}: {scores['samples']:,} samples of {wanted:,}")
        lines.append(f"scored against {scores['real']:,} of {len(request.data):,} real images")
    for name, network in stages.networks.items():
        if isinstance(network, Training):
            lines += _of_training(name, network, request)
        else:
            lines.append(f"the {name} is given, {network.path}: how it was trained is its own")
    for what, flags in (("train", request.train_flags), ("sample", request.sample_flags)):
        if flags:
            lines.append(f"flags of fastdiff {what}: {' '.join(flags)}")
    if stages.points[0].bits is not None:
        lines += _of_bits(stages.points[0].bits, request)
    return list(dict.fromkeys(lines))


def _of_training(name: str, training: Training, request: Request) -> list[str]:
    data = request.data
    lines = [
        f"trained on {len(data):,} images; the paper's: {request.experiment.data}",
        "averages of the weights warm up (the papers' do not)",
    ]
    if data.num_classes != (classes := training.model.get("num_classes")):
        lines.append(f"{data.num_classes} classes, the paper's network has {classes}")
    if not request.scale.whole:
        config, model = training.config, training.model
        lines.append(
            f"the {name} is {model['model_channels']} channels wide, trained {config.steps:,} "
            f"iterations of {config.batch_size} images"
        )
    return lines


def _of_bits(path: Path, request: Request) -> list[str]:
    found = _read(path)
    count = found["bits_per_dim"]["count"]
    lines = []
    if request.eval_data is request.data:
        lines.append("bits/dim are those of training images: give the test images to --eval-data")
    if count < len(request.eval_data):
        lines.append(
            f"bits/dim of {count:,} of {len(request.eval_data):,} images, in "
            f"{found['num_timesteps']:,} steps: with fewer than all the bound is looser"
        )
    return lines


def _bits(point: Point) -> float:
    assert point.bits is not None
    return float(_read(point.bits)["bits_per_dim"]["total"])


def _read(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _first(value: Any) -> float:
    """A score, or the mean of one that has a deviation."""
    return float(value[0] if isinstance(value, list) else value)
