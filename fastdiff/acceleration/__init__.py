"""Fused operations in the place of a model's own, without touching its parameters."""

from fastdiff.acceleration.accelerate import accelerate, report, restore
from fastdiff.acceleration.outcome import Report

__all__ = ["Report", "accelerate", "report", "restore"]
