"""How near a run's samples come to its images, measured as it trains; the best weights are kept."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.evaluation.features import FeatureNetwork, feature_network
from fastdiff.evaluation.published import published_scores
from fastdiff.training.config import TrainConfig
from fastdiff.training.preview import draw_samples
from fastdiff.training.run import Run

BEST, FEATURES = "best", "features"  # folders of a run


class Scores:
    """The Fréchet distances of a run. InputError where their network cannot be had."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.network: FeatureNetwork | None = None
        if config.fid_every:
            self.network = feature_network(config.fid_features, config.fid_weights or None, device)

    def measure(self, run: Run) -> dict[str, float]:
        """The scores of samples of the weights that the model holds now: a call of all ranks.

        What ``published_scores`` says of ``fid`` and near. The weights are kept in best/, a
        checkpoint of them alone, where no distance of the run was less.
        """
        assert self.network is not None
        config, ranks = run.config, run.ranks
        images = draw_samples(run, config.fid_samples).permute(0, 2, 3, 1).numpy()
        found = published_scores(
            images,
            run.data,
            ["fid", "near"],
            self.network,
            folder=run.run_dir / FEATURES,
            device=run.device,
            ranks=ranks,
        )
        values = {
            name: found[name]
            for name in ("fid", "copies", "class_coverage")
            if found[name] is not None
        }
        made = {
            "features": self.network.name,
            "samples": config.fid_samples,
            "sample_steps": config.sample_steps,
            "images": len(run.data),
        }
        if ranks.on_first(lambda: values["fid"] < _least(run.run_dir / BEST, run.step, made)):
            run.with_weights(lambda: _keep(run, {**values, **made}))
        return values


def _keep(run: Run, scores: dict[str, Any]) -> None:
    checkpoint.save(
        run.run_dir / BEST,
        run.model,
        diffusion=run.diffusion,
        step=run.step,
        info={**run.info, "scores": scores},
    )


def _least(best: Path, step: int, made: Mapping[str, Any]) -> float:
    """The distance of the weights that were kept, of an earlier step and made likewise: a distance
    depends on how many images there are."""
    try:
        kept: Any = json.loads((best / "config.json").read_text(encoding="utf-8"))
        scores = kept["info"]["scores"]
        same = kept["step"] < step and all(scores[name] == made[name] for name in made)
        return float(scores["fid"]) if same else float("inf")
    except (OSError, ValueError, KeyError, TypeError):
        return float("inf")
