"""Scoring samples against the real images they should resemble."""

from fastdiff.evaluation.classifier import Classifier, train_classifier
from fastdiff.evaluation.distances import frechet_distance, frechet_from_moments, nearest_distances
from fastdiff.evaluation.report import format_report
from fastdiff.evaluation.scores import evaluate

__all__ = [
    "Classifier",
    "evaluate",
    "format_report",
    "frechet_distance",
    "frechet_from_moments",
    "nearest_distances",
    "train_classifier",
]
